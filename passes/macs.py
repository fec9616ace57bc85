"""Multiply-accumulates of graph nodes, counted without computing anything.

``torch.utils.flop_counter.FlopCounterMode`` counts two FLOPs for a multiply-accumulate, and convolutions, matrix products and
attention (both of its products) only: the convention of the DiT and DDPM papers. Normalisations and pointwise work are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from passes.sizes import Sizes, shape_at, value_at


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of both products, from the shapes [batch, heads, tokens, width]."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# Torch before 2.15 counts what attention becomes on a GPU and on the meta device, but not what it becomes on a CPU.
if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
    register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)(_attention_flops)


def count_macs(graph_module: GraphModule, sizes: Sizes | None = None) -> dict[Node, int]:
    """MACs of each node of an exported graph that has any, from the fake tensors in ``node.meta["val"]``.

    sizes: of the symbols in their shapes, where there are any.
    """
    values = [node.meta["val"] for node in graph_module.graph.nodes if "val" in node.meta]
    fake_mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
    macs: dict[Node, int] = {}
    if fake_mode is None:
        return macs
    if sizes:
        fake_mode = FakeTensorMode()
    attributes: dict[str, Any] = {}
    with_sizes: dict[Node, Any] = {}

    def sized(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            strides = [value_at(stride, sizes or {}) for stride in value.stride()]
            return torch.empty_strided(shape_at(value, sizes or {}), strides, dtype=value.dtype, device=value.device)
        return value_at(value, sizes or {}) if isinstance(value, torch.SymInt) else value

    def value_of(node: Node) -> Any:
        if "val" in node.meta and sizes:
            if node not in with_sizes:
                with_sizes[node] = pytree.tree_map(sized, node.meta["val"])
            return with_sizes[node]
        if "val" in node.meta:
            return node.meta["val"]
        if node.target not in attributes:
            tensor = _attribute(graph_module, str(node.target))
            attributes[str(node.target)] = fake_mode.from_tensor(tensor, static_shapes=True)
        return attributes[str(node.target)]

    with torch.no_grad(), fake_mode:
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and _may_multiply(node.target):
                args, kwargs = map_arg((node.args, node.kwargs), value_of)
                with FlopCounterMode(display=False) as counter:
                    node.target(*args, **kwargs)
                if flops := _most(counter.get_total_flops()):
                    macs[node] = flops // 2
    return macs


def _most(number: Any) -> int:
    """A number that may depend on values which only a call knows (how many tokens a mask keeps): the most it can be."""
    if not isinstance(number, torch.SymInt):
        return int(number)
    if (hint := number.hint) is not None:
        return int(hint)
    environment = number.node.shape_env
    upper = None if environment is None else environment.bound_sympy(number.node.expr).upper
    return int(upper) if upper is not None and upper.is_Integer else 0


def _may_multiply(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "maskcompile":
        return False
    return not (target.is_view or torch.Tag.pointwise in target.tags or target.name().startswith("aten::_assert"))


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
