"""Which call belongs to which run.

The timestep of a call says which row of the mask applies. A later step than the last one goes on with the run; an earlier
one, or one out of another scheduler tensor, starts a new run. The same timestep again is another trajectory beside the first
(a separate pass for guidance, the second call of a 2nd-order solver), with a cache of its own, or the start of another run
after one that stopped there; which of the two shows only at the next steps. So trajectories go on only where the last two
steps had equally many calls (the first step of a run: one call), and else start over with an empty cache: what they lack is
computed. So does a run that skips steps, changes its input shapes, or was not at the step before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskcompile.mask import Mask
from passes.rectify import Version

#: Trajectories at one timestep before further calls are taken for new runs (somebody timing one step in a loop).
MOST_TRAJECTORIES = 8


@dataclass(frozen=True)
class Where:
    """Where in the mask a call is.

    step: None for a timestep that the mask does not know. order: grows along a run. value: the timestep as given, NaN for a
    batch of different ones. source: the scheduler tensor that it is an element of.
    """

    step: int | None
    order: float
    value: float
    source: torch.UntypedStorage | None


@dataclass(frozen=True)
class Trajectory:
    """A trajectory after its last call.

    key: of the capture. start, leading: which schedule it follows (its first step, and whether a full step comes before).
    position: plans of the schedule executed so far. next_step: the mask's step that continues it. cache: the steps of its
    versions are positions.
    """

    key: tuple[Any, ...]
    start: int
    leading: bool
    position: int
    next_step: int
    cache: dict[Version, Tensor]


@dataclass(frozen=True)
class Runs:
    """The runs in progress. calls: so far at the last timestep. expected: numbers of calls that let trajectories go on."""

    last: Where | None = None
    calls: int = 0
    expected: tuple[int, ...] = (1,)
    trajectories: tuple[Trajectory, ...] = field(default=())


def locate(mask: Mask, timestep: Tensor, last: Where | None) -> Where:
    """Find a call's step. timestep: a tensor of one value, or of as many as the batch has.

    A timestep matches the nearest one of the mask within the rounding of its dtype (pipelines scale and cast timesteps).
    """
    source = _scheduler_storage(timestep)
    values = timestep.reshape(-1)
    if values.numel() > 1 and not bool((values == values[0]).all()):
        return Where(None, float("inf"), float("nan"), source)
    value = float(values[0].item())
    if last is not None and value == last.value:
        return replace(last, source=source)
    known = np.asarray(mask.timesteps, dtype=np.float64)
    step = int(np.abs(known - value).argmin())
    tolerance = torch.finfo(timestep.dtype).eps * abs(value) if timestep.is_floating_point() else 0.0
    if abs(known[step] - value) <= tolerance:
        return Where(step, sampling_order(mask, mask.timesteps[step]), value, source)
    return Where(None, sampling_order(mask, value), value, source)


def sampling_order(mask: Mask, timestep: float) -> float:
    """Grows along a run: minus the timestep for a mask whose timesteps fall."""
    rising = mask.steps > 1 and mask.timesteps[1] > mask.timesteps[0]
    return timestep if rising else -timestep


def advance(runs: Runs, where: Where) -> Runs:
    """The runs as a call at ``where`` finds them: trajectories that cannot go on are gone."""
    if runs.last is None or where.order < runs.last.order or _other_scheduler(runs.last.source, where.source):
        return Runs(where)
    if where.order == runs.last.order:
        # After an overflow the next step cannot know whose cache is whose: nothing is expected, so all start over there.
        return Runs(where, expected=()) if runs.calls >= MOST_TRAJECTORIES else replace(runs, last=where)
    if runs.calls in runs.expected:
        return Runs(where, 0, (runs.calls,), runs.trajectories[: runs.calls])
    # When all start over, a single call at this step is unmistakable, as it is at the start of a run.
    return Runs(where, 0, (runs.calls, 1))


def current(runs: Runs, key: tuple[Any, ...]) -> Trajectory | None:
    """The trajectory that the call at ``runs.last`` with this capture key goes on with, None where it starts over."""
    assert runs.last is not None
    found = runs.trajectories[runs.calls] if runs.calls < len(runs.trajectories) else None
    if found is None or runs.last.step is None or found.next_step != runs.last.step or found.key != key:
        return None
    return found


def commit(runs: Runs, trajectory: Trajectory) -> Runs:
    """The runs after the call, which moved its trajectory on to ``trajectory``."""
    before, after = runs.trajectories[: runs.calls], runs.trajectories[runs.calls + 1 :]
    return replace(runs, calls=runs.calls + 1, trajectories=(*before, trajectory, *after))


def _other_scheduler(last: torch.UntypedStorage | None, now: torch.UntypedStorage | None) -> bool:
    return last is not None and now is not None and last.data_ptr() != now.data_ptr()


def _scheduler_storage(timestep: Tensor) -> torch.UntypedStorage | None:
    """The memory of the tensor of timesteps that ``timestep`` is one element of, None where it is not.

    ``for t in scheduler.timesteps`` yields views, and ``set_timesteps`` makes a new tensor for every run of a pipeline. An
    element of a batch that repeats one timestep is told from it by its neighbour.
    """
    if any(timestep.stride()):
        return None
    storage = timestep.untyped_storage()
    if storage.nbytes() < 2 * timestep.element_size():
        return None
    first, second = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage)[:2].tolist()
    return storage if first != second else None
