"""Pass 7: the specialised graph of a plan, in which reused blocks and all that only they needed do not exist.

Nothing is deleted from the captured graph. The specialised graph is built from its results backwards, so that an operation is
there if and only if something live needs it; no judgement on the purity of operations is involved (export counts eval-mode
dropout, attention and metadata checks as impure, and generic dead code elimination would keep skipped blocks alive).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from passes.capture import MARK, Capture, Slot
from passes.dependencies import result_nodes
from passes.plan import GraphKey

aten = torch.ops.aten


def specialise(capture: Capture, key: GraphKey) -> GraphModule:
    """Build the graph ``(*tensor inputs, *cached versions, coefficients) -> (*tensor results, *stores)``, sharing weights.

    Inputs and results are those of the denoiser in pytree order, versions and stores in the order of ``key``, the newer
    version of a slot first. coefficients: float [n], the c of each of the n reads of two versions (see ``passes.reuse``); no
    such input where there are none. Outputs may share memory with each other and with inputs, as those of any graph.
    """
    reused = {capture.marks[slot] for slot, _ in key.reads}
    results, stores = result_nodes(capture), [capture.marks[slot] for slot in key.stores]
    live = _live_nodes([*results, *stores], reused)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in capture.inputs:
        copies[node] = graph.node_copy(node)
    versions: dict[Slot, list[Node]] = {}
    for position, (slot, number) in enumerate(key.reads):
        versions[slot] = [graph.placeholder(f"maskcompile_cached_{position}_{age}") for age in range(number)]
        for placeholder in versions[slot]:
            placeholder.meta["val"] = capture.marks[slot].meta["val"]
    coefficients = _coefficients(graph, versions)
    for slot, nodes in versions.items():
        copies[capture.marks[slot]] = _extrapolate(graph, nodes, coefficients[slot]) if len(nodes) == 2 else nodes[0]
    for node in capture.graph_module.graph.nodes:
        if node in copies or node not in live:
            continue
        if node.target is MARK:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in (*results, *stores)))
    return GraphModule(capture.graph_module, graph, class_name="SpecialisedDenoiser")


def _coefficients(graph: Graph, versions: Mapping[Slot, Sequence[Node]]) -> dict[Slot, Node]:
    """The c of each slot of two versions, elements of one new input of the graph."""
    slots = [slot for slot, nodes in versions.items() if len(nodes) == 2]
    if not slots:
        return {}
    values = [versions[slot][0].meta["val"] for slot in slots]
    double = any(_arithmetic(value.dtype) == torch.float64 for value in values)
    # A name that no argument of a denoiser has.
    coefficients = graph.placeholder("maskcompile_coefficients")
    coefficients.meta["val"] = values[0].new_empty(len(slots), dtype=torch.float64 if double else torch.float32)
    return {slot: graph.call_function(aten.select.int, (coefficients, 0, index)) for index, slot in enumerate(slots)}


def _extrapolate(graph: Graph, versions: Sequence[Node], c: Node) -> Node:
    """``last + c (last - before)``, in float32 for half precision, and ``last`` where that is not finite.

    It is not where half precision overflows, or where the outputs themselves are infinite, as masks of attention are. A
    compiler fuses all of it with what reads the result.
    """
    newest, before = versions
    dtype = newest.meta["val"].dtype
    wide = _arithmetic(dtype)
    last, c = newest, graph.call_function(aten.to.dtype, (c, wide))
    if dtype.is_floating_point and dtype != wide:
        last, before = (graph.call_function(aten.to.dtype, (node, wide)) for node in (last, before))
    difference = graph.call_function(aten.sub.Tensor, (last, before))
    value = graph.call_function(aten.add.Tensor, (last, graph.call_function(aten.mul.Tensor, (difference, c))))
    if dtype.is_floating_point and dtype != wide:
        value = graph.call_function(aten.to.dtype, (value, dtype))
    return graph.call_function(aten.where.self, (graph.call_function(aten.isfinite.default, (value,)), value, newest))


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The real dtype to extrapolate in: double for double precision, else single."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _live_nodes(roots: Iterable[Node], reused: set[Node]) -> set[Node]:
    live: set[Node] = set()
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            if node not in reused:
                pending.extend(node.all_input_nodes)
    return live
