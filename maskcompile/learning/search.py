"""Search for a mask on the true objective: whole masked passes, compared with the unmasked ones.

Most of what a mask gains or loses lies in *which steps* it computes: errors of neighbouring steps add up or cancel, caches age,
and what goes wrong in the first steps decides what the picture shows. So the search

1. tries families of masks at the budget: the first w steps and evenly spaced ones after them, and published schedules;
2. improves the best by moving computed steps, and parts of them, in time: one change, one masked pass on the first half of the
   seeds, and where that is no worse one on the rest; kept where the mean gain exceeds its standard error over the pictures.

No step is differentiated through another, nothing is stored for each step but what the denoiser was given and returned, and
what is found is what runs, since the specialised graphs themselves are measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskcompile.learning.budget import TOLERANCE, Shares, first_cells, ranked, single_cells
from maskcompile.learning.fidelity import Fidelity, better
from maskcompile.learning.memo import Memo
from maskcompile.mask import Mask
from passes.rectify import Compute

#: How many of the first steps are computed in a row, in the masks that the search begins with.
LEADS = (1, 2, 3, 4, 5, 6, 8, 10, 13)
#: Shares of the budget that whole steps get, in further masks to begin with.
PARTS = (0.9, 0.8, 0.65)


@dataclass(frozen=True)
class Found:
    """A mask with its fidelity: dB, float64 [elements]."""

    mask: Mask
    decibels: NDArray[np.float64]


class Evaluations:
    """Fidelities of masks, remembered. passes: the work that they cost, in unmasked passes over all seeds."""

    def __init__(self, fidelity: Fidelity, shares: Shares, memo: Memo, bar: Any) -> None:
        self.fidelity, self.shares, self.memo, self.bar = fidelity, shares, memo, bar
        self.first = fidelity.seeds[: max(1, len(fidelity.seeds) // 2)]
        self.rest = fidelity.seeds[len(self.first) :]
        self.passes = 0.0

    def spend(self, work: float, shown: float | None = None) -> None:
        """Count work. shown: what of it the bar does not show yet, where that is not all."""
        self.passes += work
        self.bar.update(work if shown is None else shown)

    def show(self, found: Found) -> None:
        """The best mask so far, beside the bar."""
        share = self.shares(found.mask.compute, found.mask.reuse)
        self.bar.set_postfix(share=f"{share:.3f}", fidelity=f"{found.decibels.mean():.1f} dB")

    @staticmethod
    def key(mask: Mask, seeds: Sequence[int]) -> str:
        """Of a mask's fidelity on these seeds, in the memo."""
        reach = () if mask.reach is None else (mask.reach,)
        return sha256(repr((mask.compute.tobytes().hex(), mask.reuse, list(seeds), *reach)).encode()).hexdigest()[:24]

    def part(self, mask: Mask, seeds: Sequence[int]) -> NDArray[np.float64]:
        """float64 [elements of these seeds]."""
        key = self.key(mask, seeds)
        if key not in self.memo:
            if self.fidelity.processes.count > 1 and seeds == self.first:  # no process waits for another's half of the seeds
                whole = self.fidelity(mask, self.fidelity.seeds).tolist()
                half = len(whole) * len(self.first) // len(self.fidelity.seeds)
                self.memo[key], self.memo[self.key(mask, self.rest)] = whole[:half], whole[half:]
            else:
                self.memo[key] = self.fidelity(mask, seeds).tolist() if seeds else []
        self.spend(self.shares(mask.compute, mask.reuse) * len(seeds) / len(self.fidelity.seeds))
        return np.asarray(self.memo[key], dtype=np.float64)

    def __call__(self, mask: Mask) -> NDArray[np.float64]:
        """float64 [elements]."""
        return np.concatenate([self.part(mask, self.first), self.part(mask, self.rest)])

    def improves(self, mask: Mask, incumbent: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """The mask's fidelity where it is better than the incumbent's, else None, as soon as that shows."""
        start = self.part(mask, self.first)
        if not start.mean() > incumbent[: len(start)].mean():
            return None
        whole = np.concatenate([start, self.part(mask, self.rest)])
        return whole if better(whole, incumbent) else None


def search(
    template: Mask,
    starts: Sequence[Compute],
    rules: Sequence[Sequence[str]],
    sensitivity: Callable[[Mask], NDArray[np.float64]],
    macs: NDArray[np.float64],
    budget: float,
    passes: float,
    evaluate: Evaluations,
    seed: int = 0,
) -> Found:
    """The best mask found within the budget and about ``passes`` unmasked passes of work.

    template: what the mask is for; its decisions do not matter. starts: further masks to begin with, bool [steps, blocks].
    rules: reuse rules to choose from, one for each block. sensitivity: mask -> float64 [steps, blocks], what computing a block
    at a step is worth (``learning.sensitivity``). macs: float64 [blocks].

    Raises FloatingPointError where no mask came to anything finite.
    """
    steps = template.steps
    shares = evaluate.shares
    worth: NDArray[np.float64] | None = None

    def whole(mask: Mask) -> Mask:
        """The mask with what the budget leaves spent on the cells that are worth most."""
        if shares(mask.compute, mask.reuse) <= budget - TOLERANCE / 2 and worth is not None:
            order = ranked(worth / np.maximum(macs, 1.0))

            def share(compute: Compute) -> float:
                return shares(compute, mask.reuse)

            compute = shares.rectified(mask.replace(first_cells(mask.compute, order, share, budget)))
            mask = mask.replace(single_cells(compute, order, share, budget))
        return mask.replace(shares.rectified(mask))

    best: Found | None = None
    tried: set[tuple[bytes, tuple[str, ...]]] = set()

    def consider(mask: Mask) -> None:
        nonlocal best
        if best is not None and evaluate.passes >= passes:
            return
        mask = whole(mask)
        if (mask.compute.tobytes(), mask.reuse) in tried or shares(mask.compute, mask.reuse) > budget + TOLERANCE:
            return
        tried.add((mask.compute.tobytes(), mask.reuse))
        decibels = evaluate(mask)
        if best is None or decibels.mean() > best.decibels.mean():
            best = Found(mask, decibels)

    families = list(spread(steps, len(template.blocks), budget, lambda c: shares(c, rules[0])))
    middle = families[min(3, len(families) - 1)]
    worth = sensitivity(template.replace(middle, reuse=rules[0]))
    for rule in rules:
        for compute in (*families, *starts):
            if rule == rules[0] or any(compute is f for f in families[2:5]):
                consider(template.replace(compute, reuse=rule))
    assert best is not None
    lead = next((i for i, row in enumerate(best.mask.compute) if not row.all()), steps)
    for part in PARTS:  # fewer whole steps, and more of the budget for parts of others
        for compute in spread(steps, len(template.blocks), part * budget, lambda c: shares(c, rules[0]), (lead,)):
            consider(template.replace(compute, reuse=best.mask.reuse))
    incumbent = best
    evaluate.show(incumbent)
    moves = _moves(incumbent.mask.compute, worth, macs, random.Random(seed))
    misses = 0
    while evaluate.passes < passes and misses < 60:
        compute = next(moves)
        mask = whole(incumbent.mask.replace(compute))
        key = (mask.compute.tobytes(), mask.reuse)
        if key in tried or shares(mask.compute, mask.reuse) > budget + TOLERANCE:
            misses += 1  # of the moves that are left, hardly any is new
            continue
        tried.add(key)
        misses = 0
        decibels = evaluate.improves(mask, incumbent.decibels)
        if decibels is not None:
            incumbent = Found(mask, decibels)
            evaluate.show(incumbent)
            moves = _moves(mask.compute, worth, macs, random.Random(seed + len(tried)))
    check_finite(incumbent, evaluate)
    return incumbent


def check_finite(found: Found, evaluate: Evaluations) -> None:
    """Raises FloatingPointError where a mask came to something that is not finite, with where that began, if it is known."""
    if not np.isfinite(found.decibels).all():
        where = evaluate.fidelity.broken or "a sampling pass does not come to finite numbers"
        raise FloatingPointError(f"under the best mask that was tried, {where}; without a mask it is. Is it in half precision?")


def spread(
    steps: int, blocks: int, budget: float, share: Callable[[Compute], float], leads: Sequence[int] = LEADS
) -> Iterator[Compute]:
    """Masks of whole steps within the budget: the first w steps and then evenly spaced ones to the last, for each lead w."""

    def of(count: int, lead: int) -> Compute:
        lead = min(lead, count)
        rest = np.linspace(lead - 1, steps - 1, count - lead + 1)[1:]
        compute = np.zeros((steps, blocks), dtype=np.bool_)
        compute[[*range(lead), *np.round(rest).astype(int)]] = True
        return compute

    for lead in (lead for lead in leads if lead <= max(1, steps // 2)):
        low, high = 1, steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if share(of(middle, lead)) <= budget + 1e-9 else (low, middle - 1)
        if lead == 1 or lead < low:
            yield of(low, lead)


def _moves(
    compute: Compute, worth: NDArray[np.float64], macs: NDArray[np.float64], generator: random.Random
) -> Iterator[Compute]:
    """Masks near ``compute`` of about the same cost, for ever: rows moved in time, or parts of a row given to another."""
    steps = len(compute)
    value = worth / np.maximum(macs, 1.0)
    while True:
        one = generator.randrange(1, steps)
        near = [t for t in range(max(1, one - 2), min(steps, one + 3)) if t != one]
        other = generator.choice(near) if near and generator.random() < 0.7 else generator.randrange(1, steps)
        moved = compute.copy()
        if generator.random() < 0.7:
            moved[[one, other]] = moved[[other, one]]
        else:
            part = generator.choice((0.25, 0.5, 1.0)) * macs.sum()
            given = _take(np.flatnonzero(moved[one]), value[one], macs, part, best=False)
            taken = _take(np.flatnonzero(~moved[other]), value[other], macs, macs[given].sum(), best=True)
            moved[one, given] = False
            moved[other, taken] = True
        yield moved


def _take(
    columns: NDArray[np.intp], value: NDArray[np.float64], macs: NDArray[np.float64], total: float, best: bool
) -> list[int]:
    """Blocks among ``columns`` of at most ``total`` MACs: the best of them, or the worst."""
    taken: list[int] = []
    for column in columns[np.argsort(-value[columns] if best else value[columns], kind="stable")]:
        if macs[[*taken, column]].sum() <= total * (1 + 1e-9):
            taken.append(int(column))
    return taken
