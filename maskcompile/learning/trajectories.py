"""Which calls of a sampling pass go on with which, as they will under a mask: see ``maskcompile.runs``."""

from __future__ import annotations

import sys

from torch import nn

from maskcompile.conditioning import Conditioning
from maskcompile.runs import Runs, Trajectory, Where, advance, commit, current
from maskcompile.signature import Call
from passes.capture import first_parameter


def rehearse(runs: Runs, model: nn.Module, call: Call, step: int) -> tuple[Runs, int]:
    """The runs after a call at a step of the mask, and the step at which its trajectory began: there it computes all it needs.

    call: with the very tensors that the denoiser is given. Trajectories are told apart by where those lie, which copies of them
    do not tell.
    """
    runs = advance(runs, Where(step, float(step), float("nan"), None))
    trajectory = current(runs, call.key, call.given)
    if trajectory is None:
        sample = first_parameter(model, call.args, call.kwargs)
        places = [place for place, t in enumerate(call.given) if place != sample and t is not call.timestep]
        onwards = range(step, sys.maxsize)  # how many steps there are, the end of the pass tells
        trajectory = Trajectory(call.key, None, onwards, Conditioning.first(call.given, places, runs.seen))
    begun = trajectory.course[0]
    assert begun is not None  # the mask has every step
    return commit(runs, trajectory.moved(call.given, ())), begun
