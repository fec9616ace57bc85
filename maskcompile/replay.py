"""Replay the steps of a run as CUDA graphs, each one launch.

A CUDA graph is bound to addresses: of the denoiser's inputs, of the cache, of the weights. So a run that replays graphs has an
``Arena``: tensors that its inputs are copied to, and one piece of memory that its cache lies in (``passes.buffers``), both
outside the graphs' own memory pool, which every replay overwrites. Plans that do the same to the same addresses share a
graph. What a run returns is cloned out of the pool.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskcompile.steps import Schedule
from passes.buffers import Buffers
from passes.capture import Slot
from passes.rectify import Version

#: Arenas that a denoiser has at a time: for runs in progress, and for each of its signatures and of the steps that runs take.
MOST_ARENAS = 8

#: Bytes; see ``_packed``.
ALIGNED = 16

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Recorded:
    """replay: executes again what was recorded, on the same memory. results: where the denoiser's results are then."""

    replay: Callable[[], None]
    results: Sequence[Tensor]


class LeaseLost(Exception):
    """A run's arena was taken from it before the step could be executed; the run has to start over."""


@dataclass(eq=False)
class Lease:
    """That a run has an arena, until another run takes it. committed: whether a step of the run has succeeded."""

    arena: Arena
    committed: bool = False

    @property
    def lost(self) -> bool:
        return self.arena.lease is not self

    def end(self) -> None:
        """Give the arena back."""
        if not self.lost:
            self.arena.lease = None

    def replay(self, position: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The denoiser's results at a position of the run that is ``ready``. Raises LeaseLost."""
        with self.arena.lock:
            if self.lost:
                raise LeaseLost
            return self.arena.replay(position, inputs)

    def prepare(self, position: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same at one that is not. Raises LeaseLost, and RuntimeError as ``Arena.prepare`` does."""
        with self.arena.lock:
            if self.lost:
                raise LeaseLost
            return self.arena.prepare(position, inputs)


@dataclass(frozen=True)
class _Bound:
    """A step at its addresses.

    cached, stores: of the arena's memory; a store is None where the graph returns more than the plan keeps. given,
    coefficients: where the step's coefficients are, and where its graph reads them.
    """

    cached: tuple[Tensor, ...]
    stores: tuple[Tensor | None, ...]
    given: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    key: Any


class Arena:
    """The memory of one run at a time, and the graphs recorded on it.

    schedule: that runs follow. inputs: tensors like the denoiser's. like: for a slot, a tensor like its versions (a fake one).
    weights: see ``addresses``. strict: whether to raise where a graph cannot be recorded, rather than to execute it without
    replaying. Graphs are recorded from the second run on, since many an arena never has one.
    """

    def __init__(
        self,
        schedule: Schedule,
        inputs: Sequence[Tensor],
        buffers: Buffers,
        like: Callable[[Slot], Tensor],
        weights: tuple[int, ...],
        strict: bool,
    ) -> None:
        device = inputs[0].device
        self.schedule = schedule
        self.lease: Lease | None = None
        self.leases = 0
        self.lock = threading.Lock()
        self.buffers = buffers
        self.like = like
        self.weights = weights
        self.strict = strict
        self.failure: str | None = None
        with torch.inference_mode(False):  # or later runs outside it could not write to them
            self.memory = torch.zeros(buffers.size, dtype=torch.uint8, device=device)
            self.inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        self.coefficients: dict[Any, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self.bound: dict[int, _Bound] = {}
        self.recorded: dict[Any, Recorded] = {}
        self.ready: dict[int, tuple[_Bound, Recorded]] = {}
        self.stream = current_stream(device)
        self.recorder = Recorder(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and the inputs. What the graphs need besides is in their pool."""
        return self.memory.nbytes + sum(tensor.nbytes for tensor in self.inputs)

    def take(self) -> Lease:
        """Begin a run; whichever had the arena before has lost it."""
        self.lease = Lease(self)
        self.leases += 1
        return self.lease

    def replay(self, position: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The denoiser's results at a position that is ``ready``."""
        bound, recorded = self.ready[position]
        self._enter(bound, inputs)
        recorded.replay()
        return [tensor.clone() for tensor in recorded.results]

    def prepare(self, position: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same at a position that is not. Nothing is recorded in a first run, nor a graph that was never called.

        Raises RuntimeError, where ``strict``, for a graph that cannot be recorded.
        """
        bound = self.bound.get(position)
        if bound is None:
            with torch.inference_mode(False):
                bound = self.bound[position] = self._bind(position)
        self._enter(bound, inputs)
        step = self.schedule.step(position)

        def run() -> Sequence[Tensor]:
            outputs = step.graph(self.inputs, bound.cached, bound.coefficients)
            for output, store in zip(outputs[step.graph.results :], bound.stores, strict=True):
                if store is not None:
                    store.copy_(output)
            return outputs[: step.graph.results]

        if self.leases > 1 and step.graph.called and bound.key not in self.recorded and self.failure is None:
            # Once as it will be recorded, but for the stores: handles of cuBLAS and cuDNN are a thread's own, and Dynamo may
            # have to compile again for these inputs.
            with torch.inference_mode(False), torch.no_grad():
                step.graph(self.inputs, bound.cached, bound.coefficients)
                self._record(bound, run)
        if bound.key not in self.recorded:
            return [tensor.clone() if self._own(tensor) else tensor for tensor in run()]
        self.ready[position] = bound, self.recorded[bound.key]
        return self.replay(position, inputs)

    def record(self, position: int, inputs: Sequence[Tensor]) -> None:
        """Make a position ready, where it can be recorded. The values of the inputs do not matter."""
        self.leases += 1
        while position not in self.ready and self.failure is None:
            self.prepare(position, inputs)

    def _record(self, bound: _Bound, run: Run) -> None:
        try:
            self.recorded[bound.key] = record(run, self.recorder)
        except Exception as error:
            self.failure = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = f"a step cannot be recorded as a CUDA graph: {self.failure}"
            if self.strict:
                raise RuntimeError(f"{reason}; pass cuda_graphs=False.") from error
            warnings.warn(f"{reason}. Steps are executed without replaying.", stacklevel=2)

    def _enter(self, bound: _Bound, inputs: Sequence[Tensor]) -> None:
        stream = current_stream(self.inputs[0].device)
        if stream != self.stream:  # of the last step, whose memory this one overwrites
            stream.wait_stream(self.stream)
            self.stream = stream
            vectors = [vector for own, _ in self.coefficients.values() for vector in own]
            sources = [vector for each in self.bound.values() for vector in each.given]
            for tensor in (self.memory, *self.inputs, *vectors, *sources):
                tensor.record_stream(stream)  # or the allocator might give it away while this stream still works on it
        for own, given in zip((*self.inputs, *self._vectors(bound)), (*inputs, *bound.given), strict=True):
            own.copy_(given, non_blocking=True)

    def _vectors(self, bound: _Bound) -> tuple[Tensor, ...]:
        return self.coefficients[bound.key[0]][0] if bound.given else ()

    def _bind(self, position: int) -> _Bound:
        plan, step = self.schedule.plans[position], self.schedule.step(position)
        key = self.schedule.graphs[plan.key]
        cached = tuple(self._place(version) for version in plan.inputs)
        held = {version.slot: version for version in plan.held if version.step == position}
        stores = tuple(self._place(held[slot]) if slot in held else None for slot in key.stores)
        places = tuple(None if tensor is None else tensor.data_ptr() for tensor in (*cached, *stores))
        if key not in self.coefficients:
            vectors, parts = _packed_like(step.coefficients)
            self.coefficients[key] = vectors, parts
        return _Bound(cached, stores, _packed(step.coefficients), self.coefficients[key][1], (key, places))

    def _place(self, version: Version) -> Tensor:
        """A version's place in the memory, as a tensor of its own."""
        like, start = self.like(version.slot), self.buffers.offset[version]
        whole = self.memory[start : start + like.numel() * like.itemsize].view(like.dtype)
        return whole.as_strided(like.shape, like.stride(), whole.storage_offset())

    def _own(self, tensor: Tensor) -> bool:
        """Whether the next step may overwrite a result."""
        pointer = tensor.untyped_storage().data_ptr()
        return any(pointer == own.untyped_storage().data_ptr() for own in (self.memory, *self.inputs))


def addresses(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Where weights lie. Graphs are bound to that too: weights that were moved away and back are elsewhere."""
    return tuple(tensor.data_ptr() for tensor in tensors)


def obstacle(inputs: Sequence[Tensor]) -> str | None:
    """Why the graphs of a denoiser with these inputs cannot be replayed, None where they can."""
    devices = {tensor.device for tensor in inputs}
    if all(device.type == "cuda" for device in devices) and len(devices) == 1:
        return None
    return f"CUDA graphs need all inputs on one CUDA device; these are on {', '.join(sorted(map(str, devices)))}"


class Recorder:
    """What the graphs of an arena share. A stream of its own: torch's default one belongs to the device that recorded first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


def record(run: Run, recorder: Recorder | None) -> Recorded:
    """Capture ``run`` as a CUDA graph, without executing it."""
    assert recorder is not None
    graph = torch.cuda.CUDAGraph()
    errors = []
    with torch.cuda.device(recorder.device):
        before = torch.cuda.current_stream()
        # Workspaces of cuBLAS that lie in the graphs' pool must not be found there by others, nor others' by the graphs.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, pool=recorder.pool, stream=recorder.stream, capture_error_mode="thread_local"):
                try:
                    results = run()
                except Exception as error:
                    errors.append(error)
                    raise
        except Exception as error:
            _leave(before, recorder)
            first = (*errors, error)[0]  # what ends a capture that failed raises an error of its own
            raise first from first.__cause__
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    return Recorded(graph.replay, results)


def _leave(stream: torch.cuda.Stream, recorder: Recorder) -> None:
    """Undo what torch before 2.12 leaves of a capture that failed: its stream, its pool in use, generators that wait for it."""
    torch.cuda.set_stream(stream)
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(stream.device_index, recorder.pool)
    graph = torch.cuda.CUDAGraph()
    with suppress(Exception), torch.cuda.graph(graph, stream=recorder.stream, capture_error_mode="thread_local"):
        torch.zeros(1, device=stream.device)  # its end sets the generators right
    torch.cuda.set_stream(stream)


def current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _by_dtype(coefficients: Sequence[Tensor]) -> list[list[int]]:
    dtypes = list(dict.fromkeys(c.dtype for c in coefficients))
    return [[i for i, c in enumerate(coefficients) if c.dtype == dtype] for dtype in dtypes]


def _packed(coefficients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Scalars as one tensor of each dtype, so that few copies bring them to where a graph reads them; a vector as it is.

    A row for each, of ``ALIGNED`` bytes: Inductor's code clones inputs that lie at other addresses than multiples of that.
    """
    if coefficients and coefficients[0].dim():
        return tuple(coefficients)
    groups = [torch.stack([coefficients[i] for i in group]) for group in _by_dtype(coefficients)]
    return tuple(group[:, None].expand(-1, ALIGNED // group.itemsize).contiguous() for group in groups)


def _packed_like(coefficients: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(empty tensors like ``_packed``, the coefficients as parts of them)"""
    with torch.inference_mode(False):
        vectors = tuple(torch.empty_like(vector) for vector in _packed(coefficients))
    if coefficients and coefficients[0].dim():
        return vectors, vectors
    places = {
        i: vector[j, 0] for vector, group in zip(vectors, _by_dtype(coefficients), strict=True) for j, i in enumerate(group)
    }
    return vectors, tuple(places[i] for i in range(len(coefficients)))
