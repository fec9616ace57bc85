"""Which call belongs to which run.

The timestep of a call says which row of the mask applies. A later step than the last one goes on with the run; an earlier
one, or one out of another scheduler tensor, starts a new run. The same timestep again is another trajectory beside the first
(a separate pass for guidance, the second call of a 2nd-order solver), with a cache of its own, or the start of another run
after one that stopped there; which of the two shows only at the next steps. So trajectories go on only where the last two
steps had equally many calls (the first step of a run: one call), and else start over with an empty cache: what they lack is
computed. So does a run that changes its input shapes or its conditioning (see ``maskcompile.conditioning``), was not at the
step before, or skips steps of the mask; but where the timesteps are elements of a scheduler's tensor, that says beforehand
which steps a run takes, and it may leave some out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskcompile.conditioning import Conditioning
from maskcompile.fallback import ModuleRun
from maskcompile.mask import Mask
from maskcompile.replay import Lease
from maskcompile.signature import Key
from maskcompile.steps import Schedule

#: Steps of the mask in the order of a run, rising. The first may be None: one that the mask does not know.
Course = tuple[int | None, ...]

#: Trajectories at one timestep before further calls are taken for new runs (somebody timing one step in a loop).
MOST_TRAJECTORIES = 8

#: Timesteps of a scheduler's tensor that are read at once; a longer one is no scheduler's.
MOST_TIMESTEPS = 10_000


@dataclass(frozen=True)
class Source:
    """A scheduler's tensor of timesteps: its memory, and where that is.

    values: on a CPU, that memory itself as numpy sees it, None for dtypes that numpy does not have. On other devices a copy,
    read once a run: to read timesteps one by one would wait each time for all that is queued there. version: of the copy;
    torch counts changes in place, but under ``torch.inference_mode``, where it is None and the tensor is trusted to stay.
    """

    storage: torch.UntypedStorage
    pointer: int
    version: int | None
    values: NDArray[Any] | None


class Where(NamedTuple):
    """Where in the mask a call is.

    step: None for a timestep that the mask does not know. order: grows along a run. value: the timestep as given, NaN for a
    batch of different ones. source: the scheduler's tensor that it is an element of.
    """

    step: int | None
    order: float
    value: float
    source: Source | None


class Trajectory(NamedTuple):
    """A trajectory after its last call.

    key: of the capture. schedule: that it follows, None in a rehearsal. course: see ``Course``, one step a plan. source: the
    memory of the scheduler's tensor that says so, where it leaves steps out. position: plans executed so far. cache: see
    ``maskcompile.steps`` and ``maskcompile.fallback``; empty for a run with a ``lease`` on memory of its own.
    """

    key: Key
    schedule: Schedule | ModuleRun | None
    course: Sequence[int | None]
    conditioning: Conditioning
    source: int | None = None
    position: int = 0
    cache: tuple[Any, ...] = ()
    lease: Lease | None = None

    @property
    def next_step(self) -> int | None:
        """The mask's step that continues it."""
        return None if self.finished else self.course[self.position]

    @property
    def finished(self) -> bool:
        """Whether it has come to its last step."""
        return self.position >= len(self.course)

    def moved(self, tensors: Sequence[Tensor], cache: tuple[Any, ...]) -> Trajectory:
        """It after a call with these tensors."""
        conditioning = self.conditioning.after(tensors) if self.position else self.conditioning
        return self._replace(position=self.position + 1, cache=cache, conditioning=conditioning)

    def skips(self, step: int) -> bool:
        """Whether the mask has steps between the last one taken and this one."""
        last = self.course[self.position - 1]
        due = self.next_step if last is None else last + 1
        return due is not None and due < step


class Runs(NamedTuple):
    """The runs in progress.

    calls: so far at the last timestep. expected: numbers of calls that let trajectories go on. now, seen: what the calls at the
    last timestep, and at the one before it, were given, which tells trajectories that start over apart, too.
    """

    last: Where | None = None
    calls: int = 0
    expected: tuple[int, ...] = (1,)
    trajectories: tuple[Trajectory, ...] = ()
    now: tuple[Conditioning, ...] = ()
    seen: tuple[Conditioning, ...] = ()


class Clock:
    """Finds the step of a timestep.

    known: the timesteps of the mask. exact: the step of each. rising: whether they rise along a run, as in inversion.
    """

    def __init__(self, mask: Mask) -> None:
        self.known = np.asarray(mask.timesteps, dtype=np.float64)
        self.exact = {timestep: step for step, timestep in reversed(list(enumerate(mask.timesteps)))}
        self.rising = mask.steps > 1 and mask.timesteps[1] > mask.timesteps[0]

    def order(self, timestep: float) -> float:
        """Grows along a run."""
        return timestep if self.rising else -timestep

    def following(self, order: float) -> int:
        """The first step of the mask that does not come before this order."""
        return int((self.known if self.rising else -self.known).searchsorted(order))

    def step(self, value: float, tolerance: float) -> int | None:
        """The nearest step within a tolerance relative to the value, None where there is none."""
        step = self.exact.get(value)
        if step is None:
            step = int(np.abs(self.known - value).argmin())
            if not abs(self.known[step] - value) <= tolerance * abs(value):
                return None
        return step


def locate(clock: Clock, timestep: Tensor, last: Where | None) -> Where:
    """Find a call's step. timestep: a tensor of one value, or of as many as the batch has.

    A timestep matches the nearest one of the mask within the rounding of its dtype (pipelines scale and cast timesteps).
    """
    if not timestep.numel():
        raise ValueError("the denoiser was called with an empty tensor for its timestep.")
    source = _source(timestep, last.source if last is not None else None)
    if source is not None and source.values is not None:
        value = float(source.values[timestep.storage_offset()])
    elif timestep.numel() == 1:
        value = float(timestep.item())
    else:
        first, *others = timestep.reshape(-1).tolist()
        if any(other != first for other in others):
            return Where(None, float("inf"), float("nan"), None)
        value = float(first)
    if last is not None and value == last.value:
        return Where(last.step, last.order, value, source)
    step = clock.step(value, rounding(timestep))
    return Where(step, clock.order(value if step is None else float(clock.known[step])), value, source)


def course_of(clock: Clock, where: Where, timestep: Tensor) -> Course:
    """The steps of the mask that a run takes which begins at ``where``.

    Those of the scheduler's tensor where it names steps of the mask alone, in their order, and leaves some out in between. Else
    all from there on, and None before them where the mask does not know the first timestep.
    """
    if where.step is None:
        return None, *range(clock.following(where.order), len(clock.known))
    onwards = tuple(range(where.step, len(clock.known)))
    if where.source is None or where.source.values is None:
        return onwards
    named: list[int] = []
    for value in where.source.values.tolist():
        step = clock.step(value, rounding(timestep))
        if step is None:
            return onwards
        if not named or step != named[-1]:  # a 2nd-order solver's tensor has its timesteps twice
            named.append(step)
    if where.step not in named or any(after < before for before, after in pairwise(named)):
        return onwards
    taken = tuple(named[named.index(where.step) :])
    return taken if leaves_out(taken) else onwards


def leaves_out(course: Course) -> bool:
    """Whether the mask has steps between those of a course."""
    return any(before is not None and step != before + 1 for before, step in pairwise(course))


def rounding(timestep: Tensor) -> float:
    """The rounding of its dtype, relative."""
    return torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0


def advance(runs: Runs, where: Where) -> Runs:
    """The runs as a call at ``where`` finds them: trajectories that cannot go on are gone."""
    if runs.last is None or where.order < runs.last.order or _other_scheduler(runs.last.source, where.source):
        return Runs(where)
    if where.order == runs.last.order:
        # After an overflow the next step cannot know whose cache is whose: nothing is expected, so all start over there.
        return Runs(where, expected=()) if runs.calls >= MOST_TRAJECTORIES else runs._replace(last=where)
    if runs.calls in runs.expected:
        return Runs(where, 0, (runs.calls,), runs.trajectories[: runs.calls], (), runs.now)
    # When all start over, a single call at this step is unmistakable, as it is at the start of a run.
    return Runs(where, 0, (runs.calls, 1), (), (), runs.now)


def current(runs: Runs, key: Key, tensors: Sequence[Tensor]) -> Trajectory | None:
    """The trajectory that the call at ``runs.last`` of this capture key goes on with, None where it starts over."""
    assert runs.last is not None
    found = runs.trajectories[runs.calls] if runs.calls < len(runs.trajectories) else None
    if found is None or runs.last.step is None or found.next_step != runs.last.step or found.key != key:
        return None
    if found.lease is not None and found.lease.lost:
        return None
    if found.source is not None and (runs.last.source is None or runs.last.source.pointer != found.source):
        return None
    return found if found.conditioning.fits(tensors) else None


def commit(runs: Runs, trajectory: Trajectory) -> Runs:
    """The runs after the call, which moved its trajectory on to ``trajectory``."""
    before, after = runs.trajectories[: runs.calls], runs.trajectories[runs.calls + 1 :]
    now = (*runs.now, trajectory.conditioning)
    return Runs(runs.last, runs.calls + 1, runs.expected, (*before, trajectory, *after), now, runs.seen)


def failed(runs: Runs, where: Where) -> Runs:
    """The runs after a call at ``where`` that raised an error.

    It may be made again, or the whole step with it: where the step has had calls before, which is which cannot be known.
    """
    if runs.last is None or where.order != runs.last.order:
        return runs
    return runs._replace(expected=(), trajectories=())


def _other_scheduler(last: Source | None, now: Source | None) -> bool:
    return last is not None and now is not None and last.pointer != now.pointer


def _source(timestep: Tensor, last: Source | None) -> Source | None:
    """The scheduler's tensor of timesteps that ``timestep`` is one element of, None where it is not.

    ``for t in scheduler.timesteps`` yields views, and ``set_timesteps`` makes a new tensor for every run of a pipeline. An
    element of a batch that repeats one timestep is told from it by its neighbour. The last one is held on to, so that no other
    is in its place.
    """
    if timestep.dim() and any(stride for stride, size in zip(timestep.stride(), timestep.shape, strict=True) if size > 1):
        return None
    storage = timestep.untyped_storage()
    version = None if timestep.is_cpu or timestep.is_inference() else timestep._version
    if last is not None and storage.data_ptr() == last.pointer and version == last.version:
        return last
    if not 2 <= storage.nbytes() // timestep.element_size() <= MOST_TIMESTEPS:
        return None
    whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage)
    first, second = whole[:2].tolist()
    if first == second:
        return None
    numeric = timestep.dtype is not torch.bfloat16
    values = whole.numpy() if timestep.is_cpu and numeric else None if timestep.is_cpu else np.asarray(whole.tolist())
    return Source(storage, storage.data_ptr(), version, values)
