"""Captures that are kept: when one is taken again, and when not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import maskcompile as mc
from maskcompile import captures
from tests.toys import Chain, Processed

pytestmark = pytest.mark.usefixtures("counted")


def inputs(batch=2):
    return torch.randn(batch, 4), torch.tensor(900)


def full(model):
    return mc.Mask.full(["a", "b", "c"], [900, 100])


def test_tracing_and_optimising_capture_once(counted):
    model = Chain().eval()
    program = mc.trace(model, *inputs())
    for _ in range(2):
        fast = mc.optimize(model, mc.Mask.full(program.names, [900, 100]), backend="eager")
        fast(*inputs())
    assert len(counted) == 1


def changed(model, what):
    if what == "weight":
        model.a.up.weight = nn.Parameter(model.a.up.weight * 2)
    elif what == "setting":
        model.gain = 3.0
    else:
        model.processor.scale = 3.0


@pytest.mark.parametrize("what", ["weight", "setting", "processor"])
def test_what_was_changed_is_captured_again(what, counted):
    model = Processed().eval()
    mc.trace(model, *inputs())
    changed(model, what)
    x, t = inputs()
    assert torch.equal(mc.optimize(model, full(model), backend="eager")(x, t), model(x, t))
    assert len(counted) == 2


def test_nothing_is_kept_alive():
    model = Chain().eval()
    mc.trace(model, *inputs())
    weight = weakref.ref(model.a.up.weight)
    model.a.up.weight = nn.Parameter(torch.zeros_like(model.a.up.weight))
    mc.trace(model, *inputs(3))
    gc.collect()
    assert weight() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_only_so_many_are_kept(counted):
    model = Chain().eval()
    for batch in range(2, 3 + captures.MOST_KEPT):
        mc.trace(model, *inputs(batch))
        mc.trace(model, *inputs(2))  # used all the time
    assert len(counted) == captures.MOST_KEPT + 1
    mc.trace(model, *inputs(3))
    assert len(counted) == captures.MOST_KEPT + 2


def test_an_optimised_denoiser_is_not_captured():
    model = Chain().eval()
    fast = mc.optimize(model, full(model), backend="eager")
    program = mc.trace(model, *inputs())
    with pytest.raises(ValueError, match=r"already optimised; pass fast.original"):
        mc.trace(fast, *inputs())
    with pytest.raises(ValueError, match=r"already optimised; pass fast.original"):
        mc.schedules.measure_changes(fast, lambda seed: fast(*inputs()), program)
