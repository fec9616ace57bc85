"""Masks learned through pipelines: with class guidance, text embeddings, and for a UNet."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import maskcompile as mc
from tests.maskcompile.pipelines.test_exact import recorded
from tests.maskcompile.pipelines.tiny import TINY, text2img


@pytest.mark.parametrize("name", ["dit", "pixart_alpha", "text2img"])
def test_a_learned_mask_meets_its_budget(name):
    pipe, run = TINY[name]()
    at = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, at)
    calls = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    original, timesteps, _ = recorded(pipe, at, run)
    hook.remove()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mask = mc.learn(model, lambda seed: run(pipe, seed=seed), budget=0.6, method=mc.Search(passes=12), progress=False)
    assert mask.timesteps == tuple(timesteps)
    assert mask.provenance["share"] <= 0.61
    program = mc.trace(model, *calls[0][0], **calls[0][1])
    largest = max(block.macs for block in program.blocks) / (program.macs * mask.steps)
    assert mask.provenance["share"] >= 0.6 - max(0.01, largest)
    coarse = any("no block is small enough" in str(w.message) for w in said)
    assert coarse == (mask.provenance["share"] < 0.59)
    mc.optimize(pipe, mask, backend="eager")
    sampled = run(pipe, seed=7)
    report = getattr(pipe, at).report()
    assert report.reusing_calls > 0
    assert report.unknown_timesteps == 0
    assert [s.share for s in report.signatures] == [pytest.approx(mask.provenance["share"], abs=1e-4)]
    setattr(pipe, at, model)
    assert not torch.equal(sampled, run(pipe, seed=7))
    assert torch.equal(run(pipe), original)


def two_calls_a_step():
    """A 2nd-order solver."""
    return text2img(diffusers.HeunDiscreteScheduler())


QUICK = {"search": mc.Search(passes=3, reach=False), "paper": mc.Paper(epochs=2, updates=1)}
SEVERAL = {name: TINY[name] for name in ("flux_guided_separately", "text2img_guided_at_first", "wan", "cogvideox")}


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("name", [*SEVERAL, "two_calls_a_step"])
def test_the_share_is_what_a_run_takes_whatever_the_calls_of_a_step(name, method):
    """Guidance in calls of its own, or switched off midway, two calls at a timestep: torch counts what is executed."""
    pipe, run = two_calls_a_step() if name == "two_calls_a_step" else SEVERAL[name]()
    at = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, at)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no block is small enough")
        mask = mc.learn(model, lambda seed: run(pipe, seed=seed), budget=0.6, method=QUICK[method], progress=False)
    full = counted(pipe, at, run)
    assert counted(pipe, at, run) == full
    mc.optimize(pipe, mask, backend="eager")
    run(pipe)  # which captures
    assert counted(pipe, at, run) / full == pytest.approx(mask.provenance["share"], abs=2e-3)
    assert mask.provenance["share"] <= 0.61


def counted(pipe, at, run):
    """Operations of the denoiser in a run."""
    total, denoiser = [], getattr(pipe, at)
    own, on_instance = denoiser.forward, "forward" in vars(denoiser)

    def forward(*args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            result = own(*args, **kwargs)
        total.append(counter.get_total_flops())
        return result

    denoiser.forward = forward
    try:
        run(pipe)
    finally:
        del denoiser.forward
        if on_instance:
            denoiser.forward = own
    return sum(total)
