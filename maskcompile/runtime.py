"""The optimised denoiser: plans each call's step, keeps the cache of each run, and executes the specialised graphs.

``maskcompile.runs`` decides which call belongs to which run. A timestep that the mask does not know computes everything and
stores what the next steps of the mask reuse. Nothing of a run's state changes before a call has succeeded.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from maskcompile.compile import Backend, Executable, compile_graph, compile_region, save_compiled
from maskcompile.fallback import ModuleRun, Uncaptured
from maskcompile.fingerprint import Fingerprint, changes, fingerprint
from maskcompile.link import link
from maskcompile.mask import Mask, check_blocks, check_mask
from maskcompile.report import Report, SignatureReport
from maskcompile.runs import Clock, Runs, Trajectory, Where, advance, commit, current, locate
from maskcompile.signature import (
    Binder,
    Bound,
    Call,
    Key,
    check_autocast,
    check_capturable,
    check_runnable,
    describe,
    find_hook,
    timestep_name,
)
from maskcompile.steps import Graph, Schedule
from passes.capture import Capture, CaptureError, Slot, capture, composite_modules
from passes.dependencies import Slots, result_nodes, slot_dependencies
from passes.merge import merge_rows, plan_merged
from passes.plan import GraphKey, plan_run, share_graphs
from passes.regions import Partition, Region, divisible, partition, select_regions
from passes.specialise import coefficients_like, specialise

#: Held while anything is captured or compiled: torch does either in one thread at a time.
_MAKING = threading.RLock()

#: Scheduler tensors whose last calling thread is remembered.
MOST_CALLERS = 64


@dataclass
class _Captured:
    """A denoiser captured at one input signature, with the graphs made of it so far.

    assemble: see ``_assembler``. divided: whether graphs are made of regions. partitions: into regions, for the blocks of a
    mask. compiled: the regions that the graphs consist of, by content.
    """

    capture: Capture
    described: str
    seconds: float
    assemble: Callable[[Sequence[Tensor]], Any]
    divided: bool
    graphs: dict[GraphKey, Graph] = field(default_factory=dict)
    partitions: dict[tuple[str, ...], Partition] = field(default_factory=dict)
    compiled: dict[Hashable, Executable] = field(default_factory=dict)


@dataclass
class _Counts:
    """For the report. calls: since the mask was set. reusing: those that reused any block. unknown, skipped: see ``Report``."""

    calls: int = 0
    reusing: int = 0
    unknown: int = 0
    skipped: int = 0


class _Trajectories:
    """The runs in progress of one thread."""

    def __init__(self) -> None:
        self.runs = Runs()


class _Threads(threading.local):
    """In each thread its own runs, for no two threads are in one run."""

    def __init__(self, in_progress: weakref.WeakSet[_Trajectories]) -> None:
        self.own = _Trajectories()
        in_progress.add(self.own)


class OptimizedDenoiser(nn.Module):
    """Drop-in for ``original`` that executes a mask; made by ``maskcompile.optimize``.

    It has the parameters, buffers and submodules of the original (the same objects, under the same names), its forward
    signature and return type, and passes every other attribute through to it. Inference only: results carry no gradients.
    """

    original: nn.Module

    def __init__(
        self,
        original: nn.Module,
        mask: Mask,
        *,
        backend: Backend,
        timestep: str | None,
        regions: bool,
        max_graphs: int | None,
        max_captures: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        signature = inspect.signature(original.forward)
        name = timestep or timestep_name(signature)
        if name is None or name not in signature.parameters:
            raise ValueError(
                f"{type(original).__name__}.forward{signature} has no parameter "
                f"{repr(timestep) if timestep else 'with a usual name for the timestep'}; "
                "pass optimize(..., timestep='its name')."
            )
        # The dictionaries themselves are shared, so that both modules always hold the same parameters and submodules.
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = original.__dict__[kind]
        self.__dict__["original"] = original
        self.__dict__["__module__"] = type(original).__module__  # with __class__, by which pipelines name their components
        self.training = original.training
        self._backend = backend
        self._regions = regions
        self._max_graphs = max_graphs
        self._max_captures = max_captures
        self._options = dict(options)
        self._timestep = name
        self._lock = threading.RLock()
        self._bind = Binder(original, signature, name)
        self._captures: dict[Key, _Captured] = {}
        self._uncaptured: dict[Key, Uncaptured] = {}
        self._warned_uncaptured = False
        self._marked: set[str] = set()
        self._fingerprint: Fingerprint = {}
        self._volatile: set[tuple[str, str]] = set()
        self.forward = self._make_forward()
        self.set_mask(mask)

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
            self._mask = mask
            self._clock = Clock(mask)
            self._schedules: dict[tuple[Key, int, bool], Schedule] = {}
            self._slots: dict[Key, Slots] = {}
            self._merged: dict[Key, NDArray[np.bool_]] = {}
            self._shared: dict[Key, dict[GraphKey, GraphKey]] = {}
            self._recaptures = 0
            self._forget_runs()
            self._counts = _Counts()

    def forget_graphs(self, most: int) -> None:
        """Let go of the specialised graphs of a capture that has made more than ``most``; they are made again when needed."""
        with self._lock:
            for captured in self._captures.values():
                if len(captured.graphs) > most:
                    captured.graphs.clear()
                    captured.compiled.clear()
                    self._schedules.clear()

    def reset(self) -> None:
        """Forget the runs in progress, in all threads; the next call starts a new one."""
        with self._lock:
            self._forget_runs()

    def _forget_runs(self) -> None:
        self._callers: dict[int | None, int] = {}
        self._in_progress: weakref.WeakSet[_Trajectories] = weakref.WeakSet()
        self._threads = _Threads(self._in_progress)

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
        with self._lock:
            own = self._threads.own
            where = locate(self._clock, timestep, own.runs.last)
            before = own.runs if self._may_go_on(where) else Runs()
            runs = advance(before, where)
            trajectory = current(runs, call.key)
            if trajectory is None:
                with _MAKING:
                    if self._check_weights():
                        own, runs = self._threads.own, advance(Runs(), where)
                    if call.key not in self._captures and call.key not in self._uncaptured:
                        self._try_capture(self._bind.bind(args, kwargs))
                    trajectory = self._begin(call.key, where)
            schedule = trajectory.schedule
            step = schedule.steps.get(trajectory.position)
            outputs: Sequence[Tensor] | None = None
            if step is None or not step.graph.called:
                with _MAKING:  # the first call of a graph compiles
                    step = schedule.step(trajectory.position)
                    outputs, cache = step(call.tensors, trajectory.cache)
        if outputs is None:
            outputs, cache = step(call.tensors, trajectory.cache)
        self._count(runs, where, step.reuses)
        next_step = trajectory.next_step if where.step is None else where.step + 1
        own.runs = commit(runs, Trajectory(call.key, schedule, trajectory.position + 1, next_step, cache))
        return schedule.assemble(outputs[: step.graph.results])

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

    def _begin(self, key: Key, where: Where) -> Trajectory:
        """A trajectory that starts at this call, with nothing in its cache."""
        self._use(key)
        start = self._clock.following(where.order) if where.step is None else where.step
        begin = self._module_run if key in self._uncaptured else self._schedule
        return Trajectory(key, begin(key, start, leading=where.step is None), 0, start, ())

    def _use(self, key: Key) -> None:
        """Let go of the captures that were used least recently, where there are more than may be. Runs go on with theirs."""
        for known in (self._captures, self._uncaptured):
            if key in known:
                known[key] = known.pop(key)  # type: ignore[assignment]
            while len(known) > self._max_captures:
                old = next(iter(known))
                del known[old]
                for made in (self._slots, self._merged, self._shared):
                    made.pop(old, None)  # type: ignore[attr-defined]
                for entry in [entry for entry in self._schedules if entry[0] == old]:
                    del self._schedules[entry]

    def _count(self, runs: Runs, where: Where, reuses: bool) -> None:
        """Keep the figures of the report, and warn once of each thing that makes a mask do nothing."""
        with self._lock:
            counts = self._counts
            counts.calls += 1
            counts.reusing += reuses
        if where.step is None:
            counts.unknown += 1
            if counts.unknown + counts.skipped == 1:
                steps = self._mask.timesteps
                what = "a batch with different timesteps" if np.isnan(where.value) else f"timestep {where.value:g}"
                _warn(
                    f"the mask ({len(steps)} steps, {steps[0]:g} to {steps[-1]:g}) does not know {what}; such calls compute "
                    "every block. Use the scheduler and number of steps that the mask was made for, or "
                    "fast.set_mask(mask.resample(scheduler.timesteps))."
                )
        elif runs.calls < len(runs.trajectories) and runs.trajectories[runs.calls].next_step < where.step:
            counts.skipped += 1
            if counts.unknown + counts.skipped == 1:
                _warn(
                    f"this run skips from step {runs.trajectories[runs.calls].next_step - 1} of the mask to step {where.step}; "
                    "a step after a skip computes every block that it needs. Make the mask for the timesteps of the run, or "
                    "call fast.set_mask(mask.resample(scheduler.timesteps))."
                )

    # ---- captures and graphs --------------------------------------------------------------------------------------------

    def _try_capture(self, call: Call) -> None:
        """Capture the denoiser, or note that its blocks have to be skipped module by module."""
        check_runnable(self.original)
        reason = hook = find_hook(self.original)
        if hook is None:
            try:
                self._captures[call.key] = self._capture(call)
            except CaptureError as error:
                reason = str(error)
        if reason is not None:
            if not self._warned_uncaptured:
                reason = reason.rstrip(".")
                warnings.warn(
                    f"{reason}. Its blocks are skipped module by module, in eager PyTorch: nothing is compiled.", stacklevel=2
                )
            self._warned_uncaptured = True
            self._uncaptured[call.key] = Uncaptured.of(call, reason, hook is not None)

    def _capture(self, call: Call) -> _Captured:
        check_capturable(self.original)
        before = fingerprint(self.original)
        start = time.perf_counter()
        marked = {*composite_modules(self.original), *self._marked}
        try:
            captured = capture(self.original, call.args, call.kwargs, marked)
        except CaptureError:
            raise
        except Exception as error:
            weights = sorted({f"{str(p.dtype)[6:]} on {p.device}" for p in self.original.parameters()})
            raise RuntimeError(
                f"{type(self.original).__name__} (weights {', '.join(weights)}) does not run on these inputs "
                f"({describe(call)}): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        check_blocks(captured, self._mask)
        # What a forward itself changes (a counter, a table) says nothing about whether the capture still holds.
        self._fingerprint = fingerprint(self.original)
        self._volatile |= changes(before, self._fingerprint)
        return _Captured(
            captured, describe(call), time.perf_counter() - start, _assembler(captured), self._regions and divisible(captured)
        )

    def _check_weights(self) -> bool:
        """Forget captures (and say so) when weights, modules, hooks or settings were replaced since, not updated in place."""
        if any(found.hooked for found in self._uncaptured.values()) and find_hook(self.original) is None:
            self._uncaptured.clear()
        if not self._changed():
            return False
        self._recaptures += 1
        self._captures.clear()
        self._schedules.clear()
        self._slots.clear()
        self._merged.clear()
        self._shared.clear()
        self._forget_runs()
        return True

    def _changed(self) -> bool:
        return bool(self._captures) and not changes(self._fingerprint, fingerprint(self.original)) <= self._volatile

    def _rows(self, compute: NDArray[np.bool_], start: int, leading: bool) -> tuple[Any, tuple[float, ...] | None]:
        """(rows, log-SNR) of the steps from ``start`` on, after one more that computes everything where ``leading``."""
        rows = compute[start:]
        log_snr = None if self._mask.log_snr is None else self._mask.log_snr[start:]
        if leading:
            rows = np.concatenate([np.ones_like(compute[:1]), rows])
            log_snr = None if log_snr is None else (float("nan"), *log_snr)
        return rows, log_snr

    def _module_run(self, key: Key, start: int, leading: bool) -> ModuleRun:
        """The same without a graph."""
        rows, log_snr = self._rows(self._mask.compute, start, leading)
        return ModuleRun(self.original, self._uncaptured[key], self._mask.blocks, rows, self._mask.reuse, log_snr)

    def _schedule(self, key: Key, start: int, leading: bool) -> Schedule:
        """Plans of the steps from ``start`` on, after one more that computes everything where ``leading``."""
        known = self._schedules.get((key, start, leading))
        if known is None:
            if key not in self._slots:
                self._slots[key] = slot_dependencies(self._captures[key].capture, self._mask.blocks)
            rows, log_snr = self._rows(self._compute(key), start, leading)
            merged = self._max_graphs is not None and not start and not leading
            plan = plan_merged if merged else plan_run
            plans = plan(self._slots[key], self._mask.blocks, rows, self._mask.reuse, log_snr)
            self._shared[key] = share_graphs(plans, self._shared.get(key, {}))
            captured = self._captures[key]
            known = self._schedules[key, start, leading] = Schedule(
                plans, self._shared[key], partial(self._graph, captured), captured.assemble
            )
        return known

    def _compute(self, key: Key) -> NDArray[np.bool_]:
        """The mask's rows, merged where there may not be as many graphs as they take."""
        mask = self._mask
        if self._max_graphs is None:
            return mask.compute
        if key not in self._merged:
            self._merged[key] = merge_rows(
                self._slots[key], mask.blocks, mask.compute, mask.reuse, mask.log_snr, self._max_graphs
            )
        return self._merged[key]

    def _graph(self, captured: _Captured, key: GraphKey) -> Graph:
        graph = captured.graphs.get(key)
        if graph is None:
            start = time.perf_counter()
            found = captured.capture
            graph = captured.graphs[key] = Graph(
                run=self._link(captured, key)
                if captured.divided
                else compile_graph(specialise(found, key), self._backend, self._options),
                weights=(*found.graph_module.parameters(), *found.graph_module.buffers()),
                coefficients=coefficients_like(found, key, apart=captured.divided),
                results=len(result_nodes(found)),
                seconds=time.perf_counter() - start,
            )
        return graph

    def _link(self, captured: _Captured, key: GraphKey) -> Executable:
        """The graph of ``key``, put together from its regions; those not seen before are compiled."""
        blocks = self._mask.blocks
        if blocks not in captured.partitions:
            captured.partitions[blocks] = partition(captured.capture, blocks)
        regions = select_regions(captured.capture, captured.partitions[blocks], key)

        def compiled(region: Region) -> Executable:
            known = captured.compiled.get(region.content)
            if known is None:
                known = compile_region(region, captured.capture, self._backend, self._options)
                captured.compiled[region.content] = known
            return known

        return link(captured.capture, key, regions, compiled)

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Capture the denoiser at these inputs and compile every graph of a run from the first step to the last.

        Runs that start later, and those with several calls a step, may need a graph more. The values of the inputs do not
        matter. A run in progress is given up.
        """
        call = self._bind.bind(args, kwargs)
        self.reset()
        with torch.no_grad(), self._lock, _MAKING:
            self._check_weights()
            if call.key not in self._captures and call.key not in self._uncaptured:
                self._try_capture(call)
            if call.key in self._uncaptured:
                return
            captured = self._captures[call.key]
            schedule = self._schedule(call.key, 0, leading=False)
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

    def save_compiled(self, path: str | os.PathLike[str]) -> None:
        """Write what was compiled so far to a file, for ``optimize(..., compiled=path)`` in another process.

        That process captures all the same, and needs torch of the same version and the same kind of processor and GPU. Raises
        ValueError where there is nothing to save: before ``warmup`` or a run, without regions, or for another backend.
        """
        regions = {run for captured in self._captures.values() for run in captured.compiled.values()}
        if not regions or self._backend != "inductor":
            raise ValueError(
                "there is nothing to save: call warmup(...) first"
                if self._regions and self._backend == "inductor"
                else "only regions compiled by the backend 'inductor' can be saved."
            )
        save_compiled(path, regions)

    def report(self) -> Report:
        """What the mask costs and saves, what was compiled, and what calls so far did."""
        signatures = []
        for key, captured in self._captures.items():
            if key not in self._slots:
                continue
            schedule = self._schedule(key, 0, leading=False)
            plans, slots, mask = schedule.plans, self._slots[key], self._mask
            held = plan_run(slots, mask.blocks, self._compute(key), ["hold"] * len(mask.blocks))
            unmerged = plan_run(slots, mask.blocks, mask.compute, mask.reuse, mask.log_snr)
            signatures.append(
                SignatureReport(
                    inputs=captured.described,
                    full_macs=slots.total_macs * mask.steps,
                    macs=sum(plan.macs for plan in plans),
                    unmerged_macs=sum(plan.macs for plan in unmerged),
                    peak_cache_bytes=max(plan.held_bytes for plan in plans),
                    held_cache_bytes=max(plan.held_bytes for plan in held),
                    extrapolated=sum(slots.numel(slot) for plan in plans for slot, entering in plan.key.reads if entering == 2),
                    graphs=len({schedule.graphs[plan.key] for plan in plans}),
                    regions=len(set(captured.compiled.values())) if captured.divided else None,
                    capture_seconds=captured.seconds,
                    compile_seconds=tuple(graph.seconds for graph in captured.graphs.values()),
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
            cache_bytes=self.cache_bytes,
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes that the runs in progress hold at this moment."""
        with self._lock:
            runs = [own.runs for own in self._in_progress]
        held = pytree.tree_leaves([trajectory.cache for r in runs for trajectory in r.trajectories])
        return sum(t.untyped_storage().nbytes() for t in held if isinstance(t, Tensor))

    # ---- looking like the original --------------------------------------------------------------------------------------

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The original's: ``isinstance`` holds for both, and a pipeline saves the component as what it loads it as."""
        original = self.__dict__.get("original")
        return OptimizedDenoiser if original is None else type(original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.original, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> OptimizedDenoiser:
        self.original.train(mode)
        self.training = mode
        return self

    def to(self, *args: Any, **kwargs: Any) -> OptimizedDenoiser:
        with self._lock:
            self.original.to(*args, **kwargs)
            self._moved()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OptimizedDenoiser:
        with self._lock:
            self.original._apply(fn, recurse)
            self._moved()
        return self

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
            "max_captures": self._max_captures,
            "options": self._options,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.original, self._mask, self._choices())

    def __repr__(self) -> str:
        return f"OptimizedDenoiser({type(self.original).__name__}, {self._mask!r}, backend={self._backend!r})"


def _unpickle(original: nn.Module, mask: Mask, choices: dict[str, Any]) -> OptimizedDenoiser:
    return OptimizedDenoiser(original, mask, **choices)


def _warn(message: str) -> None:
    """Warn at the line that called the denoiser: above _count, _execute, _call, forward and two of Module.__call__."""
    warnings.warn(message, stacklevel=8)


def _assembler(captured: Capture) -> Callable[[Sequence[Tensor]], Any]:
    """Puts the result tensors into the structure that the original returns."""
    leaves, spec = captured.outputs, captured.out_spec
    if spec == pytree.tree_structure(tuple(leaves)) and all(isinstance(leaf, torch.fx.Node) for leaf in leaves):
        return tuple

    def assemble(tensors: Sequence[Tensor]) -> Any:
        remaining = iter(tensors)
        filled = [next(remaining) if isinstance(leaf, torch.fx.Node) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, spec)

    return assemble
