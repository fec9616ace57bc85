"""Pass 4: rectification, the lossless rule: liveness on the denoiser unrolled over blocks (space) and steps (time).

Two questions are settled for a whole run at once. Which block calls run: a block marked *reuse* runs all the same when this
run holds nothing of it yet, and a block within a reused one does not run. And which of these are needed: a computed block is
dropped when no live block of its step reads it and no later live reuse does; a reuse that nobody reads is dropped; a tensor
is stored only where a later live reuse reads it. Results stay bit-identical, because nothing that reaches them changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.capture import Slot
from passes.dependencies import Slots

Call = tuple[str, int]
Compute = NDArray[np.bool_]


@dataclass(frozen=True)
class Liveness:
    """What is live at one step: slots computed (with OUTPUT), slots read from the cache, slots to store, slots held after."""

    computed: frozenset[Slot | str]
    read: frozenset[Slot]
    stored: frozenset[Slot]
    held: frozenset[Slot]


def running_calls(slots: Slots, blocks: Sequence[str], compute: Compute) -> list[frozenset[Call]]:
    """The block calls that run at each step of a run that starts with nothing stored.

    compute: bool [steps, len(blocks)], True = compute. A call within a reused call does not run.
    """
    column = {block: index for index, block in enumerate(blocks)}
    outer_first = slots.calls[::-1]  # calls are listed as they return
    stored: set[Call] = set()
    steps = []
    for row in compute.tolist():
        running: set[Call] = set()
        for c in outer_first:
            call = (c.block, c.call)
            if all(outer in running for outer in c.enclosing) and (row[column[c.block]] or call not in stored):
                running.add(call)
        stored |= running
        steps.append(frozenset(running))
    return steps


def liveness(slots: Slots, running: Sequence[frozenset[Call]]) -> list[Liveness]:
    """What is live at each step, given the calls that run there; from the last step to the first."""
    wanted: frozenset[Slot] = frozenset()
    live: list[Liveness] = []
    for calls in reversed(running):
        produced = frozenset(slot for c in slots.calls if (c.block, c.call) in calls for slot in c.slots)
        stored = wanted & produced
        computed, read = slots.reach(frozenset(slots.size) - produced, stored)
        live.append(Liveness(frozenset(computed), frozenset(read), stored, wanted))
        wanted = (wanted - stored) | read
    return live[::-1]


def rectify(slots: Slots, blocks: Sequence[str], compute: Compute) -> Compute:
    """The cheapest mask with the same results: bool [steps, len(blocks)], True only where a block must run.

    A block that encloses another one stays computed where the inner one must run: a mask cannot say "only this part of it".
    """
    rectified = np.zeros_like(compute)
    column = {block: index for index, block in enumerate(blocks)}
    running = running_calls(slots, blocks, compute)
    for step, live in enumerate(liveness(slots, running)):
        for c in slots.calls:
            if (c.block, c.call) in running[step] and not live.computed.isdisjoint(c.slots):
                for block, _ in [(c.block, c.call), *c.enclosing]:
                    rectified[step, column[block]] = True
    return rectified
