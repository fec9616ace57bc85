"""Put compiled regions together to what a plan executes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from maskcompile.compile import Executable
from passes.capture import Capture
from passes.dependencies import result_nodes
from passes.plan import GraphKey
from passes.regions import Region, renames, sizes_read, value_of


@dataclass(frozen=True)
class _Call:
    """run: takes the values at ``inputs``, then the weights, and the sizes; its results are the values at ``outputs``.

    free: values that nobody reads from then on.
    """

    run: Executable
    weights: tuple[Tensor | int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    free: tuple[int, ...]


@dataclass(frozen=True)
class Linked:
    """Executes a plan, region by region; takes and returns what a specialised graph does, see ``passes.specialise``.

    size: how many values there are, the arguments first: for each coefficient a scalar, where the whole graph takes one vector.
    """

    calls: tuple[_Call, ...]
    size: int
    results: tuple[int, ...]

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        values: list[Tensor | None] = [*arguments, *[None] * (self.size - len(arguments))]
        for call in self.calls:
            made = call.run(*[values[i] for i in call.inputs], *call.weights)
            for position, tensor in zip(call.outputs, made, strict=True):
                values[position] = tensor
            for position in call.free:
                values[position] = None
        return tuple(values[i] for i in self.results)  # type: ignore[misc]


def link(capture: Capture, key: GraphKey, regions: Sequence[Region], compiled: Callable[[Region], Executable]) -> Linked:
    """What a specialised graph does, made of its regions, for calls of ``capture.sizes``.

    regions: of ``passes.regions.select_regions``. compiled: makes one executable.
    """
    places: dict[Node, int] = {node: position for position, node in enumerate(capture.inputs)}
    size = len(places)
    twofold: dict[Node, tuple[int, int]] = {}
    for slot, versions in key.reads:
        places[capture.marks[slot]] = size
        if versions == 2:
            twofold[capture.marks[slot]] = size, size + 1
        size += versions
    coefficients = {mark: size + position for position, mark in enumerate(twofold)}
    size += len(coefficients)
    given = size
    unfinished: list[_Call] = []
    for region in regions:
        if renames(region):
            for node in region.nodes:
                places[node] = places[node.all_input_nodes[0]]
            continue
        inputs: list[int] = []
        for node in region.inputs:
            inputs += (*twofold[node], coefficients[node]) if node in region.extrapolated else (places[node],)
        places |= {node: size + position for position, node in enumerate(region.outputs)}
        size += len(region.outputs)
        sizes = (capture.sizes[symbol] for symbol in sizes_read(region, capture))
        weights: tuple[Tensor | int, ...] = (*(value_of(node, capture) for node in region.weights), *sizes)
        outputs = tuple(places[node] for node in region.outputs)
        unfinished.append(_Call(compiled(region), weights, tuple(inputs), outputs, ()))
    wanted = [*result_nodes(capture), *(capture.marks[slot] for slot in key.stores)]
    for node in wanted:
        if node.op == "get_attr" and node not in places:  # a denoiser that returns a weight
            places[node], size = size, size + 1
            unfinished.append(_Call(lambda weight: (weight,), (value_of(node, capture),), (), (places[node],), ()))
    results = tuple(places[node] for node in wanted)
    calls: list[_Call] = []
    read_later = set(results)
    for call in reversed(unfinished):
        last = {*call.inputs, *call.outputs} - read_later
        read_later |= last
        calls.append(replace(call, free=tuple(position for position in last if position >= given)))
    return Linked(tuple(calls[::-1]), size, results)
