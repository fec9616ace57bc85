"""How far *linear* reaches at each step, fitted to samples.

Near where it is, what a sampler comes to under a mask is a linear function of the reach of each step. Its slopes are
differences of whole masked passes, through the specialised graphs: no step is differentiated through another. One system of
equations then gives the reach of all steps at once, for errors of neighbouring steps add up or cancel (Levenberg 1944: least
squares, damped towards a reach of 1). Every outcome counts by its relative error, as in decibels. A factor a step is no more
than samples can tell apart, so that what is gained on them is gained on other noise too.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from maskcompile.learning.fidelity import Fidelity, better
from maskcompile.learning.search import Evaluations, Found
from maskcompile.mask import MOST_REACH, Mask
from passes.plan import plan_run

#: Slopes are differences over this much of a reach.
STEP = 0.1
ROUNDS = 2
#: Weights of staying at 1, relative to the mean curvature, and shares of the way to the solution, that are tried.
DAMPING = (0.01, 0.1)
LENGTHS = (1.0, 0.5)


def reaching(mask: Mask, evaluate: Evaluations) -> list[int]:
    """The steps at which something is extrapolated."""
    plans = plan_run(evaluate.shares.slots, mask.blocks, mask.compute, mask.rules)
    return [step for step, plan in enumerate(plans) if plan.coefficients]


def work(mask: Mask, evaluate: Evaluations) -> float:
    """What fitting costs at most, in unmasked passes."""
    steps = len(reaching(mask, evaluate))
    passes = ROUNDS * (1 + steps + len(DAMPING) * len(LENGTHS)) if steps else 0
    return passes * evaluate.shares(mask.compute, mask.reuse)


def fit(found: Found, evaluate: Evaluations) -> Found:
    """The mask with the reach of its steps fitted; as it was where nothing is extrapolated, or nothing gained."""
    steps = reaching(found.mask, evaluate)
    best = Found(found.mask.replace(reach=found.mask.reach or [1.0] * found.mask.steps), found.decibels)
    for _ in range(ROUNDS if steps else 0):
        curvature, slope = _equations(best.mask, steps, evaluate)
        scale = np.trace(curvature) / len(steps)
        if not (np.isfinite(curvature).all() and np.isfinite(slope).all() and scale > 0):
            break
        now = np.asarray(best.mask.reach)
        tried = []
        for damping in DAMPING:
            held = damping * scale * np.eye(len(steps))
            change = np.linalg.solve(curvature + held, -slope - held @ (now[steps] - 1))
            for length in LENGTHS:
                reach = now.copy()
                reach[steps] = np.clip(now[steps] + length * change, 0.0, MOST_REACH)
                mask = best.mask.replace(reach=np.round(reach, 3).tolist())
                tried.append(Found(mask, evaluate(mask)))
        top = max(tried, key=lambda one: float(one.decibels.mean()))
        if not better(top.decibels, best.decibels):
            break
        best = top
        evaluate.show(best)
    return best if best.decibels is not found.decibels else found


def _equations(mask: Mask, steps: list[int], evaluate: Evaluations) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss-Newton's (curvature [steps, steps], slope [steps]) of half the sum of squared relative errors of all outcomes."""
    fidelity, memo = evaluate.fidelity, evaluate.memo
    key = "reach " + evaluate.key(mask, fidelity.seeds)
    if key not in memo:
        own = {seed: _of_seed(fidelity, mask, steps, seed) for seed in fidelity.processes.mine(fidelity.seeds)}
        every = fidelity.processes.gather(own)
        memo[key] = np.sum([every[seed] for seed in fidelity.seeds], axis=0).tolist()
    evaluate.spend((1 + len(steps)) * evaluate.shares(mask.compute, mask.reuse))
    both = np.asarray(memo[key], dtype=np.float64)
    return both[:, :-1], both[:, -1]


def _of_seed(fidelity: Fidelity, mask: Mask, steps: list[int], seed: int) -> list[list[float]]:
    """The equations of one seed: a row for each of the steps, the slope last."""
    assert mask.reach is not None
    base = fidelity.outcome(mask, seed).double()
    error = base - fidelity.references[seed].double()
    weight = 1 / error.norm(dim=1, keepdim=True).clamp_min(1e-12)
    columns = []
    for step in steps:
        reach = list(mask.reach)
        change = STEP if reach[step] + STEP <= MOST_REACH else -STEP
        reach[step] += change
        moved = fidelity.outcome(mask.replace(reach=reach), seed).double()
        columns.append(((moved - base) / change * weight).flatten())
    jacobian = torch.stack(columns, dim=1)
    curvature, slope = jacobian.T @ jacobian, jacobian.T @ (error * weight).flatten()
    rows: list[list[float]] = torch.cat([curvature, slope[:, None]], dim=1).tolist()
    return rows
