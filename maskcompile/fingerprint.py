"""What a capture of a denoiser depends on besides the inputs, so that a change of it can be noticed."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

#: (module path, attribute) -> something that compares equal as long as nothing was replaced.
Fingerprint = Mapping[tuple[str, str], Any]

#: Attributes of a module that hold its hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# torch.compile leaves a note on the modules that it compiles, which changes nothing about them.
_IGNORED = (frozenset(vars(nn.Module())) | {"_is_torch_compile"}) - {"training"}
_SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)

#: Of containers and objects: PEFT keeps adapters' scales in a dict of dicts, attention processors share controllers.
_DEPTH = 8

#: Bytes of an array whose values are looked at; larger ones count by identity.
_MOST_BYTES = 4096


class _Same:
    """Equal for one and the same object while it lives: another one that takes its place in memory is not the same.

    A weak reference, for a denoiser may be among its own settings (a method of its own in the place of ``forward``).
    """

    __slots__ = ("reference",)

    def __init__(self, value: Any) -> None:
        try:
            self.reference: Any = weakref.ref(value)
        except TypeError:  # a container, a number of numpy's: it is kept alive
            self.reference = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (value := self.reference()) is not None and other.reference() is value

    __hash__ = None  # type: ignore[assignment]


class _Again(NamedTuple):
    """What was looked into before, as the which."""

    which: int


def fingerprint(model: nn.Module) -> Fingerprint:
    """Modules, hooks, parameters and buffers (identity and layout, not values), and Python attributes of all modules."""
    found: dict[tuple[str, str], Any] = {}
    seen: _Seen = {}
    for path, module in model.named_modules():
        found[path, ""] = _Same(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            found[path, name] = None if tensor is None else _token(tensor, seen)
        for key in HOOKS:
            found[path, key] = _token(vars(module)[key], seen)
        for key, value in settings(module):
            found[path, key] = _token(value, seen)
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


#: What a fingerprint has looked into, by id: which of them it was, and the object, whose id no other takes meanwhile.
_Seen = dict[int, tuple[int, Any]]


def _token(value: Any, seen: _Seen, depth: int = _DEPTH) -> Any:
    """Equal as long as nothing in a value was replaced. What is in a second place, or in itself, is looked into once."""
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, Tensor):
        return (_Same(value), value.dtype, value.device, value.shape, value.stride() if value.layout == torch.strided else None)
    if isinstance(value, (np.ndarray, np.generic)) and value.nbytes <= _MOST_BYTES and not value.dtype.hasobject:
        return value.dtype.str, value.shape, value.tobytes()
    if not depth or isinstance(value, (nn.Module, type, types.ModuleType)):
        return _Same(value)
    if id(value) in seen:
        return _Again(seen[id(value)][0])
    seen[id(value)] = len(seen), value
    if isinstance(value, dict):  # other mappings may do something when they are read: accelerate's load weights from disk
        return [(_token(k, seen, depth - 1), _token(v, seen, depth - 1)) for k, v in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_token(v, seen, depth - 1) for v in value]
    if isinstance(getattr(value, "__dict__", None), dict):
        return _Same(value), _token(vars(value), seen, depth - 1)  # an attention processor and its settings
    return _Same(value)
