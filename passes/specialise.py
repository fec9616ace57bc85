"""Pass 6: the specialised graph of a plan, in which reused blocks and all that only they needed do not exist.

Nothing is deleted from the captured graph. The specialised graph is built from its results backwards, so that an operation is
there if and only if something live needs it; no judgement on the purity of operations is involved (export counts eval-mode
dropout, attention and metadata checks as impure, and generic dead code elimination would keep skipped blocks alive).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, GraphModule, Node

from passes.capture import MARK, Capture
from passes.dependencies import result_nodes
from passes.plan import GraphKey


def specialise(capture: Capture, key: GraphKey) -> GraphModule:
    """Build the graph ``(*tensor inputs, *cached reads) -> (*tensor results, *stores)``, weights shared with the capture.

    Inputs and results are those of the denoiser in pytree order, reads and stores in the order of ``key``. Outputs may share
    memory with each other and with inputs, as those of any graph.
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
    graph.output(tuple(copies[node] for node in (*results, *stores)))
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
