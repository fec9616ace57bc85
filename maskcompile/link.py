"""Put compiled regions together to what a plan executes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from maskcompile.compile import CompiledRegion
from passes.capture import Capture
from passes.dependencies import result_nodes
from passes.plan import GraphKey
from passes.regions import Region, renames, sizes_read, value_of


@dataclass(frozen=True)
class _Call:
    """region: takes the values at ``inputs``, then the weights, and the sizes; its results are the values at ``outputs``.

    free: values that nobody reads from then on.
    """

    region: CompiledRegion
    weights: tuple[Tensor | int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    free: tuple[int, ...]


class Linked:
    """Executes a plan, region by region; takes and returns what a specialised graph does, see ``passes.specialise``.

    It is one Python function, ``source``, a line for each region, as Inductor makes one of the kernels of a graph. A region is
    handed what it is the last to read, and lets go of it as soon as it can, so that its results may lie where that was.

    given: how many values are arguments: for each coefficient a scalar, where the whole graph takes one vector. weights:
    values that are weights as they are, for a denoiser that returns one.
    """

    def __init__(self, calls: Sequence[_Call], given: int, results: Sequence[int], weights: dict[int, Tensor | int]) -> None:
        self.source = _source(calls, given, results)
        self._regions = {f"region{number}": call.region for number, call in enumerate(calls)}
        self._names: dict[str, Any] = dict(self._regions)
        self._names |= {f"weights{number}": call.weights for number, call in enumerate(calls)}
        self._names |= {f"v{position}": weight for position, weight in weights.items()}
        exec(compile(self.source, "<plan>", "exec"), self._names)
        self._run: Callable[..., tuple[Tensor, ...]] = self._names.pop("run")
        self._ran = False

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        results = self._run(*arguments)
        if not self._ran:
            self._names.update({name: region.run for name, region in self._regions.items()})
            self._ran = True
        return results


def _source(calls: Sequence[_Call], given: int, results: Sequence[int]) -> str:
    def listed(positions: Iterable[int]) -> str:
        return "".join(f"v{position}, " for position in positions)

    lines = [f"def run({listed(range(given))}):"]
    for number, call in enumerate(calls):
        lines.append(f"    inputs = [{listed(call.inputs)}*weights{number}]")
        mine = [position for position in call.free if position in call.inputs]
        lines += [f"    del {listed(mine)}"] if mine else []
        lines.append(f"    {listed(call.outputs)}= region{number}(inputs)")
        unread = [position for position in call.free if position not in call.inputs]
        lines += [f"    del {listed(unread)}"] if unread else []
    return "\n".join([*lines, f"    return ({listed(results)})", ""])


def link(capture: Capture, key: GraphKey, regions: Sequence[Region], compiled: Callable[[Region], CompiledRegion]) -> Linked:
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
    returned: dict[int, Tensor | int] = {}
    for node in wanted:
        if node.op == "get_attr" and node not in places:
            places[node], size = size, size + 1
            returned[places[node]] = value_of(node, capture)
    results = tuple(places[node] for node in wanted)
    calls: list[_Call] = []
    read_later = set(results)
    for call in reversed(unfinished):
        last = {*call.inputs, *call.outputs} - read_later
        read_later |= last
        calls.append(replace(call, free=tuple(sorted(position for position in last if position >= given))))
    return Linked(calls[::-1], given, results, returned)
