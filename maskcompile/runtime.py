"""The optimised denoiser: plans each call's step, keeps the cache of each run, and executes the specialised graphs.

``maskcompile.runs`` decides which call belongs to which run. A timestep that the mask does not know computes everything and
stores what the next steps of the mask reuse. Nothing of a run's state changes before a call has succeeded.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from maskcompile.artefacts import save_artefacts
from maskcompile.captures import MAKING, capture_once, saved_captures, unexplained
from maskcompile.compile import Backend, saved_regions
from maskcompile.conditioning import Conditioning
from maskcompile.dropin import DropIn
from maskcompile.fallback import ModuleRun, ModuleStep, Uncaptured
from maskcompile.fingerprint import Fingerprint, Place, changes, dotted, fingerprint
from maskcompile.graphs import SignatureGraphs
from maskcompile.mask import Mask, check_blocks, check_mask
from maskcompile.replay import MOST_ARENAS, Arena, Lease, LeaseLost, addresses, obstacle
from maskcompile.report import Report, SignatureReport
from maskcompile.runs import (
    MOST_TRAJECTORIES,
    Clock,
    Course,
    Runs,
    Trajectory,
    Where,
    advance,
    commit,
    course_of,
    current,
    failed,
    leaves_out,
    locate,
)
from maskcompile.signature import (
    Binder,
    Bound,
    Call,
    Key,
    check_autocast,
    check_capturable,
    check_runnable,
    describe,
    double_batch,
    find_hook,
    other_batch,
    timestep_name,
)
from maskcompile.steps import Schedule, Step
from passes.buffers import share_buffers
from passes.capture import CaptureError, Slot, check_call, composite_modules, first_parameter, resized, sizes_of
from passes.dependencies import Slots, slot_dependencies
from passes.merge import merge_rows, plan_merged
from passes.plan import GraphKey, plan_run, share_graphs
from passes.rectify import rectify
from passes.regions import divisible
from passes.reuse import Rules

CudaGraphs = bool | Literal["auto"]

#: Runs of different steps (where they start, which of the mask's they take) whose plans are kept, for each capture.
MOST_SCHEDULES = 64

#: Scheduler tensors whose last calling thread is remembered.
MOST_CALLERS = 64


@dataclass
class _Counts:
    """For the report. calls: since the mask was set. reusing: those that reused any block. unknown, skipped: see ``Report``.

    alone: steps one after another that each started over where the mask reuses blocks.
    """

    calls: int = 0
    reusing: int = 0
    unknown: int = 0
    skipped: int = 0
    alone: int = 0


class _OtherBlocks(CaptureError):
    """The graph cannot reuse a block of the mask."""


class _Trajectories:
    """The runs in progress of one thread."""

    def __init__(self) -> None:
        self.runs = Runs()


class _Threads(threading.local):
    """In each thread its own runs, for no two threads are in one run."""

    def __init__(self, in_progress: weakref.WeakSet[_Trajectories]) -> None:
        self.own = _Trajectories()
        in_progress.add(self.own)


class OptimizedDenoiser(DropIn):
    """Drop-in for ``original`` that executes a mask; made by ``maskcompile.optimize``.

    It has the parameters, buffers and submodules of the original (the same objects, under the same names), its forward
    signature and return type, and passes every other attribute through to it. Inference only: results carry no gradients.
    """

    def __init__(
        self,
        original: nn.Module,
        mask: Mask,
        *,
        backend: Backend,
        timestep: str | None,
        regions: bool,
        max_graphs: int | None,
        cuda_graphs: CudaGraphs,
        dynamic: bool | None,
        max_captures: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(original)
        signature = inspect.signature(original.forward)
        name = timestep or timestep_name(signature)
        if name is None or name not in signature.parameters:
            raise ValueError(
                f"{type(original).__name__}.forward{signature} has no parameter "
                f"{repr(timestep) if timestep else 'with a usual name for the timestep'}; "
                "pass optimize(..., timestep='its name')."
            )
        self._backend = backend
        self._regions = regions
        self._max_graphs = max_graphs
        self._cuda_graphs = cuda_graphs
        self._dynamic = dynamic
        self._max_captures = max_captures
        self._options = dict(options)
        self._timestep = name
        self._bind = Binder(original, signature, name)
        self._captures: dict[Key, SignatureGraphs] = {}
        self._arenas: list[Arena] = []
        self._uncaptured: dict[Key, Uncaptured] = {}
        self._warned_uncaptured = self._warned_again = False
        self._marked: set[str] = set()
        self._fingerprint: Fingerprint = {}
        self._volatile: set[Place] = set()
        self._unnoted: set[Key] = set()
        self._why: set[Place] = set()
        self.forward = self._make_forward()
        self.set_mask(mask)
        self._complete = True

    # ---- masks and runs -------------------------------------------------------------------------------------------------

    @property
    def mask(self) -> Mask:
        return self._mask

    def set_mask(self, mask: Mask) -> None:
        """Run another mask from now on, keeping captures and compiled graphs that it shares with the last one.

        Raises MaskError when the mask does not fit the denoiser; the old mask then stays.
        """
        check_mask(mask, self.original)
        with self._lock:
            marked = {*composite_modules(self.original), *self._marked}
            if not marked.issuperset(mask.blocks):  # a leaf module, which captures so far did not mark
                self._captures.clear()
                self._marked = marked | set(mask.blocks)
            for key in [key for key, made in self._captures.items() if made.capture.cannot_reuse.intersection(mask.blocks)]:
                del self._captures[key]
            for key in [key for key, found in self._uncaptured.items() if found.of_mask]:
                del self._uncaptured[key]
            self._mask = mask
            self._clock = Clock(mask)
            self._schedules: dict[tuple[Key, Course], Schedule] = {}
            self._drop_arenas()
            self._slots: dict[Key, Slots] = {}
            self._merged: dict[Key, tuple[NDArray[np.bool_], Rules]] = {}
            self._shared: dict[Key, dict[GraphKey, GraphKey]] = {}
            self._recaptures = 0
            self._forget_runs()
            self._not_replayed: str | None = None
            self._counts = _Counts()

    def forget_graphs(self, most: int) -> None:
        """Let go of the specialised graphs of a capture that has made more than ``most``; they are made again when needed."""
        with self._lock:
            for captured in self._captures.values():
                if len(captured.graphs) > most:
                    captured.forget()
                    self._schedules.clear()
                    self._drop_arenas()

    def reset(self) -> None:
        """Forget the runs in progress, in all threads; the next call starts a new one."""
        with self._lock:
            self._forget_runs()

    def _forget_runs(self) -> None:
        for arena in self._arenas:
            arena.lease = None
        self._callers: dict[int | None, int] = {}
        self._in_progress: weakref.WeakSet[_Trajectories] = weakref.WeakSet()
        self._threads = _Threads(self._in_progress)

    def _drop_arenas(self, schedule: Schedule | None = None) -> None:
        """Let go of the arenas, or those of a schedule. Without their leases, for these refer to each other."""
        for arena in list(self._arenas):
            if schedule is None or arena.schedule is schedule:
                arena.lease = None
                self._arenas.remove(arena)

    def _make_forward(self) -> Callable[..., Any]:
        @functools.wraps(self.original.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(args, kwargs)

        return forward

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.original.training:
            raise ValueError(f"{type(self.original).__name__} is in train mode; call .eval() on the denoiser first.")
        check_autocast()
        call = self._bind(args, kwargs)
        if call.timestep is None:
            raise ValueError(f"the denoiser was called without a tensor or number for {self._timestep!r}.")
        if not torch.is_grad_enabled():
            return self._execute(call, call.timestep, args, kwargs)
        if any(tensor.requires_grad for tensor in call.tensors):
            raise ValueError(
                "an optimised denoiser computes no gradients; call the original, or pass inputs without requires_grad."
            )
        with torch.no_grad():
            return self._execute(call, call.timestep, args, kwargs)

    def _execute(self, call: Bound, timestep: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        while True:
            try:
                return self._try_execute(call, timestep, args, kwargs)
            except LeaseLost:  # to another thread, since it was looked for; the run starts over
                continue
            except BaseException:
                own = self._threads.own
                with contextlib.suppress(Exception):  # the timestep or its device may be what is wrong
                    own.runs = failed(own.runs, locate(self._clock, timestep, own.runs.last))
                raise

    def _try_execute(self, call: Bound, timestep: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            own = self._threads.own
            where = locate(self._clock, timestep, own.runs.last)
            before = own.runs if self._may_go_on(where) else Runs()
            runs = advance(before, where)
            trajectory = current(runs, call.key, call.given)
            if trajectory is None:
                with MAKING:
                    if self._check_weights():
                        own, runs = self._threads.own, advance(Runs(), where)
                    if call.key not in self._captures and call.key not in self._uncaptured:
                        self._try_capture(self._bind.bind(args, kwargs))
                    trajectory = self._begin(call, timestep, where, runs)
        try:
            step, outputs, cache = self._step(trajectory, call.tensors)
            self._count(runs, where, step.reuses, trajectory)
            own.runs = commit(runs, trajectory.moved(call.given, cache))
        except BaseException:
            if trajectory.lease is not None:  # what the run needs may be overwritten
                trajectory.lease.end()
            raise
        if trajectory.lease is not None:
            trajectory.lease.committed = True
        assert trajectory.schedule is not None
        return trajectory.schedule.assemble(outputs[: step.graph.results])

    def _step(
        self, trajectory: Trajectory, inputs: tuple[Tensor, ...]
    ) -> tuple[Step | ModuleStep, Sequence[Tensor], tuple[Any, ...]]:
        """(the step that a trajectory is at, the outputs of its graph, the cache after it)"""
        schedule, lease, position = trajectory.schedule, trajectory.lease, trajectory.position
        assert schedule is not None
        step = schedule.steps.get(position)
        if step is None or not step.graph.called or (lease is not None and position not in lease.arena.ready):
            with self._lock, MAKING:  # the first call of a graph compiles, and recording must be alone
                step = schedule.step(position)
                if lease is not None:
                    return step, lease.prepare(position, inputs), ()
                if isinstance(step, ModuleStep) and trajectory.key in self._unnoted:
                    return step, *self._noted(trajectory, step, inputs)
                return step, *step(inputs, trajectory.cache)
        if lease is not None:
            return step, lease.replay(position, inputs), ()
        return step, *step(inputs, trajectory.cache)

    def _noted(
        self, trajectory: Trajectory, step: ModuleStep, inputs: tuple[Tensor, ...]
    ) -> tuple[Sequence[Tensor], tuple[Any, ...]]:
        """A step of the first run of a denoiser that could not be captured. Its forward runs at every step, and may change more
        of the attributes that it changes here."""
        before = fingerprint(self.original)
        result = step(inputs, trajectory.cache)
        self._volatile |= {place[:2] for place in changes(before, fingerprint(self.original))}
        if trajectory.position + 1 >= len(trajectory.course):
            self._unnoted.discard(trajectory.key)
        return result

    def _may_go_on(self, where: Where) -> bool:
        """Whether a run of this thread can be the one that the call belongs to.

        Not if another thread has called since with the same scheduler's tensor, or likewise without one: a run that moves from
        thread to thread looks like several. It starts over with every move then, and computes what it lacks.
        """
        source = None if where.source is None else where.source.pointer
        thread = threading.get_ident()
        last = self._callers.pop(source, thread)
        self._callers[source] = thread
        if len(self._callers) > MOST_CALLERS:
            del self._callers[next(iter(self._callers))]
        return last == thread

    def _begin(self, call: Bound, timestep: Tensor, where: Where, runs: Runs) -> Trajectory:
        """A trajectory that starts at this call, with nothing in its cache. runs: of this thread, as they are then."""
        self._use(call.key)
        conditioning = Conditioning.first(call.given, self._conditioning(call), runs.seen)
        course = course_of(self._clock, where, timestep)
        source = where.source.pointer if where.source is not None and leaves_out(course) else None
        if call.key in self._uncaptured:
            return Trajectory(call.key, self._module_run(call.key, course), course, conditioning, source)
        schedule = self._schedule(call.key, course)
        return Trajectory(call.key, schedule, course, conditioning, source, lease=self._lease(call, schedule, runs))

    def _conditioning(self, call: Bound) -> list[int]:
        """Which tensors of a call tell trajectories apart: all but the sample and the timestep."""
        if call.key in self._uncaptured:
            sample = first_parameter(self.original, *self._uncaptured[call.key].arguments(call.tensors))
        else:
            capture = self._captures[call.key].capture
            sample = capture.inputs.index(capture.sample)
        return [place for place, t in enumerate(call.given) if place != sample and t is not call.timestep]

    def _lease(self, call: Bound, schedule: Schedule, runs: Runs) -> Lease | None:
        """Memory to replay a run on; None where nothing is replayed, or as many runs as can be are in progress."""
        if not self._cuda_graphs:
            return None
        if (reason := obstacle(call.tensors)) is not None:
            if self._cuda_graphs is True:
                raise ValueError(f"{reason}. Move the denoiser and its inputs there, or pass cuda_graphs=False.")
            if any(tensor.is_cuda for tensor in call.tensors):
                self._not_replayed = reason
            return None
        weights = addresses((*self.original.parameters(), *self.original.buffers()))
        for moved in [arena for arena in self._arenas if arena.weights != weights]:
            self._drop_arenas(moved.schedule)
        going = [runs, *(other.runs for other in self._in_progress if other is not self._threads.own)]
        busy = {t.lease for each in going for t in each.trajectories if t.lease is not None and not t.finished}
        free = [arena for arena in self._arenas if arena.lease is None or (arena.lease.committed and arena.lease not in busy)]
        arena = next((arena for arena in free if arena.schedule is schedule), None)
        if arena is None:
            if len(self._arenas) >= MOST_ARENAS:
                if not free:
                    return None
                free[0].lease = None
                self._arenas.remove(free[0])
            buffers = share_buffers(schedule.plans, self._slots[call.key].size)
            like = self._captures[call.key].like
            arena = Arena(schedule, call.tensors, buffers, like, weights, strict=self._cuda_graphs is True)
        else:
            self._arenas.remove(arena)
        self._arenas.append(arena)  # the least recently begun first
        if arena.failure is not None:
            if arena.strict:
                raise RuntimeError(f"a step cannot be recorded as a CUDA graph: {arena.failure}; pass cuda_graphs=False.")
            return None
        return arena.take()

    def _use(self, key: Key) -> None:
        """Let go of the captures that were used least recently, where there are more than may be. Runs go on with theirs."""
        for known in (self._captures, self._uncaptured):
            if key in known:
                known[key] = known.pop(key)  # type: ignore[assignment]
            while len(known) > self._max_captures:
                old = next(iter(known))
                del known[old]
                self._slots.pop(old, None)
                for entry in [entry for entry in self._schedules if entry[0] == old]:
                    self._drop_arenas(self._schedules.pop(entry))
        origins = {captured.origin for captured in self._captures.values()}
        for made in (self._merged, self._shared):
            for old in [old for old in made if old not in origins]:
                del made[old]  # type: ignore[attr-defined]

    def _count(self, runs: Runs, where: Where, reuses: bool, trajectory: Trajectory) -> None:
        """Keep the figures of the report, and warn once of each thing that makes a mask do nothing.

        trajectory: of the call, before it.
        """
        went_on = trajectory.position > 0
        with self._lock:
            counts = self._counts
            counts.calls += 1
            counts.reusing += reuses
        if went_on or len(trajectory.course) > 1:  # the last step of the mask may well be a run of its own
            self._count_alone(runs, where, went_on)
        if where.step is None:
            counts.unknown += 1
            if counts.unknown + counts.skipped == 1:
                steps = self._mask.timesteps
                what = "a batch with different timesteps" if np.isnan(where.value) else f"timestep {where.value:g}"
                _warn(
                    f"the mask ({len(steps)} steps, {steps[0]:g} to {steps[-1]:g}) does not know {what}; such calls compute "
                    "every block. Use the scheduler and number of steps that the mask was made for, or "
                    "fast.set_mask(mask.resample(timesteps)) with the timesteps that the denoiser is called with."
                )
        elif runs.calls < len(runs.trajectories) and runs.trajectories[runs.calls].skips(where.step):
            counts.skipped += 1
            if counts.unknown + counts.skipped == 1:
                before = runs.trajectories[runs.calls]
                more = "the mask computes between the two" if went_on else "it needs"
                _warn(
                    f"this run skips from step {before.course[before.position - 1]} of the mask to step {where.step}; a step "
                    f"after a skip computes all that {more}. "
                    "Make the mask for the timesteps of the run, or call fast.set_mask(mask.resample(timesteps)) with the "
                    "timesteps that the denoiser is called with."
                )

    def _count_alone(self, runs: Runs, where: Where, went_on: bool) -> None:
        """Warn of a loop whose steps do not look like one run: as many in a row as the mask has started over."""
        counts = self._counts
        if went_on:
            counts.alone = 0
        elif where.step and not runs.calls and not self._mask.compute[where.step].all():
            counts.alone += 1
            if counts.alone == self._mask.steps:
                _warn(
                    f"the last {counts.alone} steps at which the mask reuses blocks each looked like another run, and computed "
                    "every block. Take timesteps from the scheduler's tensor itself (for t in scheduler.timesteps), make no "
                    f"more than {MOST_TRAJECTORIES} calls a step, and all calls of a run from one thread.",
                    deeper=1,
                )

    # ---- captures and graphs --------------------------------------------------------------------------------------------

    def _serving(self, call: Call) -> SignatureGraphs:
        """A capture for a call unlike those before: one for any batch, if it serves or can be made, or for this alone."""
        others = {key: batch for key in self._captures if (batch := other_batch(call.key, key)) is not None}
        related = [self._captures[key] for key in others]
        reason = None
        for captured in {found.origin: found for found in related if found.capture.sizes}.values():
            sizes = sizes_of(captured.capture, call.tensors)
            if sizes is None:
                continue
            try:
                if 1 in sizes.values():  # torch.export takes for granted that none is
                    check_call(captured.capture, self.original, call.args, call.kwargs)
                return captured.at_sizes(sizes, call)
            except Exception as error:  # of the graph, at a size of 1; what is wrong with the call itself shows below
                reason = (str(error) or type(error).__name__).splitlines()[0]
        batches = [*others.values(), *([double_batch(call.key)] if self._dynamic else [])]
        if reason is None and self._dynamic is not False and batches and not any(found.given_up for found in related):
            try:
                return self._capture(call, batches[0])
            except Exception as error:  # of torch, for sizes that are symbols; what is wrong with the call itself shows below
                reason = (str(error) or type(error).__name__).splitlines()[0]
        # A size of 1 says nothing about others, and one other call more about which dimensions are the batch.
        given_up = reason is not None and bool(others) and all(call.tensors[at].shape[0] > 1 for at in batches[0])
        return replace(self._capture(call), alone=reason, given_up=given_up)

    def _try_capture(self, call: Call) -> None:
        """Capture the denoiser, or note that its blocks have to be skipped module by module."""
        check_runnable(self.original)
        reason = hook = find_hook(self.original)
        of_mask = False
        if hook is None:
            try:
                self._captures[call.key] = self._serving(call)
            except CaptureError as error:
                reason, of_mask = str(error), isinstance(error, _OtherBlocks)
        if reason is not None:
            if not self._warned_uncaptured:
                reason = reason.rstrip(".")
                warnings.warn(
                    f"{reason}. Its blocks are skipped module by module, in eager PyTorch: nothing is compiled.", stacklevel=2
                )
            self._warned_uncaptured = True
            self._uncaptured[call.key] = Uncaptured.of(call, reason, hook is not None, of_mask)
            self._fingerprint = fingerprint(self.original)
            self._unnoted.add(call.key)

    def _capture(self, call: Call, batch: Mapping[int, int] | None = None) -> SignatureGraphs:
        check_capturable(self.original)
        start = time.perf_counter()
        try:
            made = capture_once(self.original, call, self._marked, batch)
        except (CaptureError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            weights = sorted({f"{str(p.dtype)[6:]} on {p.device}" for p in self.original.parameters()})
            raise RuntimeError(
                f"{type(self.original).__name__} (weights {', '.join(weights)}) does not run on these inputs "
                f"({describe(call)}): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        # What a forward itself changes (a counter, a table) says nothing about whether the capture still holds.
        self._fingerprint = fingerprint(self.original)
        self._volatile |= made.volatile
        if unsized := [block for block in self._mask.blocks if block in made.capture.unsized]:
            raise _OtherBlocks(
                f"{type(self.original).__name__} cannot be captured: the values of tensors decide on the shape or strides of "
                f"what {unsized[0]!r} returns."
            )
        check_blocks(made.capture, self._mask)
        found = SignatureGraphs(
            made.capture,
            call.key,
            describe(call),
            time.perf_counter() - start,
            self._backend,
            self._options,
            self._regions and divisible(made.capture),
        )
        if batch is None:
            return found
        sizes = sizes_of(made.capture, call.tensors)
        if sizes is None:
            raise CaptureError(f"{type(self.original).__name__} cannot be captured for any batch at {describe(call)}.")
        return found.at_sizes(sizes, call)

    def _check_weights(self) -> bool:
        """Forget captures (and say so) when weights, modules, hooks or settings were replaced since, not updated in place."""
        if any(found.hooked for found in self._uncaptured.values()) and find_hook(self.original) is None:
            self._uncaptured.clear()
        if not (why := self._changed()):
            return False
        self._recaptures += 1
        if again := sorted(map(dotted, why & self._why)):
            if not self._warned_again:
                _warn(
                    f"{type(self.original).__name__} was captured {self._recaptures + 1} times, because {again[0]} is set anew "
                    "time and again; set it once, before sampling, or keep it out of the denoiser."
                )
            self._warned_again = True
        self._why = why
        self._volatile = {place for place in self._volatile if not any(place[: len(other)] == other for other in why)}
        self._captures.clear()
        self._uncaptured.clear()
        self._schedules.clear()
        self._drop_arenas()
        self._slots.clear()
        self._merged.clear()
        self._shared.clear()
        self._forget_runs()
        return True

    def _changed(self) -> set[Place]:
        """Where the denoiser is not what was captured."""
        if not self._captures and all(found.hooked for found in self._uncaptured.values()):
            return set()
        return unexplained(self._fingerprint, fingerprint(self.original), self._volatile)

    @staticmethod
    def _rows(compute: NDArray[np.bool_], course: Course) -> NDArray[np.bool_]:
        """The rows of the steps of a run; None computes everything.

        A step computes also what the mask computes at the steps left out before it: nothing that is reused is older than the
        mask has it.
        """
        rows = np.ones((len(course), compute.shape[1]), dtype=np.bool_)
        for row, before, step in zip(rows, (None, *course), course, strict=False):
            if step is not None:
                row[:] = compute[step if before is None else before + 1 : step + 1].any(0)
        return rows

    def _module_run(self, key: Key, course: Course) -> ModuleRun:
        """What executes a run of a denoiser that could not be captured."""
        rows, mask = self._rows(self._mask.compute, course), self._mask
        return ModuleRun(self.original, self._uncaptured[key], mask.blocks, rows, mask.rules.at(course))

    def _schedule(self, key: Key, course: Course) -> Schedule:
        """Plans of a run. The least recently used of a capture are let go of, where there are many."""
        known = self._schedules.pop((key, course), None)
        if known is None:
            blocks, most = self._mask.blocks, self._max_graphs
            if key not in self._slots:
                self._slots[key] = slot_dependencies(self._captures[key].capture, blocks)
            slots, skips = self._slots[key], leaves_out(course)
            if most is not None and skips:
                rules = self._mask.rules.at(course)
                rows = merge_rows(slots, blocks, self._rows(self._mask.compute, course), rules, most)
            else:
                whole, rules = self._compute(key)
                rows, rules = self._rows(whole, course), rules.at(course)
            if most is not None and (skips or course == tuple(range(self._mask.steps))):
                plans = plan_merged(slots, blocks, rows, rules, most)
            else:
                plans = plan_run(slots, blocks, rows, rules)
            captured = self._captures[key]
            shared = self._shared[captured.origin] = share_graphs(plans, self._shared.get(captured.origin, {}))
            known = Schedule(plans, shared, partial(captured.graph, blocks=blocks), captured.assembler())
        self._schedules[key, course] = known
        of_capture = [entry for entry in self._schedules if entry[0] == key]
        with_memory = {id(arena.schedule) for arena in self._arenas}
        for entry in of_capture[:-MOST_SCHEDULES]:
            if id(self._schedules[entry]) not in with_memory:  # of a run in progress, maybe; there are few
                del self._schedules[entry]
        return known

    def _whole(self, key: Key) -> Schedule:
        """Plans of a run through the whole mask."""
        return self._schedule(key, tuple(range(self._mask.steps)))

    def _compute(self, key: Key) -> tuple[NDArray[np.bool_], Rules]:
        """The mask's rows and rules, merged where there may not be as many graphs as they take; a reach is for its own rows."""
        mask = self._mask
        if self._max_graphs is None:
            return mask.compute, mask.rules
        origin = self._captures[key].origin
        if origin not in self._merged:
            slots = self._slots[key]
            rows = merge_rows(slots, mask.blocks, mask.compute, mask.rules, self._max_graphs)
            own = np.array_equal(rows, rectify(slots, mask.blocks, mask.compute, mask.rules))
            self._merged[origin] = rows, mask.rules if own else replace(mask.rules, reach=None)
        return self._merged[origin]

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Capture the denoiser at these inputs and compile every graph of a run from the first step to the last.

        Runs that start later, and those with several calls a step, may need a graph more. The values of the inputs do not
        matter. A run in progress is given up.
        """
        check_runnable(self.original)
        call = self._bind.bind(args, kwargs)
        self.reset()
        with torch.no_grad(), self._lock, MAKING:
            self._check_weights()
            if call.key not in self._captures:
                self._uncaptured.pop(call.key, None)  # what was in the way may have passed
                self._try_capture(call)
            if call.key in self._uncaptured:
                return
            captured = self._captures[call.key]
            schedule = self._whole(call.key)
            first: dict[GraphKey, int] = {}
            for position, plan in enumerate(schedule.plans):
                first.setdefault(schedule.graphs[plan.key], position)
            examples: dict[Slot, Tensor] = {}  # a slot is stored before it is read
            for key, position in tqdm(first.items(), desc="compiling graphs", delay=2, leave=False, disable=None):
                step = schedule.step(position)
                if captured.divided and self._backend == "inductor":
                    continue  # compiled already; other graphs are when they are called
                # Tensors of their own, as in a run: torch.compile specialises on inputs that are the same tensor.
                cached = [examples[version.slot].clone() for version in schedule.plans[position].inputs]
                outputs = step.graph(call.tensors, cached, step.coefficients)
                examples.update(zip(key.stores, outputs[step.graph.results :], strict=True))
            lease = self._lease(Bound(call.tensors, call.key, call.timestep, call.given), schedule, Runs())
            if lease is not None:
                try:
                    for position in tqdm(range(len(schedule.plans)), desc="recording", delay=2, leave=False, disable=None):
                        with lease.arena.lock:
                            lease.arena.record(position, call.tensors)
                finally:
                    lease.end()

    def save_compiled(self, path: str | os.PathLike[str]) -> None:
        """Write what was captured and compiled so far to a file, for ``optimize(..., compiled=path)`` in another process.

        Captures for any batch are left out, and those of denoisers whose code or settings another process could not compare;
        also regions of which torch keeps nothing, such as those that take no kernel. They are made afresh there.

        That process needs torch of the same version and the same kind of processor and GPU. It takes a capture for a denoiser
        with the same code, settings and shapes of weights and inputs, and checks it against that denoiser. Raises ValueError
        where there is nothing to save: before ``warmup`` or a run, without regions, or for another backend.
        """
        with self._lock:
            captures = [captured.capture for captured in self._captures.values()]
            regions = {run for captured in self._captures.values() for run in captured.compiled.values()}
        if not regions or self._backend != "inductor":
            raise ValueError(
                "there is nothing to save: call warmup(...) first"
                if self._regions and self._backend == "inductor"
                else "only regions compiled by the backend 'inductor' can be saved."
            )
        save_artefacts(path, saved_captures(self.original, captures), saved_regions(regions))

    def report(self) -> Report:
        """What the mask costs and saves, what was compiled, and what calls so far did."""
        with self._lock:
            return self._report()

    def _report(self) -> Report:
        signatures = []
        for key, captured in self._captures.items():
            if key not in self._slots:
                continue
            schedule = self._whole(key)
            plans, slots, mask, sizes = schedule.plans, self._slots[key], self._mask, captured.capture.sizes
            if sizes:  # plans are made for the batch that was captured
                slots = slot_dependencies(resized(captured.capture, sizes), mask.blocks)
            held = plan_run(slots, mask.blocks, self._compute(key)[0], Rules(["hold"] * len(mask.blocks)))
            unmerged = plan_run(slots, mask.blocks, mask.compute, mask.rules)
            signatures.append(
                SignatureReport(
                    inputs=captured.described,
                    full_macs=slots.total_macs * mask.steps,
                    macs=sum(slots.macs_of(plan.slots) for plan in plans),
                    unmerged_macs=sum(plan.macs for plan in unmerged),
                    peak_cache_bytes=max(plan.held_bytes for plan in plans),
                    held_cache_bytes=max(plan.held_bytes for plan in held),
                    extrapolated=sum(slots.numel(slot) for plan in plans for slot, entering in plan.key.reads if entering == 2),
                    graphs=len({schedule.graphs[plan.key] for plan in plans}),
                    regions=len(set(captured.compiled.values())) if captured.divided else None,
                    capture_seconds=captured.seconds,
                    compile_seconds=tuple(graph.seconds for graph in captured.graphs.values()),
                    any_batch=bool(sizes),
                    alone=captured.alone,
                )
            )
        return Report(
            denoiser=type(self.original).__name__,
            backend=self._backend if isinstance(self._backend, str) else getattr(self._backend, "__name__", "custom"),
            blocks=len(self._mask.blocks),
            steps=self._mask.steps,
            signatures=tuple(signatures),
            uncaptured=tuple((found.described, found.reason) for found in self._uncaptured.values()),
            calls=self._counts.calls,
            reusing_calls=self._counts.reusing,
            unknown_timesteps=self._counts.unknown,
            skips=self._counts.skipped,
            recaptures=self._recaptures,
            recorded=sum(len(arena.recorded) for arena in self._arenas),
            arena_bytes=sum(arena.nbytes for arena in self._arenas),
            not_recorded=next((arena.failure for arena in self._arenas if arena.failure), self._not_replayed),
            cache_bytes=self.cache_bytes,
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes that the runs in progress hold at this moment."""
        with self._lock:
            runs = [own.runs for own in self._in_progress]
        trajectories = [trajectory for r in runs for trajectory in r.trajectories]
        replayed = {trajectory.lease.arena for trajectory in trajectories if trajectory.lease is not None}
        held = pytree.tree_leaves([trajectory.cache for trajectory in trajectories])
        return sum(arena.nbytes for arena in replayed) + sum(
            t.untyped_storage().nbytes() for t in held if isinstance(t, Tensor)
        )

    # ---- copies ---------------------------------------------------------------------------------------------------------

    def _moved(self) -> None:
        """Where weights are elsewhere now, or of another dtype, no run goes on; whether captures still hold shows at the next.

        With model offloading they are back by then.
        """
        if self._changed():
            self._forget_runs()

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedDenoiser:
        return self._rebuild(copy.deepcopy(self.original, memo))

    def _rebuild(self, original: nn.Module) -> OptimizedDenoiser:
        return OptimizedDenoiser(original, self._mask, **self._choices())

    def _choices(self) -> dict[str, Any]:
        return {
            "backend": self._backend,
            "timestep": self._timestep,
            "regions": self._regions,
            "max_graphs": self._max_graphs,
            "cuda_graphs": self._cuda_graphs,
            "dynamic": self._dynamic,
            "max_captures": self._max_captures,
            "options": self._options,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.original, self._mask, self._choices())

    def __repr__(self) -> str:
        return f"OptimizedDenoiser({type(self.original).__name__}, {self._mask!r}, backend={self._backend!r})"


def _unpickle(original: nn.Module, mask: Mask, choices: dict[str, Any]) -> OptimizedDenoiser:
    return OptimizedDenoiser(original, mask, **choices)


def _warn(message: str, deeper: int = 0) -> None:
    """Warn at the line that called the denoiser: above _count (or another), _try_execute, _execute, _call, forward and two of
    __call__."""
    warnings.warn(message, stacklevel=9 + deeper)
