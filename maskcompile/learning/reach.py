"""How far *linear* reaches at each step, fitted to samples.

Near where it is, what a sampler comes to under a mask is a linear function of the reach of each step. Its slopes are
differences of whole masked passes, through the specialised graphs: no step is differentiated through another. One system of
equations then gives the reach of all steps at once, for errors of neighbouring steps add up or cancel (Gauss-Newton, with a
ridge towards a reach of 1). Every outcome counts by its relative error, as in decibels, and takes part with no more than
``MOST_NUMBERS`` of its numbers, so that memory does not grow with their size. A factor a step, of long runs one for a few
neighbouring steps, is little to fit to samples; it takes two of them at least, to tell what is gained from luck.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskcompile.learning.fidelity import FLOOR, better, power
from maskcompile.learning.search import Evaluations, Found
from maskcompile.mask import Mask
from passes.plan import plan_run
from passes.reuse import FITTED_REACH, MOST_REACH

#: Slopes are differences over this much of a reach.
STEP = 0.1
ROUNDS = 2
#: Factors that are fitted at most; where more steps extrapolate, neighbouring ones share theirs.
MOST_FACTORS = 32
#: Numbers of each element of an outcome that the equations are made of.
MOST_NUMBERS = 16_384
#: Weights of staying at 1, relative to the mean curvature, and shares of the way to the solution, that are tried.
DAMPING = (0.01, 0.1)
LENGTHS = (1.0, 0.5)


@dataclass(frozen=True)
class Reaching:
    """Where a mask extrapolates. parts: its steps that do, those together that share a factor. most: what to give each of the
    mask's steps at most, float64 [steps]; more would change nothing, for ``FITTED_REACH`` bounds it."""

    parts: tuple[list[int], ...]
    most: NDArray[np.float64]


def reaching(mask: Mask, evaluate: Evaluations) -> Reaching:
    """Where the mask extrapolates."""
    plans = plan_run(evaluate.shares.slots, mask.blocks, mask.compute, mask.replace(reach=None).rules)
    least = [min((c for c in plan.coefficients if c > 0), default=0.0) for plan in plans]
    most = np.array([min(MOST_REACH, FITTED_REACH / c) if c else MOST_REACH for c in least])
    steps = [step for step, c in enumerate(least) if c]
    parts = [part.tolist() for part in np.array_split(steps, min(len(steps), MOST_FACTORS))] if steps else []
    return Reaching(tuple(parts), most)


def work(mask: Mask, evaluate: Evaluations) -> float:
    """What fitting costs at most, in unmasked passes."""
    factors = len(reaching(mask, evaluate).parts)
    passes = ROUNDS * (1 + factors + len(DAMPING) * len(LENGTHS)) if factors else 0
    return passes * evaluate.shares(mask.compute, mask.reuse)


def fit(found: Found, evaluate: Evaluations) -> Found:
    """The mask with the reach of its steps fitted; as it was where nothing is extrapolated, or nothing gained."""
    where = reaching(found.mask, evaluate)
    first = [part[0] for part in where.parts]
    start = np.minimum(found.mask.reach or [1.0] * found.mask.steps, where.most)
    best = Found(found.mask.replace(reach=start.tolist()), found.decibels)
    for _ in range(ROUNDS if where.parts and len(found.decibels) > 1 else 0):
        curvature, slope = _equations(best.mask, where, evaluate)
        scale = np.trace(curvature) / len(first)
        if not (np.isfinite(curvature).all() and np.isfinite(slope).all() and scale > 0):
            break
        now = np.asarray(best.mask.reach)
        tried = []
        for damping in DAMPING:
            held = damping * scale * np.eye(len(first))
            change = np.linalg.solve(curvature + held, -slope - held @ (now[first] - 1))
            change = np.asarray(evaluate.fidelity.processes.first(change.tolist()))  # solvers differ in their last digits
            for length in LENGTHS:
                reach = now.copy()
                for part, by in zip(where.parts, length * change, strict=True):
                    reach[part] = np.clip(now[part] + by, 0.0, where.most[part])
                mask = best.mask.replace(reach=np.round(reach, 3).tolist())
                tried.append(Found(mask, evaluate(mask)))
        top = max(tried, key=lambda one: float(one.decibels.mean()))
        if not better(top.decibels, best.decibels):
            break
        best = top
        evaluate.show(best)
    return best if best.decibels is not found.decibels else found


def _equations(mask: Mask, where: Reaching, evaluate: Evaluations) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss-Newton's (curvature [parts, parts], slope [parts]) of half the sum of squared relative errors of all outcomes."""
    processes, memo, seeds = evaluate.fidelity.processes, evaluate.memo, evaluate.fidelity.seeds
    keys = {seed: f"reach {evaluate.key(mask, [seed])} {len(where.parts)}" for seed in seeds}
    missing = [seed for seed in seeds if keys[seed] not in memo]
    own = {}
    for seed in processes.mine(missing):
        own[seed] = _of_seed(mask, where, evaluate, seed)
        if processes.count == 1:
            memo[keys[seed]] = own[seed]
    for seed, rows in processes.gather(own).items():
        if processes.count > 1:
            memo[keys[seed]] = rows
    passes = (1 + len(where.parts)) * evaluate.shares(mask.compute, mask.reuse)
    evaluate.spend(passes, shown=passes * (1 - len(processes.mine(missing)) * processes.count / len(seeds)))
    both = np.sum([memo[keys[seed]] for seed in seeds], axis=0)
    return both[:, :-1], both[:, -1]


def _of_seed(mask: Mask, where: Reaching, evaluate: Evaluations, seed: int) -> list[list[float]]:
    """The equations of one seed: a row for each of the parts, the slope last."""
    fidelity = evaluate.fidelity
    passed = evaluate.shares(mask.compute, mask.reuse) * fidelity.processes.count / len(fidelity.seeds)
    reference = fidelity.recordings[seed].outcome.double()
    at = _chosen(reference.shape[1])

    def outcome(reach: NDArray[np.float64]) -> Tensor:
        result = fidelity.outcome(mask.replace(reach=reach.tolist()), seed).double()
        evaluate.bar.update(passed)
        return result

    now = np.asarray(mask.reach)
    base = outcome(now)
    error = base - reference
    least = (FLOOR * power(reference) * reference.shape[1]).sqrt()  # an outcome that is exact must not count alone
    weight = (1 / torch.maximum(error.norm(dim=1), least))[:, None]
    base, error = base[:, at].clone(), error[:, at] * weight
    columns = torch.empty(len(where.parts), error.numel(), dtype=torch.float64, device="cpu")
    for row, part in enumerate(where.parts):
        change = STEP if (now[part] + STEP <= where.most[part]).all() else -STEP
        reach = now.copy()
        reach[part] = np.clip(now[part] + change, 0.0, MOST_REACH)
        columns[row] = ((outcome(reach)[:, at] - base) / change * weight).flatten()
    equations: list[list[float]] = torch.cat([columns @ columns.T, columns @ error.reshape(-1, 1)], dim=1).tolist()
    return equations


def _chosen(numbers: int) -> Tensor:
    """Which numbers of an element take part."""
    if numbers <= MOST_NUMBERS:
        return torch.arange(numbers, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randperm(numbers, generator=generator, device="cpu")[:MOST_NUMBERS].sort().values
