"""Pass 6: the specialised graph of a plan, in which reused blocks and all that only they needed do not exist.

Nothing is deleted from the captured graph. The specialised graph is built from its results backwards, so that an operation is
there if and only if something live needs it; no judgement on the purity of operations is involved (export counts eval-mode
dropout, attention and metadata checks as impure, and generic dead code elimination would keep skipped blocks alive).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Graph, GraphModule, Node

from passes.blocks import tensor_info
from passes.capture import MARK, Capture
from passes.dependencies import result_nodes
from passes.plan import GraphKey


def specialise(capture: Capture, key: GraphKey) -> GraphModule:
    """Build the graph ``(*tensor inputs, *cached reads) -> (*tensor results, *stores)``, weights shared with the capture.

    Inputs and results are those of the denoiser in pytree order, reads and stores in the order of ``key``. The tensors to
    store never share memory with an input or a result, which the caller may change in place.
    """
    reused = {capture.marks[slot] for slot in key.reads}
    results, stores = result_nodes(capture), [capture.marks[slot] for slot in key.stores]
    live = _live_nodes([*results, *stores], reused)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in capture.inputs:
        copies[node] = graph.node_copy(node)
    for position, slot in enumerate(key.reads):
        copies[capture.marks[slot]] = _reuse(graph, position, capture.marks[slot])
    for node in capture.graph_module.graph.nodes:
        if node in copies or node not in live:
            continue
        if node.target is MARK:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    private = _Memory(graph, [copies[n] for n in capture.inputs], [copies[n] for n in reused])
    returned = [private.result(copies[node]) for node in results]
    kept = [private.store(copies[node]) for node in stores]
    graph.output((*returned, *kept))
    return GraphModule(capture.graph_module, graph, class_name="SpecialisedDenoiser")


def _reuse(graph: Graph, position: int, mark: Node) -> Node:
    """What stands for a reused output. The rule is *hold*: the stored tensor itself, a new input of the graph."""
    placeholder = graph.placeholder(f"cached_{position}")
    placeholder.meta["val"] = mark.meta["val"]
    return placeholder


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


class _Memory:
    """Keeps cached tensors apart from what the caller can write to, by clones where the graph would return an alias."""

    def __init__(self, graph: Graph, inputs: list[Node], cached: list[Node]) -> None:
        self.graph = graph
        self.cached = set(cached)
        self.taken = {*inputs, *cached}

    def result(self, node: Node) -> Node:
        if _base(node) in self.cached:
            return self._clone(node)
        self.taken.add(_base(node))
        return node

    def store(self, node: Node) -> Node:
        base = _base(node)
        # A view of a larger tensor would keep all of that alive.
        if base in self.taken or tensor_info(base).bytes != tensor_info(node).bytes:
            return self._clone(node)
        self.taken.add(base)
        return node

    def _clone(self, node: Node) -> Node:
        clone = self.graph.call_function(torch.ops.aten.clone.default, (node,))
        clone.meta["val"] = node.meta["val"]
        return clone


def _base(node: Node) -> Node:
    """The node whose memory ``node`` may be a view of, itself where it is none."""
    while True:
        # An element of a multi-output view (split, chunk) is a view too.
        source = node.args[0] if node.target is operator.getitem else node
        if not (isinstance(source, Node) and source.all_input_nodes and _may_alias(source)):
            return node
        node = source.all_input_nodes[0]


def _may_alias(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(returned.alias_info is not None for returned in node.target._schema.returns)
