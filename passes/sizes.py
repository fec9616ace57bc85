"""Sizes that are symbols: a graph captured for any batch has them in its shapes, and a call says what they are.

What ``torch.export`` took for granted when it traced the denoiser at one batch (a branch taken, a divisibility) is kept as
guards, which each other batch must meet. It also takes every symbol to be at least 2: what a size of 1 does has to be tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils._sympy.printers import PythonPrinter

aten = torch.ops.aten

#: The value of each symbol. The keys are sympy symbols.
Sizes = Mapping[Any, int]


def value_at(value: int | torch.SymInt, sizes: Sizes) -> int:
    """A size, a stride or a number of elements, at given values of its symbols."""
    return value if isinstance(value, int) else int(_at(value.node.expr, sizes))


def shape_at(tensor: Tensor, sizes: Sizes) -> tuple[int, ...]:
    return tuple(value_at(size, sizes) for size in tensor.shape)


def symbols_of(value: Any) -> set[Any]:
    """The symbols in a size, or in the shape and strides of a tensor, or in those of several."""
    if isinstance(value, (list, tuple)):
        return set().union(*map(symbols_of, value))
    if isinstance(value, Tensor):
        return set().union(*map(symbols_of, (*value.shape, *value.stride(), value.storage_offset())))
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt) else set()


def is_size(node: Node) -> bool:
    """Whether a node computes a size, rather than a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def read_at_the_inputs(graph_module: GraphModule, inputs: Sequence[Node]) -> None:
    """Let every symbol be read off the first input that has it, wherever the graph reads it.

    Raises ValueError where a symbol is the size of no input, or a size is read that is not a symbol.
    """
    graph = graph_module.graph
    read: dict[Any, Node] = {}
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        for node in reversed(inputs):
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    read[size.node.expr] = graph.call_function(aten.sym_size.int, (node, dim))
                    read[size.node.expr].meta["val"] = size
    own = set(read.values())
    if missing := symbols_of([node.meta["val"] for node in inputs]) - set(read):
        raise ValueError(f"{sorted(map(str, missing))[0]} is the size of no input")
    for node in list(graph.nodes):
        if node.target is aten.sym_size.int and node not in own:
            if not is_size(node) or node.meta["val"].node.expr not in read:
                raise ValueError(f"a size is read that is not the batch ({node.format_node()})")
            node.replace_all_uses_with(read[node.meta["val"].node.expr])
            graph.erase_node(node)
    for node in own:
        if not node.users:
            graph.erase_node(node)
    graph_module.recompile()


def solve(inputs: Sequence[Node], shapes: Sequence[Sequence[int]], guards: Iterable[Any]) -> dict[Any, int] | None:
    """The values of the symbols in the shapes of ``inputs``, None for other shapes, or where a guard is not met."""
    sizes: dict[Any, int] = {}
    for node, shape in zip(inputs, shapes, strict=True):
        like = node.meta["val"].shape
        if len(like) != len(shape):
            return None
        for size, actual in zip(like, shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                sizes.setdefault(size.node.expr, actual)
    for node, shape in zip(inputs, shapes, strict=True):
        if any(value_at(size, sizes) != actual for size, actual in zip(node.meta["val"].shape, shape, strict=True)):
            return None
    return sizes if all(_at(guard, sizes) in (True, sympy.true) for guard in guards) else None


def guards_of(values: Iterable[Any]) -> tuple[Any, ...]:
    """What was taken for granted of the symbols in fake tensors, but that each is at least 2."""
    mode = detect_fake_mode([value for value in values if isinstance(value, Tensor)])
    return () if mode is None or mode.shape_env is None else guards_in(mode.shape_env)


def guards_in(environment: Any, symbols: Iterable[Any] = (), least: int = 2) -> tuple[Any, ...]:
    """Boolean expressions in the symbols that are left, and in ``symbols``, which may have become something else.

    That each symbol is at least ``least`` is not among them. environment: torch's ShapeEnv.
    """
    became = [sympy.Eq(symbol, environment.replace(symbol)) for symbol in symbols]
    guards = [guard.expr for guard in environment.guards]
    guards += [late.expr for several in environment.deferred_runtime_asserts.values() for late in several]
    for symbol, bounds in environment.var_to_range.items():
        if symbol not in environment.replacements:
            guards += [symbol >= bounds.lower] if bounds.lower > least else []
            guards += [symbol <= bounds.upper] if bounds.upper.is_Integer else []
    replaced = dict.fromkeys([*became, *map(environment.replace, guards)])
    return tuple(guard for guard in replaced if guard not in (True, sympy.true))


def code_of(guards: Iterable[Any], symbols: Sequence[Any]) -> str:
    """Guards as Python code, for ``holds``, in which the symbols are called S0, S1 and so on."""
    names = {symbol: sympy.Symbol(f"S{i}", integer=True, positive=True) for i, symbol in enumerate(symbols)}
    return " and ".join(f"({PythonPrinter().doprint(guard.xreplace(names))})" for guard in guards)


def code_of_values(values: Sequence[int]) -> str:
    """What holds for these values alone."""
    return " and ".join(f"(S{i} == {value})" for i, value in enumerate(values))


def holds(code: str, values: Sequence[int]) -> bool:
    """Whether guards hold, given as code, for these values of their symbols. The code is executed."""
    return not code or bool(eval(code, dict(SYMPY_INTERP), {f"S{i}": value for i, value in enumerate(values)}))


def _at(expression: Any, sizes: Sizes) -> Any:
    return expression.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()})
