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

    Inputs and results are those of the denoiser in pytree order, versions and stores in the order of ``key``, the newest
    version of a slot first. coefficients: float [n], one for each version but the newest of a slot (see ``passes.reuse``); no
    such input where n is 0. Outputs may share memory with each other and with inputs, as those of any graph.
    """
    reused = {capture.marks[slot] for slot, _ in key.reads}
    results, stores = result_nodes(capture), [capture.marks[slot] for slot in key.stores]
    live = _live_nodes([*results, *stores], reused)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in capture.inputs:
        copies[node] = graph.node_copy(node)
    versions: dict[Slot, list[Node]] = {}
    for slot, number in key.reads:
        versions[slot] = []
        for age in range(number):
            versions[slot].append(graph.placeholder(f"cached_{len(versions) - 1}_{age}"))
            versions[slot][-1].meta["val"] = capture.marks[slot].meta["val"]
    terms = _terms(graph, versions)
    for slot in versions:
        copies[capture.marks[slot]] = _reuse(graph, versions[slot][0], terms[slot])
    for node in capture.graph_module.graph.nodes:
        if node in copies or node not in live:
            continue
        if node.target is MARK:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in (*results, *stores)))
    return GraphModule(capture.graph_module, graph, class_name="SpecialisedDenoiser")


def _terms(graph: Graph, versions: Mapping[Slot, Sequence[Node]]) -> dict[Slot, list[tuple[Node, Node]]]:
    """(c_j, y_j) of each older version y_j of each slot; the c_j are elements of one new input, in order."""
    older = [(slot, version) for slot, (_, *rest) in versions.items() for version in rest]
    terms: dict[Slot, list[tuple[Node, Node]]] = {slot: [] for slot in versions}
    if older:
        values = [version.meta["val"] for _, version in older]
        double = any(value.dtype in (torch.float64, torch.complex128) for value in values)
        coefficients = graph.placeholder("coefficients")
        coefficients.meta["val"] = values[0].new_empty(len(older), dtype=torch.float64 if double else torch.float32)
        for index, (slot, version) in enumerate(older):
            terms[slot].append((graph.call_function(aten.select.int, (coefficients, 0, index)), version))
    return terms


def _reuse(graph: Graph, newest: Node, terms: Sequence[tuple[Node, Node]]) -> Node:
    """What stands for a reused output: ``y_a + sum_j c_j (y_a - y_j)``; half precision is rounded once, at the end.

    terms: (c_j, y_j). A compiler fuses these operations with each other and with what reads the result.
    """
    if not terms:
        return newest
    dtype = newest.meta["val"].dtype
    narrow = dtype.is_floating_point and dtype.itemsize < 4

    def wide(node: Node) -> Node:
        return graph.call_function(aten.to.dtype, (node, torch.float32)) if narrow else node

    value = last = wide(newest)
    for coefficient, older in terms:
        difference = graph.call_function(aten.sub.Tensor, (last, wide(older)))
        value = graph.call_function(aten.add.Tensor, (value, graph.call_function(aten.mul.Tensor, (difference, coefficient))))
    return graph.call_function(aten.to.dtype, (value, dtype)) if narrow else value


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
