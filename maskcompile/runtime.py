"""The optimised denoiser: finds the step of each call, keeps the cache of each run, and executes the specialised graphs.

How calls become runs. The timestep of a call says which row of the mask applies. A later step than the last one goes on with
the run; an earlier one, or one out of another scheduler tensor, starts a new run. The same timestep again is another trajectory
beside the first (a separate pass for guidance, the second call of a 2nd-order solver), with a cache of its own, or the start of
another run after one that stopped there; which of the two shows only at the next steps. So trajectories go on only where the
last two steps had equally many calls (the first step of a run: one call), and else start over with an empty cache: what they
lack is computed. So does a run that skips steps, changes its input shapes, or was not at the step before. A timestep that the
mask does not know computes everything and stores what the next steps of the mask reuse.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from maskcompile.compile import Executable, compile_graph
from maskcompile.mask import Mask, check_mask
from maskcompile.report import Report, SignatureReport
from maskcompile.signature import Call, bind, check_capturable, describe, timestep_name
from passes.blocks import tensor_info
from passes.capture import Capture, CaptureError, Slot, capture, composite_modules
from passes.dependencies import Slots, slot_dependencies
from passes.plan import GraphKey, Plan, plan_run, share_graphs
from passes.specialise import specialise

#: Trajectories at one timestep before further calls are taken for new runs (somebody timing one step in a loop).
MOST_TRAJECTORIES = 8


@dataclass
class _Graph:
    """A specialised graph, executable; seconds of its first call, which compiles it."""

    run: Executable
    results: int
    seconds: float | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.seconds is not None:
            return self.run(*tensors)
        start = time.perf_counter()
        outputs = self.run(*tensors)
        self.seconds = time.perf_counter() - start
        return outputs


@dataclass
class _Captured:
    """A denoiser captured at one input signature, with the graphs made of it so far."""

    capture: Capture
    described: str
    seconds: float
    graphs: dict[GraphKey, _Graph] = field(default_factory=dict)


@dataclass
class _Schedule:
    """The plans of a run under the current mask that starts at some step: what to execute at each of its calls."""

    plans: list[Plan]
    graphs: list[GraphKey]


@dataclass
class _Trajectory:
    """One run in progress. position: index of its last plan in the schedule; next_step: the mask's step that continues it."""

    key: tuple[Any, ...]
    schedule: _Schedule
    next_step: int
    position: int = -1
    cache: dict[Slot, Tensor] = field(default_factory=dict)


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
        backend: str | Callable[..., Any],
        timestep: str | None,
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
        self._options = dict(options)
        self._timestep = name
        self._signature = signature
        self._captures: dict[tuple[Any, ...], _Captured] = {}
        self._marked: set[str] = set()
        self._fingerprint: tuple[Any, ...] = ()
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
        self._sign = 1.0 if mask.steps < 2 or mask.timesteps[1] > mask.timesteps[0] else -1.0
        self._steps_by_dtype: dict[torch.dtype, dict[float, list[int]]] = {}
        self._schedules: dict[tuple[Any, ...], _Schedule] = {}
        self._slots: dict[tuple[Any, ...], Slots] = {}
        self._shared: dict[tuple[Any, ...], dict[Plan, GraphKey]] = {}
        self._calls = self._reusing = self._unknown = 0
        self.reset()

    def reset(self) -> None:
        """Forget the run in progress; the next call starts a new one."""
        self._trajectories: list[_Trajectory] = []
        self._order: float | None = None  # of the last call, in sampling order
        self._index = 0  # calls so far at that timestep
        self._expected: tuple[int, ...] = (1,)  # how many calls there let trajectories go on to the next one
        self._source: torch.UntypedStorage | None = None

    def _make_forward(self) -> Callable[..., Any]:
        @functools.wraps(self.original.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(*args, **kwargs)

        return forward

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.original.training:
            raise ValueError(f"{type(self.original).__name__} is in train mode; call .eval() on the denoiser first.")
        call = bind(self.original, args, kwargs, self._signature, self._timestep)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
            raise ValueError(
                "an optimised denoiser computes no gradients; call the original, or pass inputs without requires_grad."
            )
        with torch.no_grad():
            trajectory = self._advance(call)
            position = trajectory.position
            plan, key = trajectory.schedule.plans[position], trajectory.schedule.graphs[position]
            graph = self._graph(self._captures[call.key], key)
            outputs = graph(*call.tensors, *(trajectory.cache[slot] for slot in key.reads))
        held = dict(zip(key.stores, outputs[graph.results :], strict=True))
        trajectory.cache = {slot: held[slot] if slot in held else trajectory.cache[slot] for slot in plan.held}
        self._calls += 1
        self._reusing += bool(plan.reads)
        return _result(self._captures[call.key].capture, outputs[: graph.results])

    def _advance(self, call: Call) -> _Trajectory:
        """The trajectory that this call belongs to, moved on to its step."""
        step, order = self._find(call.timestep)
        source = _scheduler_storage(call.timestep)
        if (
            self._order is None
            or order < self._order
            or (order == self._order and self._index >= MOST_TRAJECTORIES)
            or (source and self._source and source.data_ptr() != self._source.data_ptr())
        ):
            self.reset()
            self._check_weights()
        if call.key not in self._captures:  # may fail, so nothing of the run in progress is touched before
            self._captures[call.key] = self._capture(call)
        if self._order is not None and order > self._order:
            clear = self._index not in self._expected
            if clear:
                self._trajectories.clear()
            # After a clear, one call at a step is unmistakable, as it is at the start of a run.
            self._expected, self._index = ((self._index, 1) if clear else (self._index,)), 0
        self._order, self._source = order, source
        index, self._index = self._index, self._index + 1
        known = self._trajectories[index] if index < len(self._trajectories) else None
        if known is not None and step is not None and known.next_step == step and known.key == call.key:
            known.position += 1
            known.next_step += 1
            return known
        if step is None:
            start = sum(1 for t in self._mask.timesteps if self._sign * t < order)
            schedule, next_step = self._schedule(call.key, start, leading=True), start
        else:
            schedule, next_step = self._schedule(call.key, step, leading=False), step + 1
        fresh = _Trajectory(call.key, schedule, next_step, 0)
        self._trajectories[index : index + 1] = [fresh]
        return fresh

    def _find(self, timestep: Tensor | None) -> tuple[int | None, float]:
        """(step of the mask or None, position of the timestep in sampling order)."""
        if timestep is None:
            raise ValueError(f"the denoiser was called without a tensor or number for {self._timestep!r}.")
        values = timestep.reshape(-1)
        if values.numel() > 1 and not bool((values == values[0]).all()):
            self._warn_unknown("a batch with different timesteps")
            self.reset()
            return None, float("inf")
        value = values[0].item()
        steps = self._steps_by_dtype.get(timestep.dtype)
        if steps is None:
            # Compared in the dtype of the call: a pipeline may have rounded the scheduler's value to bfloat16.
            steps = {}
            for index, rounded in enumerate(
                torch.tensor(self._mask.timesteps, dtype=torch.float64).to(timestep.dtype).tolist()
            ):
                steps.setdefault(rounded, []).append(index)
            self._steps_by_dtype[timestep.dtype] = steps
        if value in steps:
            candidates = steps[value]
            # Several steps only where rounding made them equal; then the first that is not behind the run.
            behind = self._order if self._order is not None else float("-inf")
            step = next((s for s in candidates if self._sign * self._mask.timesteps[s] > behind), candidates[0])
            return step, self._sign * self._mask.timesteps[step]
        self._warn_unknown(f"timestep {value:g}")
        return None, self._sign * value

    def _warn_unknown(self, what: str) -> None:
        if not self._unknown:
            steps = self._mask.timesteps
            warnings.warn(
                f"the mask ({len(steps)} steps, {steps[0]:g} to {steps[-1]:g}) does not know {what}; such calls compute every "
                "block. Use the scheduler and number of steps that the mask was made for.",
                stacklevel=8,
            )
        self._unknown += 1

    # ---- captures and graphs --------------------------------------------------------------------------------------------

    def _capture(self, call: Call) -> _Captured:
        check_capturable(self.original)
        start = time.perf_counter()
        marked = {*composite_modules(self.original), *self._marked}
        try:
            captured = capture(self.original, call.args, call.kwargs, marked)
        except CaptureError:
            raise
        except Exception as error:
            weights = sorted({f"{str(p.dtype)[6:]} on {p.device}" for p in self.original.parameters()})
            raise type(error)(
                f"{type(self.original).__name__} (weights {', '.join(weights)}) does not run on these inputs "
                f"({describe(call)}): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        self._fingerprint = self._fingerprint or _fingerprint(self.original)
        return _Captured(captured, describe(call), time.perf_counter() - start)

    def _check_weights(self) -> None:
        """Weights or modules replaced since the capture (not updated in place): capture again."""
        if self._captures and _fingerprint(self.original) != self._fingerprint:
            self._drop_captures()

    def _drop_captures(self) -> None:
        self._captures.clear()
        self._fingerprint = ()
        self._schedules.clear()
        self._slots.clear()
        self._shared.clear()
        self.reset()

    def _schedule(self, key: tuple[Any, ...], start: int, leading: bool) -> _Schedule:
        """Plans of the steps from ``start`` on, after one more that computes everything where ``leading``."""
        known = self._schedules.get((key, start, leading))
        if known is None:
            if key not in self._slots:
                self._slots[key] = slot_dependencies(self._captures[key].capture, self._mask.blocks)
            rows = self._mask.compute[start:]
            if leading:
                rows = np.concatenate([np.ones_like(self._mask.compute[:1]), rows])
            plans = plan_run(self._slots[key], self._mask.blocks, rows)
            shared = self._shared[key] = share_graphs(plans, self._shared.get(key, {}))
            known = self._schedules[key, start, leading] = _Schedule(plans, [shared[plan] for plan in plans])
        return known

    def _graph(self, captured: _Captured, key: GraphKey) -> _Graph:
        graph = captured.graphs.get(key)
        if graph is None:
            module = specialise(captured.capture, key)
            results = sum(isinstance(leaf, torch.fx.Node) for leaf in captured.capture.outputs)
            graph = captured.graphs[key] = _Graph(compile_graph(module, self._backend, self._options), results)
        return graph

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Capture the denoiser at these inputs and compile every graph of a whole run, so that no later call has to.

        The values of the inputs do not matter. A run in progress is given up.
        """
        call = bind(self.original, args, kwargs, self._signature, self._timestep)
        self.reset()
        self._check_weights()
        with torch.no_grad():
            if call.key not in self._captures:
                self._captures[call.key] = self._capture(call)
            captured = self._captures[call.key]
            distinct = list(dict.fromkeys(self._schedule(call.key, 0, leading=False).graphs))
            for key in tqdm(distinct, desc="compiling graphs", delay=2, leave=False, disable=None):
                cached = [_empty(captured.capture, slot, call.tensors[0].device) for slot in key.reads]
                self._graph(captured, key)(*call.tensors, *cached)

    def report(self) -> Report:
        """What the mask costs and saves, what was compiled, and what calls so far did."""
        signatures = []
        for key, captured in self._captures.items():
            if key not in self._slots:
                continue
            plans = self._schedule(key, 0, leading=False).plans
            signatures.append(
                SignatureReport(
                    inputs=captured.described,
                    full_macs=self._slots[key].total_macs * self._mask.steps,
                    macs=sum(plan.macs for plan in plans),
                    peak_cache_bytes=max(plan.held_bytes for plan in plans),
                    graphs=len(set(self._schedule(key, 0, leading=False).graphs)),
                    capture_seconds=captured.seconds,
                    compile_seconds=tuple(g.seconds for g in captured.graphs.values() if g.seconds is not None),
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
            cache_bytes=self.cache_bytes,
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes that the runs in progress hold at this moment."""
        return sum(t.untyped_storage().nbytes() for trajectory in self._trajectories for t in trajectory.cache.values())

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
        return OptimizedDenoiser(original, self._mask, backend=self._backend, timestep=self._timestep, options=self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.original, self._mask, self._backend, self._timestep, self._options)

    def __repr__(self) -> str:
        return f"OptimizedDenoiser({type(self.original).__name__}, {self._mask!r}, backend={self._backend!r})"


def _unpickle(original: nn.Module, mask: Mask, backend: Any, timestep: str, options: dict[str, Any]) -> OptimizedDenoiser:
    return OptimizedDenoiser(original, mask, backend=backend, timestep=timestep, options=options)


def _scheduler_storage(timestep: Tensor | None) -> torch.UntypedStorage | None:
    """The memory of the tensor of timesteps that ``timestep`` is one element of, None where it is not.

    ``for t in scheduler.timesteps`` yields views, and ``set_timesteps`` makes a new tensor for every run of a pipeline.
    """
    if timestep is None or any(timestep.stride()):
        return None
    storage = timestep.untyped_storage()
    return storage if storage.nbytes() > timestep.element_size() else None


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Which modules, parameters and buffers a denoiser consists of, and their dtypes and devices; not their values."""
    modules = tuple((name, id(module)) for name, module in model.named_modules())
    tensors = (*model.named_parameters(), *model.named_buffers())
    return modules, tuple((name, id(t), t.dtype, t.device) for name, t in tensors)


def _empty(captured: Capture, slot: Slot, device: torch.device) -> Tensor:
    info = tensor_info(captured.marks[slot])
    strides = captured.marks[slot].meta["val"].stride()
    return torch.empty_strided(info.shape, strides, dtype=info.dtype, device=device).zero_()


def _result(captured: Capture, tensors: tuple[Tensor, ...]) -> Any:
    """Put the tensors back into the structure that the original returns."""
    remaining = iter(tensors)
    leaves = [next(remaining) if isinstance(leaf, torch.fx.Node) else leaf for leaf in captured.outputs]
    return pytree.tree_unflatten(leaves, captured.out_spec)
