"""What a run executes: its plans, each with its graph and with where in the cache the graph finds what it reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from maskcompile.compile import Executable
from passes.plan import GraphKey, Plan
from passes.rectify import Version

Pick = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass
class Graph:
    """A specialised graph, executable.

    weights: that it may return as they are. coefficients: its last inputs, fake: a vector, or scalars. results: how many of
    its first outputs are the denoiser's. shared: outputs that share memory and are cloned. seconds: of making it, and of the
    first call, which compiles. Both known from then on.
    """

    run: Executable
    weights: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
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


@dataclass(frozen=True)
class Step:
    """A plan that can be executed.

    take: what the graph reads, of the cache before the step. coefficients: the graph's last arguments. keep: the
    cache after the step, of the cache before it and the outputs of the graph. reuses: whether anything is reused.
    """

    graph: Graph
    take: Pick
    coefficients: tuple[Tensor, ...]
    keep: Pick
    reuses: bool

    def __call__(self, inputs: Sequence[Tensor], cache: tuple[Tensor, ...]) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
        """(outputs of the graph, the cache after the step)"""
        outputs = self.graph(inputs, self.take(cache), self.coefficients)
        return outputs, self.keep((*cache, *outputs))


@dataclass
class Schedule:
    """The plans of a run under a mask, and what executes them as far as it has been made.

    graphs: which graph executes a plan's. graph: makes one. assemble: the denoiser's result of its tensors. coefficients: as
    the graphs take them, made once, so that nothing is copied to a device at every step.
    """

    plans: list[Plan]
    graphs: Mapping[GraphKey, GraphKey]
    graph: Callable[[GraphKey], Graph]
    assemble: Callable[[Sequence[Tensor]], Any]
    steps: dict[int, Step] = field(default_factory=dict)
    coefficients: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict)

    def step(self, position: int) -> Step:
        """The plan at ``position``, with its graph made where it is the first that needs it."""
        step = self.steps.get(position)
        if step is None:
            plan = self.plans[position]
            key = self.graphs[plan.key]
            step = self.steps[position] = _step(plan, position, self.held(position - 1), key, self.graph(key), self)
        return step

    def held(self, position: int) -> tuple[Version, ...]:
        """The versions in the cache after a position, in the order of their tensors."""
        return tuple(sorted(self.plans[position].held)) if position >= 0 else ()


def _step(plan: Plan, position: int, before: tuple[Version, ...], key: GraphKey, graph: Graph, schedule: Schedule) -> Step:
    places = {version: place for place, version in enumerate(before)}
    take = _pick([places[version] for version in plan.inputs])
    if len(set(plan.inputs)) < len(plan.inputs):
        take = _distinct(take)
    # A shared graph may return more than this plan stores; that is not the run's to keep.
    stored = {Version(slot, position): len(before) + graph.results + place for place, slot in enumerate(key.stores)}
    keep = _pick([(places | stored)[version] for version in schedule.held(position)])
    return Step(graph, take, _coefficients(schedule, graph, plan), keep, bool(plan.inputs))


def _pick(places: Sequence[int]) -> Pick:
    if len(places) > 1:
        return itemgetter(*places)
    return (lambda values: (values[places[0]],)) if places else (lambda values: ())


def _distinct(take: Pick) -> Pick:
    """A tensor that is taken twice as two, for torch.compile specialises on inputs that are the same one."""

    def taken(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        tensors = take(values)
        return tuple(t.detach() if any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors))

    return taken


def _coefficients(schedule: Schedule, graph: Graph, plan: Plan) -> tuple[Tensor, ...]:
    """The last inputs of the graph for this plan."""
    likes = graph.coefficients
    values = [plan.coefficients] if likes and likes[0].dim() else plan.coefficients
    key = tuple((like.dtype, like.device) for like in likes), tuple(values)
    if key not in schedule.coefficients:
        schedule.coefficients[key] = tuple(
            torch.tensor(value, dtype=like.dtype, device=like.device) for value, like in zip(values, likes, strict=True)
        )
    return schedule.coefficients[key]


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
