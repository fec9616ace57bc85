"""Pass 5: rectification, the lossless rule: liveness on the denoiser unrolled over blocks (space) and steps (time).

Two questions are settled for a whole run at once. Which block calls run, and what stands for those that do not: a block marked
*reuse* runs all the same when this run holds nothing of it yet, and a block within a reused one does not run. And which of
these are needed: a computed block is dropped when no live block of its step reads it and no later live reuse builds on it; a
reuse that nobody reads is dropped; a tensor is stored only where a later live reuse builds on it. Results stay bit-identical,
because nothing that reaches them changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.capture import Slot
from passes.dependencies import Slots
from passes.reuse import Recall, Rules

Call = tuple[str, int]
Compute = NDArray[np.bool_]


@dataclass(frozen=True, order=True)
class Version:
    """A slot as it was computed at a step of the run."""

    slot: Slot
    step: int


@dataclass(frozen=True)
class Calls:
    """The block calls of one step: those that run, and how the outputs of the others that the run holds are made."""

    running: frozenset[Call]
    recalled: dict[Call, Recall]


@dataclass(frozen=True)
class Liveness:
    """What is live at one step.

    computed: slots (with OUTPUT). read: reused slots, with how each is made. stored: slots to store. held: versions that the
    cache keeps after the step.
    """

    computed: frozenset[Slot | str]
    read: dict[Slot, Recall]
    stored: frozenset[Slot]
    held: frozenset[Version]


def simulate(slots: Slots, blocks: Sequence[str], compute: Compute, rules: Rules) -> list[Calls]:
    """The block calls at each step of a run that starts with nothing stored.

    compute: bool [steps, len(blocks)], True = compute. rules: of reuse, for these blocks and steps. A call
    within a reused call does not run.
    """
    column = {block: index for index, block in enumerate(blocks)}
    outer_first = slots.calls[::-1]  # calls are listed as they return
    ran: dict[Call, list[int]] = {}
    steps = []
    for step, row in enumerate(compute.tolist()):
        running: set[Call] = set()
        for c in outer_first:
            call = (c.block, c.call)
            if all(outer in running for outer in c.enclosing) and (row[column[c.block]] or call not in ran):
                running.add(call)
        recalled = {call: rules.recall(column[call[0]], at, step) for call, at in ran.items() if call not in running}
        for call in running:
            ran.setdefault(call, []).append(step)
        steps.append(Calls(frozenset(running), recalled))
    return steps


def liveness(slots: Slots, steps: Sequence[Calls], also: Sequence[frozenset[Slot | str]] | None = None) -> list[Liveness]:
    """What is live at each step, given the calls of each; from the last step to the first.

    also: slots to compute at each step even where nobody reads them, if their calls run.
    """
    wanted: frozenset[Version] = frozenset()
    live: list[Liveness] = []
    for step, calls in reversed(list(enumerate(steps))):
        produced = frozenset(slot for c in slots.calls if (c.block, c.call) in calls.running for slot in c.slots)
        stored = frozenset(version.slot for version in wanted if version.step == step)
        roots = stored if also is None else stored | produced.intersection(also[step])
        computed, reused = slots.reach(frozenset(slots.size) - produced, roots)
        read = {slot: _of_slot(slots, slot, calls.recalled[slot.block, slot.call]) for slot in sorted(reused)}
        live.append(Liveness(frozenset(computed), read, stored, wanted))
        wanted = frozenset(v for v in wanted if v.step < step) | {
            v for slot, made in read.items() for v in versions(slot, made)
        }
    return live[::-1]


def rectify(slots: Slots, blocks: Sequence[str], compute: Compute, rules: Rules) -> Compute:
    """The cheapest mask with the same results: bool [steps, len(blocks)], True only where a block must run.

    A block that encloses another one stays computed where the inner one must run: a mask cannot say "only this part of it".
    """
    rectified = np.zeros_like(compute)
    column = {block: index for index, block in enumerate(blocks)}
    steps = simulate(slots, blocks, compute, rules)
    for step, live in enumerate(liveness(slots, steps)):
        for c in slots.calls:
            if (c.block, c.call) in steps[step].running and not live.computed.isdisjoint(c.slots):
                for block, _ in [(c.block, c.call), *c.enclosing]:
                    rectified[step, column[block]] = True
    return rectified


def versions(slot: Slot, made: Recall) -> list[Version]:
    """What a reused output is made of, the newest first."""
    return [Version(slot, step) for step in (made.last, made.before) if step is not None]


def _of_slot(slots: Slots, slot: Slot, made: Recall) -> Recall:
    """Only what can be multiplied is extrapolated; whole numbers and booleans are held."""
    dtype = slots.dtype[slot]
    return made if dtype.is_floating_point or dtype.is_complex else Recall(made.last)
