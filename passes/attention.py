"""What attention attends to, read off the graph: another input (cross), frames of a video (temporal), or positions (spatial).

Attention is *cross* where its keys do not depend on the noisy sample. For the other two, every axis of every tensor is
followed from the axes of the sample through views, permutations and arithmetic: attention is *temporal* where its keys run
along an axis of a video sample other than batch, height and width (the channels end in the first convolution, so what is left
is the frames), and *spatial* else, also where frames and positions are attended to together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.blocks import depends_on_sample
from passes.capture import Capture, module_of

KINDS = ("spatial", "temporal", "cross")

#: A factor of an axis: its size, and the axes of the sample that it came from.
Factor = tuple[int, frozenset[int]]
#: The axes of a tensor, each a product of factors, outermost first.
Axes = list[list[Factor]]

_NOTHING: frozenset[int] = frozenset()
_NEAR = 8  # operations between the product of queries and keys and its softmax: scale, mask, changes of dtype, views
_aten = torch.ops.aten
_PRODUCTS = {_aten.bmm: 0, _aten.matmul: 0, _aten.baddbmm: 1}  # where among the arguments the first factor is


def attention_modules(capture: Capture) -> dict[str, frozenset[str]]:
    """The innermost modules in which attention happens, in call order, each with the kinds (of KINDS) of its attention."""
    dependent = depends_on_sample(capture)
    axes = _follow_axes(capture)
    frames = frozenset(range(1, capture.sample.meta["val"].dim() - 2)) if capture.sample.meta["val"].dim() > 4 else _NOTHING
    found: dict[str, set[str]] = {}
    for node in capture.graph_module.graph.nodes:
        path, keys = module_of(node), _keys(node)
        if keys is None or not path:
            continue
        tensor, axis = keys
        along = _labels(axes[tensor][axis]) if tensor in axes else _NOTHING
        kind = "cross" if tensor not in dependent else "temporal" if along and along <= frames else "spatial"
        found.setdefault(path[-1], set()).add(kind)
    return {path: frozenset(kinds) for path, kinds in found.items()}


def attention_kinds(capture: Capture, blocks: Iterable[str]) -> dict[str, frozenset[str]]:
    """The kinds of attention within each of ``blocks``; a block without attention is left out."""
    modules = attention_modules(capture)
    within = {
        block: frozenset[str]().union(*(kinds for path, kinds in modules.items() if f"{path}.".startswith(f"{block}.")))
        for block in blocks
    }
    return {block: kinds for block, kinds in within.items() if kinds}


def _keys(node: Node) -> tuple[Node, int] | None:
    """(keys, the axis that runs along them) where ``node`` is attention: one operation, or a softmax of a product."""
    operation = _operation(node)
    if "attention" in str(operation) and len(node.args) >= 3 and isinstance(node.args[1], Node):
        return node.args[1], -2
    if operation not in (_aten.softmax, _aten._softmax) or node.args[1] not in (-1, node.meta["val"].dim() - 1):
        return None
    product = _product(node.all_input_nodes[0], _NEAR)
    keys = None if product is None else product.args[_PRODUCTS[_operation(product)] + 1]
    return (keys, -1) if isinstance(keys, Node) else None


def _product(node: Node, near: int) -> Node | None:
    """The product of matrices that ``node`` is made of by operations that keep the number of elements."""
    if _operation(node) in _PRODUCTS:
        return node
    for source in node.all_input_nodes if near and _elements(node) is not None else ():
        if _elements(source) == _elements(node) and (found := _product(source, near - 1)) is not None:
            return found
    return None


def _elements(node: Node) -> int | None:
    """None for what is no tensor, and where the values of tensors decide on it."""
    value = node.meta.get("val")
    number = value.numel() if isinstance(value, Tensor) else None
    return number if isinstance(number, int) else None


def _operation(node: Node) -> Any:
    """The operation of a node whatever its overload."""
    return getattr(node.target, "overloadpacket", node.target) if node.op == "call_function" else None


def _labels(axis: Sequence[Factor]) -> frozenset[int]:
    return _NOTHING.union(*(labels for _, labels in axis))


def _follow_axes(capture: Capture) -> dict[Node, Axes]:
    """The axes of every tensor that comes of the sample, as far as they can be followed; an axis of the batch is label 0."""
    shape = capture.sample.meta["val"].shape
    known: dict[Node, Axes] = {capture.sample: [[(int(size), frozenset({axis}))] for axis, size in enumerate(shape)]}
    for node in capture.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)) and value:  # split, unbind: ``getitem`` takes one, and all are alike in their axes
            value = value[0]
        if node.op == "call_function" and isinstance(value, Tensor) and any(s in known for s in node.all_input_nodes):
            size = [s if isinstance(s, int) else 1 for s in value.shape]
            sized = all(isinstance(s, int) for s in value.shape)  # else the values of tensors decide on them
            known[node] = (_RULES.get(_operation(node), _elementwise) if sized else _unknown)(node, known, size)
    return known


def _blank(size: Sequence[int]) -> Axes:
    return [[(s, _NOTHING)] for s in size]


def _resized(axis: Sequence[Factor], size: int) -> list[Factor]:
    """The axis grown, shrunk or as it was."""
    whole = 1
    for factor, _ in axis:
        whole *= factor
    if size != whole and size % whole == 0:
        return [*axis, (size // whole, _NOTHING)]
    return list(axis) if size == whole else [(size, _labels(axis))]


def _elementwise(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
    """Each axis as it is in an input, aligned at the last one; what has more axes than the result tells nothing."""
    result = _blank(size)
    for source in node.all_input_nodes:
        axes = known.get(source, [])
        if len(axes) <= len(size):
            for axis, factors in zip(range(-len(axes), 0), axes, strict=True):
                if not _labels(result[axis]) and _resized(factors, size[axis]) == factors:
                    result[axis] = factors
    return result


def _view(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
    """The same factors, divided among axes of other sizes; a factor that lies across two of them is split."""
    rest = [factor for axis in known[node.all_input_nodes[0]] for factor in axis if factor[0] != 1]
    result: Axes = []
    for wanted in size:
        axis: list[Factor] = []
        while wanted > 1 and rest:
            factor, labels = rest.pop(0)
            if wanted % factor == 0:
                axis.append((factor, labels))
                wanted //= factor
            elif factor % wanted == 0:
                axis.append((wanted, labels))
                rest.insert(0, (factor // wanted, labels))
                wanted = 1
            else:
                return _blank(size)
        result.append(axis or [(1, _NOTHING)])
    return result


def _permute(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
    axes: Any = known[node.all_input_nodes[0]]
    if _operation(node) is _aten.permute:
        order: Any = node.args[1]
        return [axes[i] for i in order]
    a, b = node.args[1:3] if _operation(node) is _aten.transpose else (0, -1)
    result: Any = list(axes)
    result[a], result[b] = axes[b], axes[a]
    return list(result)


def _drop(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
    axes = list(known[node.all_input_nodes[0]])
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    del axes[dim]
    return axes


def _same_rank(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
    """Axes whose sizes may change: parts, repetitions, interpolation. What is put together keeps the labels of all."""
    sources = [known[s] for s in node.all_input_nodes if s in known and len(known[s]) == len(size)]
    result = [_resized(axis, s) for axis, s in zip(sources[0], size, strict=True)] if sources else _blank(size)
    for other in sources[1:]:
        for axis, s in enumerate(size):
            if not _labels(other[axis]) <= _labels(result[axis]):
                result[axis] = [(s, _labels(result[axis]) | _labels(other[axis]))]
    return result


def _convolution(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
    axes = known.get(node.all_input_nodes[0], [])
    if len(axes) != len(size):
        return _blank(size)
    return [axes[0], [(size[1], _NOTHING)], *(_resized(axis, s) for axis, s in zip(axes[2:], size[2:], strict=True))]


def _multiply(at: int) -> Callable[[Node, dict[Node, Axes], list[int]], Axes]:
    """For products with a matrix, of the argument ``at``: all but its last axis stay."""

    def rule(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
        source = node.args[at]
        axes = known.get(source, []) if isinstance(source, Node) else []
        return [*axes[:-1], [(size[-1], _NOTHING)]] if len(axes) == len(size) else _blank(size)

    return rule


def _item(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
    axes = known[node.all_input_nodes[0]]
    return [_resized(axis, s) for axis, s in zip(axes, size, strict=True)] if len(axes) == len(size) else _blank(size)


def _unknown(node: Node, known: dict[Node, Axes], size: list[int]) -> Axes:
    return _blank(size)


_RULES: dict[Any, Callable[[Node, dict[Node, Axes], list[int]], Axes]] = {
    **dict.fromkeys((_aten.view, _aten.reshape, _aten._unsafe_view, _aten.flatten, _aten.unflatten), _view),
    **dict.fromkeys((_aten.squeeze, _aten.unsqueeze), _view),
    **dict.fromkeys((_aten.permute, _aten.transpose, _aten.t), _permute),
    **dict.fromkeys((_aten.select, _aten.unbind), _drop),
    **dict.fromkeys((_aten.slice, _aten.split, _aten.split_with_sizes, _aten.chunk, _aten.narrow, _aten.cat), _same_rank),
    **dict.fromkeys((_aten.repeat_interleave, _aten.constant_pad_nd, _aten.pad), _same_rank),
    **dict.fromkeys((_aten.upsample_nearest1d, _aten.upsample_nearest2d, _aten.upsample_nearest3d), _same_rank),
    **dict.fromkeys((_aten.convolution, _aten.conv1d, _aten.conv2d, _aten.conv3d), _convolution),
    **dict.fromkeys((_aten.linear, _aten.mm, _aten.matmul, _aten.bmm), _multiply(0)),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm), _multiply(1)),
    **dict.fromkeys((_aten.scaled_dot_product_attention,), _multiply(0)),
    **dict.fromkeys((_aten.einsum, _aten.stack), _unknown),
    operator.getitem: _item,
}
