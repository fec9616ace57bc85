"""Meet a share of the MACs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from maskcompile.captures import capture_once
from maskcompile.learning.recording import Recording
from maskcompile.mask import Mask, MaskError
from maskcompile.program import Program
from maskcompile.signature import Key
from passes.dependencies import Slots, slot_dependencies
from passes.plan import plan_run
from passes.rectify import Compute, rectify
from passes.reuse import Rules

#: (step, column of the block)
Cell = tuple[int, int]

#: How near to the budget learning comes, as a share of the MACs of the unmasked run.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Span:
    """Calls of one signature that belong to trajectories which began at one step.

    slots: the denoiser at this signature. calls: int [steps], how many there are at each, none before ``begun``.
    """

    slots: Slots
    begun: int
    calls: NDArray[np.int64]


def spans(model: nn.Module, program: Program, recording: Recording) -> list[Span]:
    """The calls of a recorded pass, those alike together."""
    slots: dict[Key, Slots] = {recording.steps[0][0].call.key: program.slots}
    counted: dict[tuple[Key, int], NDArray[np.int64]] = {}
    for step, calls in enumerate(recording.steps):
        for recorded in calls:
            key = recorded.call.key
            if key not in slots:
                slots[key] = slot_dependencies(capture_once(model, recorded.call, program.names).capture, program.names)
            counted.setdefault((key, recorded.begun), np.zeros(len(recording.steps), dtype=np.int64))[step] += 1
    return [Span(slots[key], begun, calls) for (key, begun), calls in counted.items()]


class Shares:
    """compute -> share of the unmasked run's MACs, under the rules of a mask; remembered, since the search asks again.

    spans: the calls of the run; those of another batch or signature count by their own MACs.
    """

    def __init__(self, spans: Sequence[Span], mask: Mask) -> None:
        self.spans, self.mask = spans, mask
        self.known: dict[tuple[bytes, tuple[str, ...]], float] = {}
        self.total = sum(int(span.calls.sum()) * span.slots.total_macs for span in spans)

    @property
    def slots(self) -> Slots:
        """The denoiser at the first call."""
        return self.spans[0].slots

    def __call__(self, compute: Compute, rules: Sequence[str] | None = None) -> float:
        rules = tuple(rules or self.mask.reuse)
        key = (compute.tobytes(), rules)
        if key not in self.known:
            ruled = replace(self.mask.rules, of_block=rules)
            self.known[key] = sum(self._macs(span, compute, ruled) for span in self.spans) / max(1, self.total)
        return self.known[key]

    def _macs(self, span: Span, compute: Compute, rules: Rules) -> int:
        onwards = range(span.begun, len(compute))
        plans = plan_run(span.slots, self.mask.blocks, compute[span.begun :], rules.at(onwards))
        return sum(int(span.calls[step]) * plan.macs for step, plan in zip(onwards, plans, strict=True))

    def rectified(self, mask: Mask) -> Compute:
        """The mask's decisions without those that nothing depends on, in any of the calls."""
        needed = np.zeros_like(mask.compute)
        for span in self.spans:
            onwards = range(span.begun, mask.steps)
            rows = rectify(span.slots, mask.blocks, mask.compute[span.begun :], mask.rules.at(onwards))
            if span.begun:  # calls that start over there compute all that they need; others need not
                rows[0] &= mask.compute[span.begun]
            needed[span.begun :] |= rows
        return needed


def first_cells(base: Compute, cells: Iterable[Cell], share: Callable[[Compute], float], budget: float) -> Compute:
    """``base`` with as many of ``cells`` computed, from the first on, as the budget allows."""
    order = [cell for cell in cells if not base[cell]]

    def first(count: int) -> Compute:
        compute = base.copy()
        for cell in order[:count]:
            compute[cell] = True
        return compute

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if share(first(middle)) <= budget + 1e-9:
            low = middle
        else:
            high = middle - 1
    return first(low)


def single_cells(base: Compute, cells: Iterable[Cell], share: Callable[[Compute], float], budget: float) -> Compute:
    """``base`` with those of ``cells`` computed that fit what is left of the budget, one after the other.

    A cell that costs nothing is computed in vain for now, and would make those downstream of it expensive; for the same reason
    nothing in ``base`` should be computed in vain. Comes to TOLERANCE above the budget where it cannot come as near from below.
    """
    compute, order, now = base, [cell for cell in cells if not base[cell]], share(base)
    too_large: set[Cell] = set()  # once, and so not asked again

    def with_one(above: float, most: float) -> tuple[Compute, float] | None:
        for cell in order:
            if not compute[cell] and cell not in too_large:
                more = compute.copy()
                more[cell] = True
                if above < (then := share(more)) <= most:
                    return more, then
                if then > most:
                    too_large.add(cell)
        return None

    while now < budget - TOLERANCE / 4 and (found := with_one(now, budget + 1e-9)):
        compute, now = found
    too_large.clear()
    if now < budget - TOLERANCE and (found := with_one(budget, budget + TOLERANCE)):
        compute, now = found
    return compute


def ranked(value: NDArray[np.float64]) -> list[Cell]:
    """All cells of float64 [steps, blocks], those of the largest value first."""
    order = np.argsort(-value, axis=None, kind="stable")
    return [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, value.shape), strict=True)]


def check_budget(budget: float, floor: float) -> None:
    """Raises MaskError for a budget outside 0..1, or below ``floor``, the share of what always runs."""
    if not 0 < budget <= 1:
        raise MaskError(f"budget is the share of the MACs to keep, above 0 and at most 1; got {budget:g}.")
    if budget < floor:
        raise MaskError(
            f"a budget of {budget:g} is below {floor:.3f}, the share of the MACs that always run: the whole first step of a "
            "run, and what lies outside every block. Give a larger budget, or more steps."
        )
