"""Pass 8: the relaxed graph, in which every block's output is a blend of the fresh and the cached one, by a score.

A mask has no gradient; scores in 0..1 in its place have one: ``cached + score (fresh - cached)``. At scores of 0 and 1 it
computes what a specialised graph computes, except that nothing is left out.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.capture import MARK, Capture, Slot
from passes.dependencies import result_nodes

aten = torch.ops.aten


def blendable(capture: Capture, blocks: Sequence[str]) -> tuple[Slot, ...]:
    """The output tensors of ``blocks`` that can be blended: floating point, in call order."""
    chosen = set(blocks)
    slots = (slot for call in capture.calls if call.block in chosen for slot in call.slots)
    return tuple(slot for slot in slots if capture.marks[slot].meta["val"].is_floating_point())


class _Blend(torch.autograd.Function):
    """``cached + score (fresh - cached)``, whose gradient can leave out the way through ``fresh``."""

    @staticmethod
    def forward(ctx: Any, fresh: Tensor, cached: Tensor, score: Tensor, through: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        change = fresh - cached
        ctx.save_for_backward(change, score)
        ctx.through = through
        # A score of no dimensions changes no dtype but that of such another.
        return cached + change * (score if change.dim() else score.to(change.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: Tensor | None) -> tuple[Tensor | None, ...]:
        if slope is None:
            return None, None, None, None
        change, score = ctx.saved_tensors
        wide = torch.promote_types(slope.dtype, score.dtype)
        return (
            slope * score if ctx.through else None,
            slope * (1 - score) if ctx.needs_input_grad[1] else None,
            (slope * change).sum(dtype=wide) if ctx.needs_input_grad[2] else None,
            None,
        )


def blend(fresh: Tensor, cached: Tensor, score: Tensor, through: bool) -> Tensor:
    """``cached + score (fresh - cached)``, in the dtype of these, whatever that of the score is, 0-d.

    Only where ``through``, which may be False where the score is 0, a gradient is taken through ``fresh``: autograd then skips
    what the block computed.
    """
    blended: Tensor = _Blend.apply(fresh, cached, score, through)
    return blended


def _copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``aten.copy``, which has no derivative: what an assignment to a part of a tensor is captured as."""
    return source.to(into.device, into.dtype).expand(into.shape)


def relax(capture: Capture, blocks: Sequence[str]) -> GraphModule:
    """Build the graph ``(*tensor inputs, *cached, scores, through) -> (*tensor results, *fresh)``, sharing weights.

    cached, fresh: one for each slot of ``blendable(capture, blocks)``: what takes the part of the block's output where its
    score is 0, and what the block computed. scores: float [len(blocks)], one for all outputs of all calls of a block. through:
    one bool for each block, see ``blend``. Differentiable in cached and scores. Outputs that are not floating point are fresh.
    """
    slots = blendable(capture, blocks)
    column = {block: index for index, block in enumerate(blocks)}
    graph = Graph()
    copies: dict[Node, Node] = {node: graph.node_copy(node) for node in capture.inputs}
    cached = {capture.marks[slot]: graph.placeholder(f"maskcompile_cached_{i}") for i, slot in enumerate(slots)}
    scores, through = graph.placeholder("maskcompile_scores"), graph.placeholder("maskcompile_through")
    fresh: dict[Node, Node] = {}
    for node in capture.graph_module.graph.nodes:
        if node in copies or node.op in ("placeholder", "output"):
            continue
        if node.target is not MARK:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.target is aten.copy.default:
                copies[node].target = _copied
            continue
        fresh[node] = copies[node.args[0]]
        copies[node] = fresh[node]
        if node in cached:
            at = column[node.args[1]]
            score = graph.call_function(aten.select.int, (scores, 0, at))
            passes = graph.call_function(operator.getitem, (through, at))
            copies[node] = graph.call_function(blend, (fresh[node], cached[node], score, passes))
    graph.output((*(copies[node] for node in result_nodes(capture)), *(fresh[capture.marks[slot]] for slot in slots)))
    return GraphModule(capture.graph_module, graph, class_name="RelaxedDenoiser")
