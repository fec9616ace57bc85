"""The optimised denoiser: plans each call's step, keeps the cache of each run, and executes the specialised graphs.

``maskcompile.runs`` decides which call belongs to which run. A timestep that the mask does not know computes everything and
stores what the next steps of the mask reuse. Nothing of a run's state changes before a call has succeeded.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from maskcompile.compile import Backend, Executable, compile_graph, compile_region
from maskcompile.fingerprint import Fingerprint, changes, fingerprint
from maskcompile.link import link
from maskcompile.mask import Mask, check_blocks, check_mask
from maskcompile.report import Report, SignatureReport
from maskcompile.runs import Runs, Trajectory, Where, advance, commit, current, locate, sampling_order
from maskcompile.signature import Call, bind, check_autocast, check_capturable, describe, timestep_name
from passes.capture import Capture, CaptureError, Slot, capture, composite_modules
from passes.dependencies import Slots, result_nodes, slot_dependencies
from passes.plan import GraphKey, Plan, plan_run, share_graphs
from passes.regions import Partition, partition, select_regions
from passes.specialise import coefficients_like, specialise


@dataclass
class _Graph:
    """A specialised graph, executable.

    weights: that it may return as they are. coefficients: its last input, fake; None where it takes none. results: how many of
    its first outputs are the denoiser's. shared: outputs that share memory and are cloned. seconds: of making it, and of the
    first call, which compiles. Both known from then on.
    """

    run: Executable
    weights: tuple[Tensor, ...]
    coefficients: Tensor | None
    results: int
    seconds: float
    called: bool = False
    shared: frozenset[int] = frozenset()

    def __call__(self, inputs: Sequence[Tensor], cached: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.called:
            start = time.perf_counter()
            outputs = self.run(*inputs, *cached, *coefficients)
            self.seconds += time.perf_counter() - start
            self.shared = _shared([*inputs, *self.weights], cached, outputs, self.results)
            self.called = True
        else:
            outputs = self.run(*inputs, *cached, *coefficients)
        if self.shared:
            outputs = tuple(t.clone() if i in self.shared else t for i, t in enumerate(outputs))
        return outputs


def _shared(inputs: Sequence[Tensor], cached: Sequence[Tensor], outputs: Sequence[Tensor], results: int) -> frozenset[int]:
    """Outputs to clone, so that what is cached never shares memory with what the caller holds and may change in place.

    inputs: the denoiser's, and its weights, which a block may return as they are. Looked at in the tensors of a call rather
    than in the graph, because a compiler may return an input where the graph computes ``x * 1.0``. A view of a larger tensor is
    cloned too, or it would keep all of that alive.
    """

    def memory(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    own = {memory(t) for t in cached}
    shared = {i for i, t in enumerate(outputs[:results]) if memory(t) in own}
    taken = own | {memory(t) for t in (*inputs, *outputs[:results])}
    for i, tensor in enumerate(outputs[results:], results):
        if memory(tensor) in taken or tensor.untyped_storage().nbytes() != tensor.nbytes:
            shared.add(i)
        taken.add(memory(tensor))
    return frozenset(shared)


@dataclass
class _Captured:
    """A denoiser captured at one input signature, with the graphs made of it so far, and its regions for some blocks."""

    capture: Capture
    described: str
    seconds: float
    graphs: dict[GraphKey, _Graph] = field(default_factory=dict)
    partitions: dict[tuple[str, ...], Partition] = field(default_factory=dict)


@dataclass
class _Schedule:
    """The plans of a run under the current mask that starts at some step: what to execute at each of its calls.

    coefficients: as the graphs take them, made once, so that nothing is copied to a device at every step.
    """

    plans: list[Plan]
    graphs: dict[GraphKey, GraphKey]
    coefficients: dict[tuple[torch.dtype, tuple[float, ...]], list[Tensor]] = field(default_factory=dict)


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
        self.training = original.training
        self._backend = backend
        self._regions = regions
        self._options = dict(options)
        self._timestep = name
        self._signature = signature
        self._captures: dict[tuple[Any, ...], _Captured] = {}
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
        marked = {*composite_modules(self.original), *self._marked}
        if not marked.issuperset(mask.blocks):  # a leaf module, which captures so far did not mark
            self._captures.clear()
            self._marked = marked | set(mask.blocks)
        self._mask = mask
        self._schedules: dict[tuple[Any, ...], _Schedule] = {}
        self._slots: dict[tuple[Any, ...], Slots] = {}
        self._shared: dict[tuple[Any, ...], dict[GraphKey, GraphKey]] = {}
        self._calls = self._reusing = self._unknown = self._skipped = self._recaptures = 0
        self.reset()

    def forget_graphs(self, most: int) -> None:
        """Let go of the specialised graphs of a capture that has made more than ``most``; they are made again when needed."""
        for captured in self._captures.values():
            if len(captured.graphs) > most:
                captured.graphs.clear()

    def reset(self) -> None:
        """Forget the run in progress; the next call starts a new one."""
        self._runs = Runs()

    def _make_forward(self) -> Callable[..., Any]:
        @functools.wraps(self.original.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(*args, **kwargs)

        return forward

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.original.training:
            raise ValueError(f"{type(self.original).__name__} is in train mode; call .eval() on the denoiser first.")
        check_autocast()
        call = bind(self.original, args, kwargs, self._signature, self._timestep)
        if call.timestep is None:
            raise ValueError(f"the denoiser was called without a tensor or number for {self._timestep!r}.")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
            raise ValueError(
                "an optimised denoiser computes no gradients; call the original, or pass inputs without requires_grad."
            )
        with torch.no_grad():
            where = locate(self._mask, call.timestep, self._runs.last)
            runs = advance(self._runs, where)
            trajectory = current(runs, call.key)
            if trajectory is None:
                if self._check_weights():
                    runs = advance(Runs(), where)
                if call.key not in self._captures:
                    self._captures[call.key] = self._capture(call)
                trajectory = self._begin(call.key, where)
            schedule = self._schedule(trajectory.key, trajectory.start, trajectory.leading)
            plan = schedule.plans[trajectory.position]
            key = schedule.graphs[plan.key]
            captured = self._captures[call.key]
            graph = self._graph(captured, key)
            cached = [trajectory.cache[version] for version in plan.inputs]
            outputs = graph(call.tensors, cached, _coefficients(schedule, graph, plan))
        # A shared graph may return more than this plan stores; that is not the run's to keep.
        stored = dict(zip(key.stores, outputs[graph.results :], strict=True))
        cache = {v: stored[v.slot] if v.step == trajectory.position else trajectory.cache[v] for v in plan.held}
        self._count(runs, where, trajectory, plan)
        self._runs = commit(
            runs,
            replace(
                trajectory,
                position=trajectory.position + 1,
                next_step=trajectory.next_step if where.step is None else where.step + 1,
                cache=cache,
            ),
        )
        return _result(captured.capture, outputs[: graph.results])

    def _begin(self, key: tuple[Any, ...], where: Where) -> Trajectory:
        """A trajectory that starts at this call, with nothing in its cache."""
        if where.step is not None:
            return Trajectory(key, where.step, False, 0, where.step, {})
        following = sum(1 for t in self._mask.timesteps if sampling_order(self._mask, t) < where.order)
        return Trajectory(key, following, True, 0, following, {})

    def _count(self, runs: Runs, where: Where, trajectory: Trajectory, plan: Plan) -> None:
        """Keep the figures of the report, and warn once of each thing that makes a mask do nothing."""
        self._calls += 1
        self._reusing += bool(plan.inputs)
        steps = self._mask.timesteps
        if where.step is None:
            self._unknown += 1
            if self._unknown == 1:
                what = "a batch with different timesteps" if np.isnan(where.value) else f"timestep {where.value:g}"
                _warn(
                    f"the mask ({len(steps)} steps, {steps[0]:g} to {steps[-1]:g}) does not know {what}; such calls compute "
                    "every block. Use the scheduler and number of steps that the mask was made for."
                )
        before = runs.trajectories[runs.calls] if runs.calls < len(runs.trajectories) else None
        if before is not None and where.step is not None and before.next_step < where.step:
            self._skipped += 1
            if self._skipped == 1:
                _warn(
                    f"this run skips from step {before.next_step - 1} of the mask to step {where.step}; a step after a skip "
                    "computes every block that it needs. Make the mask for the timesteps of the run."
                )

    # ---- captures and graphs --------------------------------------------------------------------------------------------

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
        return _Captured(captured, describe(call), time.perf_counter() - start)

    def _check_weights(self) -> bool:
        """Forget captures (and say so) when weights, modules, hooks or settings were replaced since, not updated in place."""
        if not self._captures or changes(self._fingerprint, fingerprint(self.original)) <= self._volatile:
            return False
        self._recaptures += 1
        self._captures.clear()
        self._schedules.clear()
        self._slots.clear()
        self._shared.clear()
        self.reset()
        return True

    def _schedule(self, key: tuple[Any, ...], start: int, leading: bool) -> _Schedule:
        """Plans of the steps from ``start`` on, after one more that computes everything where ``leading``."""
        known = self._schedules.get((key, start, leading))
        if known is None:
            if key not in self._slots:
                self._slots[key] = slot_dependencies(self._captures[key].capture, self._mask.blocks)
            rows = self._mask.compute[start:]
            log_snr = None if self._mask.log_snr is None else self._mask.log_snr[start:]
            if leading:
                rows = np.concatenate([np.ones_like(self._mask.compute[:1]), rows])
                log_snr = None if log_snr is None else (float("nan"), *log_snr)
            plans = plan_run(self._slots[key], self._mask.blocks, rows, self._mask.reuse, log_snr)
            self._shared[key] = share_graphs(plans, self._shared.get(key, {}))
            known = self._schedules[key, start, leading] = _Schedule(plans, self._shared[key])
        return known

    def _graph(self, captured: _Captured, key: GraphKey) -> _Graph:
        graph = captured.graphs.get(key)
        if graph is None:
            start = time.perf_counter()
            found = captured.capture
            graph = captured.graphs[key] = _Graph(
                run=self._link(captured, key)
                if self._regions
                else compile_graph(specialise(found, key), self._backend, self._options),
                weights=(*found.graph_module.parameters(), *found.graph_module.buffers()),
                coefficients=coefficients_like(found, key),
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
        compiled = partial(compile_region, capture=captured.capture, backend=self._backend, options=self._options)
        return link(captured.capture, key, regions, compiled)

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Capture the denoiser at these inputs and compile every graph of a run from the first step to the last.

        Runs that start later, and those with several calls a step, may need a graph more. The values of the inputs do not
        matter. A run in progress is given up.
        """
        call = bind(self.original, args, kwargs, self._signature, self._timestep)
        self.reset()
        self._check_weights()
        with torch.no_grad():
            if call.key not in self._captures:
                self._captures[call.key] = self._capture(call)
            captured = self._captures[call.key]
            schedule = self._schedule(call.key, 0, leading=False)
            first: dict[GraphKey, Plan] = {}
            for plan in schedule.plans:
                first.setdefault(schedule.graphs[plan.key], plan)
            examples: dict[Slot, Tensor] = {}  # a slot is stored before it is read
            for key, plan in tqdm(first.items(), desc="compiling graphs", delay=2, leave=False, disable=None):
                graph = self._graph(captured, key)
                # Tensors of their own, as in a run: torch.compile specialises on inputs that are the same tensor.
                cached = [examples[version.slot].clone() for version in plan.inputs]
                outputs = graph(call.tensors, cached, _coefficients(schedule, graph, plan))
                examples.update(zip(key.stores, outputs[graph.results :], strict=True))

    def report(self) -> Report:
        """What the mask costs and saves, what was compiled, and what calls so far did."""
        signatures = []
        for key, captured in self._captures.items():
            if key not in self._slots:
                continue
            schedule = self._schedule(key, 0, leading=False)
            plans, slots, mask = schedule.plans, self._slots[key], self._mask
            held = plan_run(slots, mask.blocks, mask.compute, ["hold"] * len(mask.blocks))
            signatures.append(
                SignatureReport(
                    inputs=captured.described,
                    full_macs=slots.total_macs * mask.steps,
                    macs=sum(plan.macs for plan in plans),
                    peak_cache_bytes=max(plan.held_bytes for plan in plans),
                    held_cache_bytes=max(plan.held_bytes for plan in held),
                    extrapolated=sum(slots.numel(slot) for plan in plans for slot, entering in plan.key.reads if entering == 2),
                    graphs=len({schedule.graphs[plan.key] for plan in plans}),
                    capture_seconds=captured.seconds,
                    compile_seconds=tuple(graph.seconds for graph in captured.graphs.values() if graph.called),
                )
            )
        return Report(
            denoiser=type(self.original).__name__,
            backend=self._backend if isinstance(self._backend, str) else getattr(self._backend, "__name__", "custom"),
            blocks=len(self._mask.blocks),
            steps=self._mask.steps,
            signatures=tuple(signatures),
            calls=self._calls,
            reusing_calls=self._reusing,
            unknown_timesteps=self._unknown,
            skips=self._skipped,
            recaptures=self._recaptures,
            cache_bytes=self.cache_bytes,
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes that the runs in progress hold at this moment."""
        return sum(t.untyped_storage().nbytes() for trajectory in self._runs.trajectories for t in trajectory.cache.values())

    # ---- looking like the original --------------------------------------------------------------------------------------

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
        self.original.to(*args, **kwargs)
        self._check_weights()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OptimizedDenoiser:
        self.original._apply(fn, recurse)
        self._check_weights()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedDenoiser:
        return self._rebuild(copy.deepcopy(self.original, memo))

    def _rebuild(self, original: nn.Module) -> OptimizedDenoiser:
        return OptimizedDenoiser(original, self._mask, **self._choices())

    def _choices(self) -> dict[str, Any]:
        return {"backend": self._backend, "timestep": self._timestep, "regions": self._regions, "options": self._options}

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.original, self._mask, self._choices())

    def __repr__(self) -> str:
        return f"OptimizedDenoiser({type(self.original).__name__}, {self._mask!r}, backend={self._backend!r})"


def _unpickle(original: nn.Module, mask: Mask, choices: dict[str, Any]) -> OptimizedDenoiser:
    return OptimizedDenoiser(original, mask, **choices)


def _coefficients(schedule: _Schedule, graph: _Graph, plan: Plan) -> list[Tensor]:
    """The last input of the graph for this plan, none where the graph takes none."""
    if graph.coefficients is None:
        return []
    like = graph.coefficients
    known = schedule.coefficients.get((like.dtype, plan.coefficients))
    if known is None:
        known = [torch.tensor(plan.coefficients, dtype=like.dtype, device=like.device)]
        schedule.coefficients[like.dtype, plan.coefficients] = known
    return known


def _warn(message: str) -> None:
    """Warn at the line that called the denoiser: above _count, _call, forward and the two frames of Module.__call__."""
    warnings.warn(message, stacklevel=7)


def _result(captured: Capture, tensors: Sequence[Tensor]) -> Any:
    """Put the tensors back into the structure that the original returns."""
    remaining = iter(tensors)
    leaves = [next(remaining) if isinstance(leaf, torch.fx.Node) else leaf for leaf in captured.outputs]
    return pytree.tree_unflatten(leaves, captured.out_spec)
