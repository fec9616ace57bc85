"""How far *linear* reaches at each step, fitted to samples.

Near where it is, what a sampler comes to under a mask is a linear function of the reach of each step. Its slopes are
differences of whole masked passes, through the specialised graphs: no step is differentiated through another. One system of
equations then gives the reach of all steps at once, for errors of neighbouring steps add up or cancel (Levenberg 1944: least
squares, damped towards a reach of 1). Every outcome counts by its relative error, as in decibels. A factor a step, of long runs
one for a few neighbouring steps, is no more than samples can tell apart: what is gained on them is gained on other noise too.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from maskcompile.learning.fidelity import FLOOR, Fidelity, better
from maskcompile.learning.search import Evaluations, Found
from maskcompile.mask import MOST_REACH, Mask
from passes.plan import plan_run

#: Slopes are differences over this much of a reach.
STEP = 0.1
ROUNDS = 2
#: Factors that are fitted at most; where more steps extrapolate, neighbouring ones share theirs.
MOST_FACTORS = 32
#: Weights of staying at 1, relative to the mean curvature, and shares of the way to the solution, that are tried.
DAMPING = (0.01, 0.1)
LENGTHS = (1.0, 0.5)


def reaching(mask: Mask, evaluate: Evaluations) -> list[list[int]]:
    """The steps at which something is extrapolated, those together that share a factor."""
    plans = plan_run(evaluate.shares.slots, mask.blocks, mask.compute, mask.rules)
    steps = [step for step, plan in enumerate(plans) if plan.coefficients]
    return [part.tolist() for part in np.array_split(steps, min(len(steps), MOST_FACTORS))] if steps else []


def work(mask: Mask, evaluate: Evaluations) -> float:
    """What fitting costs at most, in unmasked passes."""
    factors = len(reaching(mask, evaluate))
    passes = ROUNDS * (1 + factors + len(DAMPING) * len(LENGTHS)) if factors else 0
    return passes * evaluate.shares(mask.compute, mask.reuse)


def fit(found: Found, evaluate: Evaluations) -> Found:
    """The mask with the reach of its steps fitted; as it was where nothing is extrapolated, or nothing gained."""
    parts = reaching(found.mask, evaluate)
    first = [part[0] for part in parts]
    best = Found(found.mask.replace(reach=found.mask.reach or [1.0] * found.mask.steps), found.decibels)
    for _ in range(ROUNDS if parts else 0):
        curvature, slope = _equations(best.mask, parts, evaluate)
        scale = np.trace(curvature) / len(parts)
        if not (np.isfinite(curvature).all() and np.isfinite(slope).all() and scale > 0):
            break
        now = np.asarray(best.mask.reach)
        tried = []
        for damping in DAMPING:
            held = damping * scale * np.eye(len(parts))
            change = np.linalg.solve(curvature + held, -slope - held @ (now[first] - 1))
            for length in LENGTHS:
                reach = now.copy()
                for part, by in zip(parts, length * change, strict=True):
                    reach[part] = np.clip(now[part] + by, 0.0, MOST_REACH)
                mask = best.mask.replace(reach=np.round(reach, 3).tolist())
                tried.append(Found(mask, evaluate(mask)))
        top = max(tried, key=lambda one: float(one.decibels.mean()))
        if not better(top.decibels, best.decibels):
            break
        best = top
        evaluate.show(best)
    return best if best.decibels is not found.decibels else found


def _equations(mask: Mask, parts: list[list[int]], evaluate: Evaluations) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss-Newton's (curvature [parts, parts], slope [parts]) of half the sum of squared relative errors of all outcomes."""
    fidelity, memo = evaluate.fidelity, evaluate.memo
    key = "reach " + evaluate.key(mask, fidelity.seeds)
    if key not in memo:
        own = {seed: _of_seed(fidelity, mask, parts, seed) for seed in fidelity.processes.mine(fidelity.seeds)}
        every = fidelity.processes.gather(own)
        memo[key] = np.sum([every[seed] for seed in fidelity.seeds], axis=0).tolist()
    evaluate.spend((1 + len(parts)) * evaluate.shares(mask.compute, mask.reuse))
    both = np.asarray(memo[key], dtype=np.float64)
    return both[:, :-1], both[:, -1]


def _of_seed(fidelity: Fidelity, mask: Mask, parts: list[list[int]], seed: int) -> list[list[float]]:
    """The equations of one seed: a row for each of the parts, the slope last."""
    assert mask.reach is not None
    base = fidelity.outcome(mask, seed).double()
    reference = fidelity.references[seed].double()
    error = base - reference
    least = FLOOR**0.5 * reference.norm(dim=1, keepdim=True).clamp_min(1e-30)  # an outcome that is exact must not count alone
    weight = 1 / torch.maximum(error.norm(dim=1, keepdim=True), least)
    columns = []
    for part in parts:
        reach = np.asarray(mask.reach)
        change = STEP if reach[part].max() + STEP <= MOST_REACH else -STEP
        reach[part] += change
        moved = fidelity.outcome(mask.replace(reach=reach.tolist()), seed).double()
        columns.append(((moved - base) / change * weight).flatten())
    jacobian = torch.stack(columns, dim=1)
    curvature, slope = jacobian.T @ jacobian, jacobian.T @ (error * weight).flatten()
    rows: list[list[float]] = torch.cat([curvature, slope[:, None]], dim=1).tolist()
    return rows
