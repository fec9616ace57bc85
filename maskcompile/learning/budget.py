"""Meet a share of the MACs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from maskcompile.mask import Mask, MaskError
from maskcompile.program import Program
from passes.dependencies import Slots
from passes.plan import plan_run
from passes.rectify import Compute, rectify

#: (step, column of the block)
Cell = tuple[int, int]

#: How near to the budget learning comes, as a share of the MACs of the unmasked run.
TOLERANCE = 0.01


class Shares:
    """compute -> share of the unmasked run's MACs, under the rules of a mask; remembered, since the search asks again."""

    def __init__(self, program: Program, mask: Mask) -> None:
        self.slots: Slots = program.slots
        self.mask = mask
        self.known: dict[tuple[bytes, tuple[str, ...]], float] = {}

    def __call__(self, compute: Compute, rules: Sequence[str] | None = None) -> float:
        rules = tuple(rules or self.mask.reuse)
        key = (compute.tobytes(), rules)
        if key not in self.known:
            plans = plan_run(self.slots, self.mask.blocks, compute, replace(self.mask.rules, of_block=rules))
            self.known[key] = sum(plan.macs for plan in plans) / max(1, self.slots.total_macs * self.mask.steps)
        return self.known[key]

    def rectified(self, mask: Mask) -> Compute:
        """The mask's decisions without those that nothing depends on."""
        return rectify(self.slots, mask.blocks, mask.compute, mask.rules)


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
