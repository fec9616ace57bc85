"""Pass 7: the specialised graph of a plan, in which reused blocks and all that only they needed do not exist.

Nothing is deleted from the captured graph. The specialised graph is built from its results backwards, so that an operation is
there if and only if something live needs it; no judgement on the purity of operations is involved (export counts eval-mode
dropout, attention and metadata checks as impure, and generic dead code elimination would keep skipped blocks alive).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.capture import MARK, Capture, Slot
from passes.dependencies import result_nodes
from passes.narrow import narrow_linear, narrowed
from passes.plan import GraphKey

aten = torch.ops.aten


def specialise(capture: Capture, key: GraphKey, narrow: bool = False) -> GraphModule:
    """Build the graph ``(*tensor inputs, *cached versions, coefficients) -> (*tensor results, *stores)``, sharing weights.

    Inputs and results are those of the denoiser in pytree order, versions and stores in the order of ``key``, the newer
    version of a slot first. coefficients: float [n], the c of each of the n reads of two versions (see ``passes.reuse``); no
    such input where there are none. Outputs may share memory with each other and with inputs, as those of any graph.
    narrow: linear layers compute only what is read of them (see ``passes.narrow``); results may then differ in their last bits.
    """
    reused = {capture.marks[slot] for slot, _ in key.reads}
    results, stores = result_nodes(capture), [capture.marks[slot] for slot in key.stores]
    live = _live_nodes([*results, *stores], reused)
    parts = narrowed(live, {*results, *stores}) if narrow else {}
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in capture.inputs:
        copies[node] = graph.node_copy(node)
    versions: dict[Slot, list[Node]] = {}
    for position, (slot, number) in enumerate(key.reads):
        versions[slot] = [graph.placeholder(f"maskcompile_cached_{position}_{age}") for age in range(number)]
        for placeholder in versions[slot]:
            placeholder.meta["val"] = capture.marks[slot].meta["val"]
    for like in coefficients_like(capture, key):
        coefficients = graph.placeholder("maskcompile_coefficients")  # a name that no argument of a denoiser has
        coefficients.meta["val"] = like
    indices = iter(range(len(versions)))
    for slot, nodes in versions.items():
        value = nodes[0]
        if len(nodes) == 2:
            value = extrapolate(graph, nodes, graph.call_function(aten.select.int, (coefficients, 0, next(indices))))
        copies[capture.marks[slot]] = value
    for node in capture.graph_module.graph.nodes:
        if node in copies or node not in live:
            continue
        if node.target is MARK:
            copies[node] = copies[node.args[0]]
        elif node in parts:
            copies[node] = narrow_linear(graph, node, copies, parts[node])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in (*results, *stores)))
    return GraphModule(capture.graph_module, graph, class_name="SpecialisedDenoiser")


def coefficients_like(capture: Capture, key: GraphKey, apart: bool = False) -> tuple[Tensor, ...]:
    """Fake tensors like the last inputs of the graph of ``key``: a vector, or scalars where ``apart``, if any."""
    scalars = tuple(scalar_like(capture.marks[slot].meta["val"]) for slot, versions in key.reads if versions == 2)
    if apart or not scalars:
        return scalars
    dtype = max((scalar.dtype for scalar in scalars), key=lambda dtype: dtype.itemsize)
    return (scalars[0].new_empty(len(scalars), dtype=dtype),)


def extrapolate(graph: Graph, versions: Sequence[Node], c: Node) -> Node:
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


def scalar_like(value: Tensor) -> Tensor:
    """A scalar of the dtype of the c of an extrapolation of ``value``, beside it."""
    return value.new_empty((), dtype=_arithmetic(value.dtype))


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
