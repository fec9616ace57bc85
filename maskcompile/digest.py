"""What a capture of a denoiser depends on, told so that another process comes to the same: code, layout, settings.

Unlike ``maskcompile.fingerprint``, which goes by the identity of objects. What cannot be told is refused rather than left out:
a capture that is not kept is made once more, one that is taken wrongly is wrong.
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
import os
import sys
import time
import types
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskcompile.fingerprint import HOOKS, settings
from passes.capture import Capture

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_TORCH = os.path.dirname(torch.__file__) + os.sep

#: Of containers and objects in settings.
_DEPTH = 8

#: Elements of a tensor among the settings, all of which are read.
_MOST_ELEMENTS = 10_000_000

#: Code that was written later may not be what this process runs.
_STARTED = time.time()


def digest(model: nn.Module) -> str:
    """Equal in another process for a denoiser of the same code, modules, settings, and shapes of weights.

    Code is that of the files that define the classes of its modules, their bases, and what its settings are made of. Weights
    and buffers count by shape, type, and which of them are one and the same; other tensors by their values.

    Raises ValueError, saying what, where something cannot be told.
    """
    telling = _Telling(model)
    own: dict[int, int] = {}
    described: list[Any] = [list(sys.version_info[:3])]
    for path, module in model.named_modules():
        tensors = []
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            which = None if tensor is None else own.setdefault(id(tensor), len(own))
            tensors.append([name, which, None if tensor is None else _layout(tensor)])
        attributes = []
        for name, value in settings(module):
            if name == "_internal_dict":  # diffusers: names that begin with "_" say where the denoiser is from
                value = {key: setting for key, setting in value.items() if not str(key).startswith("_")}
            attributes.append([name, telling.tell(value, f"{path}.{name}")])
        hooks = [telling.tell(list(vars(module)[name].values()), f"{path}.{name}") for name in HOOKS]
        described.append([path, telling.kind(type(module)), module.training, tensors, attributes, hooks])
    described.append(sorted(_hash_of(file) for file in telling.files))
    return sha256(json.dumps(described).encode()).hexdigest()


def sources(captured: Capture) -> dict[str, str]:
    """The Python modules whose code ran in the denoiser when it was captured, with the SHA-256 of each file; not torch's own.

    Raises ValueError for code that is in no file of a module.
    """
    loaded = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    found = {}
    for file in captured.code:
        if file.startswith((_TORCH, "<frozen")) or file == "<string>":  # the last: what dataclasses write for themselves
            continue
        if file not in loaded:
            raise ValueError(f"{file} is no file of a module")
        found[loaded[file]] = _hash_of(file)
    return dict(sorted(found.items()))


def changed_sources(known: Mapping[str, str]) -> list[str]:
    """Those of the modules that ``sources`` returned whose code is another one here, or that are not loaded."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in known}
    return [name for name, file in files.items() if file is None or not _is(file, known[name])]


def _is(file: str, hashed: str) -> bool:
    try:
        return _hash_of(file) == hashed
    except (OSError, ValueError):
        return False


def _layout(tensor: Tensor) -> list[Any]:
    strides = list(tensor.stride()) if tensor.layout == torch.strided else None
    return [str(tensor.dtype), str(tensor.device), list(tensor.shape), strides, tensor.requires_grad]


def _hash_of(file: str) -> str:
    status = os.stat(file)
    if status.st_mtime > _STARTED:
        raise ValueError(f"{file} has been changed meanwhile")
    return _hash_of_unchanged(file, (status.st_mtime_ns, status.st_ctime_ns, status.st_size))


@functools.lru_cache(maxsize=4096)
def _hash_of_unchanged(file: str, status: tuple[int, ...]) -> str:
    return sha256(Path(file).read_bytes()).hexdigest()


class _Telling:
    """Writes what settings are for JSON, and notes the ``files`` of the code in them."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.files: set[str] = set()

    def tell(self, value: Any, where: str, depth: int = _DEPTH) -> Any:
        """Raises ValueError, naming ``where``, for what has no description that another process would give it, too."""
        if not depth:
            raise ValueError(f"{where} is nested too deeply")
        parts = functools.partial(self.tells, where=where, depth=depth - 1)
        if isinstance(value, enum.Enum):
            return [self.kind(type(value)), value.name]
        if isinstance(value, _PLAIN):
            return [type(value).__name__, repr(value)]
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            return self.values(value, where)
        if isinstance(value, nn.Module):
            if id(value) not in self.paths:
                raise ValueError(f"{where} holds a module that is none of the denoiser's")
            return ["module", self.paths[id(value)]]
        if isinstance(value, Mapping):
            return [self.kind(type(value)), parts(value.keys()), parts(value.values())]
        if isinstance(value, (list, tuple)):
            return [self.kind(type(value)), *parts(value)]
        if isinstance(value, (set, frozenset)):
            return [self.kind(type(value)), *sorted(map(json.dumps, parts(value)))]
        if isinstance(value, type):
            return ["type", self.kind(value)]
        if isinstance(value, functools.partial):
            return ["partial", *parts([value.func, value.args, value.keywords])]
        if isinstance(value, types.MethodType):
            return ["method", *parts([value.__func__, value.__self__])]
        if isinstance(value, types.FunctionType):
            self.files.add(_file_of(value, where))
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            inside = [value.__defaults__, value.__kwdefaults__, cells]
            return ["function", value.__module__, value.__qualname__, _code(value.__code__), *parts(inside)]
        if inspect.isroutine(value):
            return ["built-in", str(getattr(value, "__module__", None)), value.__qualname__]
        if hasattr(value, "__dict__") and not _slots(type(value)):
            return [self.kind(type(value)), parts(vars(value).keys()), parts(vars(value).values())]
        raise ValueError(f"{where} holds a {type(value).__name__}")

    def tells(self, values: Iterable[Any], where: str, depth: int) -> list[Any]:
        return [self.tell(value, where, depth) for value in values]

    def values(self, value: Any, where: str) -> list[Any]:
        """An array with what is in it."""
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.numel() > _MOST_ELEMENTS:
                raise ValueError(f"{where} holds a tensor whose values are not read")
            layout, value = _layout(value), value.detach()
            content = b"" if value.is_meta else value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        else:
            layout, content = [str(value.dtype), list(value.shape)], value.tobytes()
        return ["array", layout, sha256(content).hexdigest()]

    def kind(self, kind: type) -> str:
        """The name of a class, the code of which and of its bases is noted."""
        for base in kind.__mro__:
            if base.__module__ != "builtins":
                self.files.add(_file_of(base, base.__qualname__))
        return f"{kind.__module__}.{kind.__qualname__}"


def _slots(kind: type) -> bool:
    return any(vars(base).get("__slots__") for base in kind.__mro__)


def _file_of(code: Any, where: str) -> str:
    try:
        file = inspect.getfile(code)
    except (OSError, TypeError):
        file = ""
    if not os.path.exists(file):
        raise ValueError(f"the code of {where} is in no file")
    return file


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
