"""What a capture of a denoiser depends on besides the inputs, so that a change of it can be noticed."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: (module path, attribute) -> something that compares equal as long as nothing was replaced.
Fingerprint = Mapping[tuple[str, str], Any]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
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
        for key in _HOOKS:
            found[path, key] = _token(vars(module)[key], _DEPTH)
        for key, value in _settings(module):
            found[path, key] = _token(value, _DEPTH)
    return found


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
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


def digest(model: nn.Module) -> str | None:
    """What is the same in another process: code, layout and settings of the denoiser. None where its code is in no file.

    Code is that of the files in which the classes of its modules are, but for those of torch. Weights count by shape and type.
    """
    files: set[str] = set()
    described: list[Any] = []
    torch_folder = os.path.dirname(torch.__file__) + os.sep
    try:
        for path, module in model.named_modules():
            files.add(inspect.getfile(type(module)))
            tensors = {name: _lasting(tensor, 0) for name, tensor in (*module._parameters.items(), *module._buffers.items())}
            settings = {key: _lasting(value, _DEPTH) for key, value in _settings(module)}
            hooks = [_lasting(list(vars(module)[key].values()), _DEPTH) for key in _HOOKS]
            described.append([path, _qualified(type(module)), tensors, settings, hooks])
        own = [file for file in sorted(files) if not file.startswith(torch_folder)]
        described += [sha256(Path(file).read_bytes()).hexdigest() for file in own]
    except (OSError, TypeError):  # a class that was made without a file
        return None
    return sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _qualified(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _lasting(value: Any, depth: int) -> Any:
    """A token that is the same in another process, for JSON. Keys that begin with "_" say where a denoiser is from."""
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, Tensor):
        return [str(value.dtype), str(value.device), *value.shape, *(value.stride() if value.layout == torch.strided else ())]
    if depth and isinstance(value, Mapping):
        return {str(k): _lasting(v, depth - 1) for k, v in value.items() if not str(k).startswith("_")}
    if depth and isinstance(value, (list, tuple)):
        return [_lasting(v, depth - 1) for v in value]
    if hasattr(value, "__qualname__"):
        return _qualified(value)
    settings = getattr(value, "__dict__", None) if depth and not isinstance(value, nn.Module) else None
    return [_qualified(type(value)), _lasting(settings, depth - 1) if isinstance(settings, dict) else None]
