"""Pass 2: find the blocks, the module calls whose output may be reused.

The default rule reads the graph and the module tree and names no model class. A block is the innermost module that holds at
least two multiplications (convolution, matrix product, attention) which depend on the noisy sample. In a UNet that is each
ResNet block and each attention block; in a transformer attention and feed-forward separately. Where an element of a
``ModuleList`` holds two or more further multiplications beside at most three such modules (the parallel MLP of a
single-stream transformer block, the projections around the one layer of a spatial transformer), the element is the block
instead: otherwise that work could never be skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from passes.capture import Capture, composite_modules, module_of
from passes.sizes import Sizes, shape_at

#: Patterns of module paths ("*" within a path segment, "**" for any number of them) and module types, or a predicate of
#: (path, module).
BlockSelection = Sequence[str | type[nn.Module]] | Callable[[str, nn.Module], bool]

_LARGEST_LAYER = 3  # self-attention, cross-attention, feed-forward

_aten = torch.ops.aten
#: Operations that read only the shape, dtype or device of one of their arguments, and which one that is.
_FORM_ONLY: dict[Any, int] = {
    **dict.fromkeys((_aten.type_as, _aten.expand_as, _aten.view_as, _aten.reshape_as), 1),
    **dict.fromkeys((_aten.empty_like, _aten.full_like, _aten.ones_like, _aten.zeros_like), 0),
    **dict.fromkeys((_aten.rand_like, _aten.randn_like, _aten.randint_like), 0),
    **dict.fromkeys((_aten.new_empty, _aten.new_empty_strided, _aten.new_full, _aten.new_ones, _aten.new_zeros), 0),
    **dict.fromkeys((_aten.sym_size, _aten.sym_stride, _aten.sym_numel), 0),
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and size in bytes of one output tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


@dataclass(frozen=True)
class Block:
    """A block as found in a capture.

    name: module path. kind: "attention", "convolution" or "feed_forward". macs: multiply-accumulates a step, over all calls.
    outputs: the tensors that the model uses of it. calls: how often a step calls it.
    """

    name: str
    kind: str
    macs: int
    outputs: tuple[TensorInfo, ...]
    calls: int = 1


def select_modules(model: nn.Module, selection: BlockSelection | None) -> list[str]:
    """Paths of the modules to mark: those that ``selection`` takes, or every composite module for the default rule.

    Raises ValueError when a pattern or type of the selection takes nothing.
    """
    if selection is None:
        return composite_modules(model)
    modules = [(name, module) for name, module in model.named_modules() if name]
    if callable(selection):
        names = [name for name, module in modules if selection(name, module)]
        if not names:
            raise ValueError(f"the block selection takes no module of {type(model).__name__}.")
        return names
    chosen = set()
    for item in selection:
        if isinstance(item, str):
            taken = {name for name, _ in modules if _matches(tuple(name.split(".")), tuple(item.split(".")))}
        else:
            taken = {name for name, module in modules if isinstance(module, item)}
        if not taken:
            raise ValueError(f"{item!r} takes no module of {type(model).__name__}.")
        chosen |= taken
    return [name for name, _ in modules if name in chosen]


@cache
def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return _matches(path, pattern[1:]) or (bool(path) and _matches(path[1:], pattern))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def default_blocks(capture: Capture, model: nn.Module) -> list[str]:
    """Block paths by the default rule (see the module docstring), in the order in which the denoiser calls them."""
    dependent = depends_on_sample(capture)
    heavy: dict[str, set[Node]] = {}
    for node in capture.macs:
        if node in dependent:
            for path in module_of(node):
                heavy.setdefault(path, set()).add(node)
    called = _in_call_order(capture)
    chosen: list[str] = []
    for path in sorted((p for p in called if p in heavy), key=lambda p: -p.count(".")):
        inner = [c for c in chosen if c.startswith(path + ".")]
        uncovered = heavy[path].difference(*(heavy[c] for c in inner))
        if len(uncovered) < 2:
            continue
        if not inner:
            chosen.append(path)
        elif len(inner) <= _LARGEST_LAYER and _is_element(model, path):
            chosen = [c for c in chosen if c not in inner] + [path]
    return [path for path in called if path in set(chosen)]


def describe_blocks(capture: Capture, names: Sequence[str]) -> tuple[Block, ...]:
    """The named blocks with what the graph knows of them, in call order. Blocks that the capture never called are left out."""
    wanted = set(names)
    nodes: dict[str, list[Node]] = {name: [] for name in wanted}
    for node in capture.graph_module.graph.nodes:
        for path in set(module_of(node)) & wanted:
            nodes[path].append(node)
    blocks = []
    for name in _in_call_order(capture):
        if name in wanted:
            calls = [c for c in capture.calls if c.block == name]
            outputs = tuple(tensor_info(capture.marks[slot], capture.sizes) for call in calls for slot in call.slots)
            macs = sum(capture.macs.get(node, 0) for node in nodes[name])
            blocks.append(Block(name, _kind(nodes[name]), macs, outputs, len(calls)))
    return tuple(blocks)


def tensor_info(node: Node, sizes: Sizes) -> TensorInfo:
    """Shape, dtype and bytes of a node's value, from its fake tensor. sizes: of the symbols in its shape."""
    value = node.meta["val"]
    shape = shape_at(value, sizes)
    return TensorInfo(shape, value.dtype, prod(shape) * value.element_size())


def _in_call_order(capture: Capture) -> list[str]:
    """Marked modules with an output, by their first call; an outer one after those within it."""
    return list(dict.fromkeys(call.block for call in capture.calls if call.slots))


def depends_on_sample(capture: Capture) -> set[Node]:
    """Nodes whose values depend on those of the noisy sample, which is one of them."""
    dependent = {capture.sample}
    for node in capture.graph_module.graph.nodes:
        if any(source in dependent for source in value_inputs(node)):
            dependent.add(node)
    return dependent


def value_inputs(node: Node) -> list[Node]:
    """The nodes whose values ``node`` is made of: not those that it reads only the shape, dtype or device of.

    ``t.type_as(x)`` does not depend on x, though it cannot be executed without it.
    """
    form = _FORM_ONLY.get(getattr(node.target, "overloadpacket", None))
    if form is None or form >= len(node.args):
        return node.all_input_nodes
    read: list[Node] = []
    map_arg((node.args[:form] + node.args[form + 1 :], node.kwargs), read.append)
    return read


def _is_element(model: nn.Module, path: str) -> bool:
    """Whether the module is an element of a ModuleList or Sequential: one of several alike."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(parent, (nn.ModuleList, nn.Sequential))


def _kind(nodes: Sequence[Node]) -> str:
    targets = {str(node.target) for node in nodes if node.op == "call_function"}
    if any("attention" in t or "softmax" in t for t in targets):
        return "attention"
    return "convolution" if any("conv" in t for t in targets) else "feed_forward"
