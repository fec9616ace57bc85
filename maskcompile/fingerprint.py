"""What a capture of a denoiser depends on besides the inputs, so that a change of it can be noticed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: (module path, attribute) -> something that compares equal as long as nothing was replaced.
Fingerprint = Mapping[tuple[str, str], Any]

#: Attributes of a module that hold its hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# torch.compile leaves a note on the modules that it compiles, which changes nothing about them.
_IGNORED = (frozenset(vars(nn.Module())) | {"_is_torch_compile"}) - {"training"}
_SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_DEPTH = 2  # of containers: PEFT keeps adapters' scales in a dict of dicts


class _Same:
    """Equal for one and the same object, which it keeps alive so that no other one can take its place in memory."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Modules, hooks, parameters and buffers (identity and layout, not values), and Python attributes of all modules."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        found[path, ""] = _Same(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            found[path, name] = None if tensor is None else _token(tensor, 0)
        for key in HOOKS:
            found[path, key] = _token(vars(module)[key], _DEPTH)
        for key, value in settings(module):
            found[path, key] = _token(value, _DEPTH)
    return found


def settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The Python attributes of a module that may change what it does."""
    for key, value in vars(module).items():
        if key not in _IGNORED and not (key == "_diffusers_hook" and _without_hooks(value)):
            yield key, value


def _without_hooks(value: Any) -> bool:
    """Whether it is a registry of hooks that has none: the pipelines of diffusers put one on a denoiser when they first run."""
    return not getattr(value, "hooks", None)


def changes(before: Fingerprint, after: Fingerprint) -> set[tuple[str, str]]:
    """Where two fingerprints differ."""
    missing = object()
    return {key for key in before.keys() | after.keys() if before.get(key, missing) != after.get(key, missing)}


def _token(value: Any, depth: int) -> Any:
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, Tensor):
        return (_Same(value), value.dtype, value.device, value.shape, value.stride() if value.layout == torch.strided else None)
    if depth and isinstance(value, dict):
        return [(_token(k, 0), _token(v, depth - 1)) for k, v in value.items()]
    if depth and isinstance(value, (list, tuple)):
        return [_token(v, depth - 1) for v in value]
    if depth and isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, (nn.Module, type)):
        return _Same(value), _token(vars(value), depth - 1)  # an attention processor and its settings
    return _Same(value)
