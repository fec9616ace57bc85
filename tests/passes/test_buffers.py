"""Places of a run's cache in memory, written to and read from as the plans do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.buffers import ALIGNMENT, share_buffers
from passes.capture import Slot
from passes.dependencies import slot_dependencies
from passes.plan import GraphKey, Plan, plan_run
from passes.rectify import Version
from tests.passes.test_graphs import SETTINGS, captured, masks

__all__ = ["captured"]


def follow(plans, size, buffers):
    """Label memory by who wrote it; every step reads first and writes then."""
    memory = np.full(buffers.size, -1)
    labels = {version: label for label, version in enumerate(buffers.offset)}

    def place(version):
        start = buffers.offset[version]
        return slice(start, start + size[version.slot])

    for position, plan in enumerate(plans):
        for version in plan.inputs:
            assert (memory[place(version)] == labels[version]).all(), (position, version)
        for version in plan.held:
            if version.step == position:
                assert place(version).stop <= buffers.size
                assert place(version).start % ALIGNMENT == 0
                memory[place(version)] = labels[version]


def test_nothing_is_overwritten_before_it_is_read(captured):
    model, found, _ = captured
    slots = slot_dependencies(found, model.names())

    @SETTINGS
    @given(masks(model))
    def check(mask):
        plans = plan_run(slots, model.names(), *mask)
        buffers = share_buffers(plans, slots.size)
        follow(plans, slots.size, buffers)
        # All slots of this denoiser are of one size, where placing greedily is known to be optimal.
        assert buffers.size == max(len(plan.held) for plan in plans) * ALIGNMENT

    check()


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 7), st.integers(1, 9)), max_size=25))
def test_versions_of_many_sizes(drawn):
    """(first step, steps until the last reader, units of memory) of each version, of a slot of its own."""
    size = {Slot(str(i), 0, 0): units * ALIGNMENT - 12 for i, (_, _, units) in enumerate(drawn)}
    lives = {Version(slot, first): first + until for slot, (first, until, _) in zip(size, drawn, strict=True)}
    plans = []
    for position in range(16):
        held = frozenset(v for v, last in lives.items() if v.step <= position < last)
        read = tuple(sorted(v for v, last in lives.items() if last == position))
        plans.append(Plan((), frozenset(), GraphKey((), (), 0), read, (), held, sum(size[v.slot] for v in held)))
    buffers = share_buffers(plans, size)
    follow(plans, size, buffers)
    peak = max(sum(-(-size[v.slot] // ALIGNMENT) * ALIGNMENT for v in plan.held) for plan in plans)
    assert peak <= buffers.size <= 2 * peak


@pytest.mark.parametrize("plans", [[], [Plan((), frozenset(), GraphKey((), (), 0), (), (), frozenset(), 0)]])
def test_nothing_to_hold(plans):
    assert share_buffers(plans, {}).size == 0
