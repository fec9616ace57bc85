"""Pass 8: the relaxed graph, in which every block's output is a blend of the fresh and the cached one, by a score.

A mask has no gradient; scores in 0..1 in its place have one: ``cached + score (fresh - cached)``. At scores of 0 and 1 it
computes what a specialised graph computes, except that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from passes.capture import MARK, Capture, Slot
from passes.dependencies import result_nodes

aten = torch.ops.aten


def blendable(capture: Capture, blocks: Sequence[str]) -> tuple[Slot, ...]:
    """The output tensors of ``blocks`` that can be blended: floating point, in call order."""
    chosen = set(blocks)
    slots = (slot for call in capture.calls if call.block in chosen for slot in call.slots)
    return tuple(slot for slot in slots if capture.marks[slot].meta["val"].is_floating_point())


def relax(capture: Capture, blocks: Sequence[str]) -> GraphModule:
    """Build the graph ``(*tensor inputs, *cached, scores) -> (*tensor results, *fresh)``, sharing weights.

    cached, fresh: one for each slot of ``blendable(capture, blocks)``: what takes the part of the block's output where its
    score is 0, and what the block computed. scores: float [len(blocks)], one for all outputs of all calls of a block.
    Differentiable in cached and scores. Outputs that are not floating point are fresh.
    """
    slots = blendable(capture, blocks)
    column = {block: index for index, block in enumerate(blocks)}
    graph = Graph()
    copies: dict[Node, Node] = {node: graph.node_copy(node) for node in capture.inputs}
    cached = {capture.marks[slot]: graph.placeholder(f"maskcompile_cached_{i}") for i, slot in enumerate(slots)}
    scores = graph.placeholder("maskcompile_scores")
    fresh: dict[Node, Node] = {}
    for node in capture.graph_module.graph.nodes:
        if node in copies or node.op in ("placeholder", "output"):
            continue
        if node.target is not MARK:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        fresh[node] = copies[node.args[0]]
        copies[node] = fresh[node]
        if node in cached:
            score = graph.call_function(aten.select.int, (scores, 0, column[node.args[1]]))
            # In the dtype of the block, which a float32 score would not change as a 0-d tensor.
            difference = graph.call_function(aten.sub.Tensor, (fresh[node], cached[node]))
            change = graph.call_function(aten.mul.Tensor, (difference, score))
            copies[node] = graph.call_function(aten.add.Tensor, (cached[node], change))
    graph.output((*(copies[node] for node in result_nodes(capture)), *(fresh[capture.marks[slot]] for slot in slots)))
    return GraphModule(capture.graph_module, graph, class_name="RelaxedDenoiser")
