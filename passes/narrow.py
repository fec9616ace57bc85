"""A part of specialisation: linear layers of which a graph needs only a part compute only that part.

Transformers make the shifts, scales and gates of a layer in one linear layer of the condition, and split its output (adaLN,
arXiv 2212.09748). A step that reuses attention and feed-forward still needs the gates, a third of it. Such a layer has a few
rows to multiply, so that its time is that of reading its weights: for DiT-XL/2 a third of all there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.capture import MARK

aten = torch.ops.aten

#: [start, end) each, in order, along the last dimension
Ranges = tuple[tuple[int, int], ...]

#: Share of a layer that may be read. Where it has many rows to multiply, less is saved than is spent on putting parts together.
MOST_READ = 0.75


def narrowed(live: Collection[Node], results: Collection[Node]) -> dict[Node, Ranges]:
    """The linear layers of a graph of which less than all is read, and what is.

    live: the operations of the graph. results: those of them whose values leave it.
    """
    found = {}
    for node in live:
        if node.target is aten.linear.default and _plain(node):
            width = node.meta["val"].shape[-1]
            ranges = _joined(_read(node, live, results))
            if 0 < sum(end - start for start, end in ranges) <= MOST_READ * width:
                found[node] = ranges
    return found


def _plain(node: Node) -> bool:
    """Whether weight and bias are parameters of the usual shapes."""
    _, weight, *bias = node.args
    if not isinstance(weight, Node) or weight.op != "get_attr" or node.meta["val"].dim() < 2 or node.kwargs:
        return False
    width = node.meta["val"].shape[-1]
    shapes = [b.meta["val"].shape for b in bias if isinstance(b, Node)]
    return weight.meta["val"].dim() == 2 and weight.meta["val"].shape[0] == width and all(shape == (width,) for shape in shapes)


def narrow_linear(graph: Graph, node: Node, copies: Mapping[Node, Node], ranges: Ranges) -> Node:
    """The output of a linear layer where it is read, and zeros where it is not. copies: what stands for its arguments."""
    x, *weights = (copies[argument] if isinstance(argument, Node) else argument for argument in node.args)
    width = node.meta["val"].shape[-1]
    pieces: list[Node] = []
    done = 0
    for start, end in ranges:
        part = [w and graph.call_function(aten.slice.Tensor, (w, 0, start, end)) for w in weights]  # no bias is None
        piece = graph.call_function(aten.linear.default, (x, *part))
        pad = [start - done, width - end if end == ranges[-1][1] else 0]
        pieces.append(graph.call_function(aten.constant_pad_nd.default, (piece, pad)) if any(pad) else piece)
        done = end
    return graph.call_function(aten.cat.default, (pieces, -1)) if len(pieces) > 1 else pieces[0]


def _read(node: Node, live: Collection[Node], results: Collection[Node]) -> list[tuple[int, int]]:
    """What is read of a tensor along its last dimension."""
    value = node.meta["val"]
    everything = [(0, value.shape[-1])]
    if node in results:
        return everything
    found: list[tuple[int, int]] = []
    for user in (user for user in node.users if user in live):
        last = value.dim() - 1
        if user.kwargs:  # torch.export leaves none
            return everything
        if user.target is MARK or (user.target is aten.unsqueeze.default and user.args[1] not in (-1, value.dim())):
            found += _read(user, live, results)
        elif user.target is aten.slice.Tensor and _argument(user, 1, 0) in (-1, last) and _argument(user, 4, 1) == 1:
            start, length = _argument(user, 2, None) or 0, value.shape[-1]
            if not isinstance(start, int) or not isinstance(user.meta["val"].shape[-1], int):  # counted in a size of the call
                return everything
            found += _shifted(user, min(max(start + length if start < 0 else start, 0), length), live, results)
        elif user.target in (aten.split.Tensor, aten.split_with_sizes.default) and _argument(user, 2, 0) in (-1, last):
            offsets = [0]
            for part in user.meta["val"]:
                offsets.append(offsets[-1] + part.shape[-1])
            for part in (part for part in user.users if part in live):
                if part.target is not getitem:
                    return everything
                found += _shifted(part, offsets[part.args[1]], live, results)  # type: ignore[index]
        else:
            return everything
    return found


def _argument(node: Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _shifted(part: Node, offset: int, live: Collection[Node], results: Collection[Node]) -> list[tuple[int, int]]:
    return [(offset + start, offset + end) for start, end in _read(part, live, results)]


def _joined(ranges: list[tuple[int, int]]) -> Ranges:
    """In order, those that touch or overlap made one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if start == end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return tuple(found)
