"""A capture as JSON and tensors, and back: what another process need not capture anew.

Kept are the operations, by their names, what is known of the tensors that they return, and the constants that the denoiser made
for itself. Weights are not: they are those of the denoiser that the capture is restored for. A restored capture is checked
against that denoiser as a new one is, by what both return.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from passes.capture import BlockCall, Capture, CaptureError, Made, Slot, captured_at, module_of

FORMAT = 2  # 1 had views for reshapes

#: Values that are written as the name that torch has for them.
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def serialise(captured: Capture, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what JSON can hold, constants by name) of a capture of ``model``.

    Raises ValueError, saying what, for a graph with anything in it but operators, numbers, and what else JSON can name; for one
    of weights that the model has no more; and for a capture for any batch, whose guards (branches that the denoiser took for
    its batch) are no part of the graph.
    """
    if captured.sizes:
        raise ValueError("it is for any batch")
    own = {id(tensor): name for name, tensor in _tensors_of(model).items()}
    weights: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    nodes = []
    for node in captured.graph_module.graph.nodes:
        target = str(node.target)
        if node.op == "call_function":
            target = _name_of(node.target)
        elif node.op == "get_attr":
            value = operator.attrgetter(target)(captured.graph_module)
            if not isinstance(value, Tensor):
                raise ValueError(f"{target!r} is no tensor")
            if id(value) in own:
                weights[target] = own[id(value)]
            elif isinstance(value, nn.Parameter) or target in own.values():
                raise ValueError(f"{target!r} has been replaced")
            elif type(value) is not Tensor or value.layout != torch.strided or not value.is_contiguous() or value.is_complex():
                raise ValueError(f"the constant {target!r} is no plain tensor")
            else:
                constants[target] = value.detach().clone()
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"{node.format_node()} calls a module")
        described = _described(node.meta.get("val")) if node.op == "call_function" else None
        nodes.append([node.name, node.op, target, _written(node.args), _written(node.kwargs), list(module_of(node)), described])
    calls = [[c.block, c.call, [s.index for s in c.slots], [list(outer) for outer in c.enclosing]] for c in captured.calls]
    document = {
        "format": FORMAT,
        "nodes": nodes,
        "sample": captured.inputs.index(captured.sample),
        "calls": calls,
        "opaque": sorted(captured.opaque),
        "weights": weights,
        "constants": {name: str(constant.device) for name, constant in constants.items()},
    }
    return document, constants


def restore(
    document: Mapping[str, Any],
    constants: Mapping[str, Tensor],
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Capture:
    """The capture of ``model(*args, **kwargs)`` that ``serialise`` was given, on the weights of ``model``.

    The model is run once, and left as it was where this fails. Raises CaptureError where it is no capture of this denoiser, and
    where it returns anything else than the denoiser does; whatever the model itself raises on these inputs is raised as it is.
    """

    def make(expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: Mapping[int, int]) -> Made:
        try:
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']}, here it is {FORMAT}")
            graph_module = _rebuilt(document, constants, model, pytree.tree_leaves((args, kwargs)))
            calls = [
                BlockCall(block, call, tuple(Slot(block, call, index) for index in slots), tuple((b, n) for b, n in enclosing))
                for block, call, slots, enclosing in document["calls"]
            ]
            calls += [BlockCall(block, -1, (), ()) for block in document["opaque"]]
            return graph_module, pytree.tree_structure(expected), calls, int(document["sample"])
        except Exception as error:  # of torch, which documents none for operators that it does not have
            name, reason = type(model).__name__, str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CaptureError(f"a stored capture is none of this {name}: {reason}") from error

    return captured_at(model, args, kwargs, None, make, known=True)


def _rebuilt(
    document: Mapping[str, Any], constants: Mapping[str, Tensor], model: nn.Module, leaves: Sequence[Any]
) -> GraphModule:
    """The graph, its weights those of ``model``, its inputs like ``leaves``."""
    graph, mode = Graph(), FakeTensorMode(shape_env=ShapeEnv())  # without which torch's caches keep nothing of the graph
    named: dict[str, Node] = {}
    attributes: dict[str, Tensor] = {}
    tensors = _tensors_of(model)
    own = {target: tensors[name] for target, name in document["weights"].items()}
    own |= {name: constants[name].to(device) for name, device in document["constants"].items()}
    given = iter(leaves)
    for name, op, target, args, kwargs, modules, described in document["nodes"]:
        function = _function(target) if op == "call_function" else target
        node = named[name] = graph.create_node(op, function, _read(args, named), _read(kwargs, named), name)
        node.meta["nn_module_stack"] = {path: (path, "") for path in modules}
        if op == "call_function":
            node.meta["val"] = _like(described, mode)
        elif op != "output":
            if op == "get_attr":
                attributes[target] = own[target]
            value = own[target] if op == "get_attr" else next(given)
            node.meta["val"] = mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
    return GraphModule(attributes, graph, class_name="CapturedDenoiser")  # type: ignore[arg-type]


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers, and the tensors that are plain attributes of modules, by path."""
    found = {}
    for path, module in model.named_modules():
        for name, tensor in (*vars(module).items(), *module._buffers.items(), *module._parameters.items()):
            if isinstance(tensor, Tensor):
                found[f"{path}.{name}" if path else name] = tensor
    return found


def _described(value: Any) -> Any:
    """What is known of what an operation returns, a tensor or several."""
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_described(part) for part in value]}
    if isinstance(value, Tensor):
        layout = [list(value.shape), list(value.stride()), value.storage_offset()]
        return [*layout, str(value.dtype).removeprefix("torch."), str(value.device)]
    if value is None:
        return None
    raise ValueError(f"an operation returns a {type(value).__name__}")


def _like(described: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor, or several, of which this is known."""
    if isinstance(described, dict):
        ((kind, parts),) = described.items()
        return {"list": list, "tuple": tuple}[kind](_like(part, mode) for part in parts)
    if described is None:
        return None
    shape, strides, offset, dtype, device = described
    with mode:
        if not offset:
            return torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device=device)
        needed = 1 + offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        return torch.empty(needed, dtype=getattr(torch, dtype), device=device).as_strided(shape, strides, offset)


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", "")
    for module in (operator, torch):
        if name and getattr(module, name, None) is target:
            return f"{module.__name__}.{name}"
    raise ValueError(f"{target} is no operator")


def _function(name: str) -> Any:
    """What ``_name_of`` gave the name of."""
    first, _, rest = name.partition(".")
    if first in ("operator", "torch"):
        return getattr({"operator": operator, "torch": torch}[first], rest)
    return operator.attrgetter(name)(torch.ops)


def _written(value: Any) -> Any:
    """An argument of a node; a list stays one, and all else that JSON does not have is an object with its kind as the key."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        parts = [_written(part) for part in value]
        return parts if isinstance(value, list) else {"tuple": parts}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _written(part) for key, part in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _NAMED.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise ValueError(f"an argument is a {type(value).__name__}")


def _read(written: Any, named: Mapping[str, Node]) -> Any:
    if isinstance(written, list):
        return [_read(part, named) for part in written]
    if not isinstance(written, dict):
        return written
    ((kind, value),) = written.items()
    if kind == "float":
        return float.fromhex(value)
    if kind == "complex":
        return complex(*map(float.fromhex, value))
    if kind == "node":
        return named[value]
    if kind == "tuple":
        return tuple(_read(part, named) for part in value)
    if kind == "dict":
        return {key: _read(part, named) for key, part in value.items()}
    if kind == "device":
        return torch.device(value)
    found = getattr(torch, value)
    if not isinstance(found, _NAMED[kind]):
        raise ValueError(f"{value!r} is no {kind}")
    return found
