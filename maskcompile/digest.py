"""What a capture of a denoiser depends on, told so that another process comes to the same: code, layout, settings.

Unlike ``maskcompile.fingerprint``, which goes by the identity of objects. What is seen and cannot be told is refused: a capture
that is not kept is made once more, one that is taken wrongly is wrong. Not seen are the values of variables of Python modules
and of the environment; for these there is the comparison with the denoiser, at one call.
"""

from __future__ import annotations

import collections
import enum
import functools
import inspect
import json
import os
import sys
import time
import types
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskcompile.fingerprint import HOOKS, settings
from passes.capture import Capture

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_LISTS, _SETS, _DICTS = (list, tuple), (set, frozenset), (dict, collections.OrderedDict)
_TORCH = os.path.dirname(torch.__file__) + os.sep

#: Of containers and objects in settings.
_DEPTH = 8

#: Bytes of an array among the settings, all of which are read.
_MOST_BYTES = 100_000_000

#: Set in the ``__flags__`` of a class that was made by a class statement; others may hold what Python cannot see.
_HEAP_TYPE = 1 << 9

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
            if tensor is not None:
                tensors.append([name, own.setdefault(id(tensor), len(own)), telling.layout(tensor)])
        attributes = []
        for name, value in settings(module):
            if name == "_internal_dict":  # diffusers: names that begin with "_" say where the denoiser is from
                value = {key: setting for key, setting in value.items() if not str(key).startswith("_")}
            attributes.append([name, telling.tell(value, f"{path}.{name}")])
        hooks = [telling.tell(list(vars(module)[name].values()), f"{path}.{name}") for name in HOOKS]
        children = [[name, telling.paths.get(id(child))] for name, child in module._modules.items()]
        described.append([path, telling.kind(type(module)), module.training, children, tensors, attributes, hooks])
    described.append(sorted(_hash_of(file) for file in telling.files))
    return sha256(json.dumps(described).encode()).hexdigest()


def sources(captured: Capture) -> dict[str, str]:
    """The Python modules whose code ran in the denoiser when it was captured, with the SHA-256 of each file; not torch's own.

    Raises ValueError where that is not known, and for code that is in no file of a module.
    """
    if captured.code is None:
        raise ValueError("a profiler was on when it was captured, so that the code that ran is not known")
    loaded = {_file_of_module(module): name for name, module in list(sys.modules.items())}
    found = {}
    for file in captured.code:
        if file.startswith((_TORCH, "<frozen")):
            continue
        if file not in loaded:
            raise ValueError(f"{file} is no file of a module")
        found[loaded[file]] = _hash_of(file)
    return dict(sorted(found.items()))


def _file_of_module(module: Any) -> str | None:
    try:
        return str(vars(module)["__file__"])  # not by getattr, which makes some modules import others
    except Exception:
        return None


def _hash_of(file: str) -> str:
    status = os.stat(file)
    if max(status.st_mtime, status.st_ctime) > _STARTED:
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
        self.kinds: dict[type, list[Any]] = {}
        self.arrays: dict[int, list[Any]] = {}

    def tell(self, value: Any, where: str, depth: int = _DEPTH) -> Any:
        """Raises ValueError, naming ``where``, for what has no description that another process would give it, too."""
        if not depth:
            raise ValueError(f"{where} is nested too deeply")
        parts = functools.partial(self.tells, where=where, depth=depth - 1)
        kind = type(value)
        if isinstance(value, enum.Enum):
            return ["enumeration", self.kind(kind), value.name]
        if kind in _PLAIN:
            return [kind.__name__, repr(value)]
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            return self.array(value, where)
        if isinstance(value, nn.Module):
            if id(value) not in self.paths:
                raise ValueError(f"{where} holds a module that is none of the denoiser's")
            return ["module", self.paths[id(value)]]
        if isinstance(value, type):
            return ["type", self.kind(value)]
        if kind is functools.partial:
            return ["partial", *parts([value.func, value.args, value.keywords])]
        if kind is types.MethodType:
            return ["method", *parts([value.__func__, value.__self__])]
        if kind is types.FunctionType:
            self.files.add(_file_of(value, where))
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            inside = [value.__defaults__, value.__kwdefaults__, cells, vars(value)]
            return ["function", value.__module__, value.__qualname__, _code(value.__code__), *parts(inside)]
        if inspect.isroutine(value):
            owner = getattr(value, "__self__", None)
            bound = None if isinstance(owner, (type, types.ModuleType)) else owner
            return ["built-in", str(getattr(value, "__module__", None)), value.__qualname__, *parts([bound])]
        return ["object", self.kind(kind), *self.contents(value, where, depth)]

    def contents(self, value: Any, where: str, depth: int) -> list[Any]:
        """What a container holds, and the attributes of an object."""
        parts = functools.partial(self.tells, where=where, depth=depth - 1)
        told: list[Any] = []
        bases = [base for base in type(value).__mro__ if not base.__flags__ & _HEAP_TYPE and base is not object]
        if bases and isinstance(value, _DICTS) and set(bases) <= set(_DICTS):
            told += [parts(value.keys()), parts(value.values())]
        elif bases and isinstance(value, _LISTS) and set(bases) <= set(_LISTS):
            told += parts(value)
        elif bases and isinstance(value, _SETS) and set(bases) <= set(_SETS):
            told += sorted(map(json.dumps, parts(value)))
        elif bases or any(vars(base).get("__slots__") for base in type(value).__mro__) or _has_state(type(value)):
            raise ValueError(f"{where} holds a {type(value).__name__}")
        attributes = getattr(value, "__dict__", {})
        return [*told, parts(attributes.keys()), parts(attributes.values())]

    def tells(self, values: Iterable[Any], where: str, depth: int) -> list[Any]:
        return [self.tell(value, where, depth) for value in values]

    def array(self, value: Any, where: str) -> list[Any]:
        """An array with what is in it."""
        if id(value) in self.arrays:
            return self.arrays[id(value)]
        if value.nbytes > _MOST_BYTES:
            raise ValueError(f"{where} holds {value.nbytes / 1e6:.0f} MB")
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.layout != torch.strided or value.is_quantized:
                raise ValueError(f"{where} holds a tensor of another kind")
            flat = value.detach().cpu().contiguous().view(-1) if not value.is_meta else torch.empty(0)
            layout, content = self.layout(value), flat.view(torch.uint8).numpy().tobytes()
        elif value.dtype.hasobject:
            raise ValueError(f"{where} holds an array of objects")
        else:
            layout, content = [str(value.dtype), list(value.shape)], value.tobytes()
        self.arrays[id(value)] = ["array", layout, sha256(content).hexdigest()]
        return self.arrays[id(value)]

    def layout(self, tensor: Tensor) -> list[Any]:
        strides = list(tensor.stride()) if tensor.layout == torch.strided else None
        about = [str(tensor.dtype), str(tensor.device), list(tensor.shape), strides, tensor.requires_grad]
        return [self.kind(type(tensor)), *about]

    def kind(self, kind: type) -> list[Any]:
        """A class: its name, and functions and plain values of its own and its bases, the files of which are noted."""
        if kind in self.kinds:
            return self.kinds[kind]
        described: list[Any] = [f"{kind.__module__}.{kind.__qualname__}"]
        for base in kind.__mro__:
            if base.__module__ in ("builtins", "torch") or base.__module__.startswith("torch."):
                continue
            if base.__flags__ & _HEAP_TYPE:
                self.files.add(_file_of(base, base.__qualname__))
            for name, value in vars(base).items():
                if type(value) in _PLAIN:
                    described.append([name, repr(value)])
                elif type(value) is types.FunctionType:
                    described.append([name, _code(value.__code__)])
        self.kinds[kind] = [sha256(json.dumps(described).encode()).hexdigest(), described[0]]
        return self.kinds[kind]


def _has_state(kind: type) -> bool:
    """Whether objects of a class have a way of their own of saying what they are, and so may hold what Python cannot see."""
    names = ("__reduce__", "__reduce_ex__", "__getstate__")
    return any(getattr(kind, name, None) is not getattr(object, name, None) for name in names)


def _file_of(code: Any, where: str) -> str:
    try:
        file = inspect.getfile(code)
    except (OSError, TypeError):
        file = ""
    if not os.path.exists(file):
        raise ValueError(f"the code of {where} is in no file")
    return file


def _code(code: types.CodeType) -> list[Any]:
    return [code.co_code.hex(), list(code.co_names), [_constant(value) for value in code.co_consts]]


def _constant(value: Any) -> Any:
    """A constant of code; the order of a set is another one in each process."""
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, (tuple, frozenset)):
        parts = [json.dumps(_constant(part)) for part in value]
        return [type(value).__name__, *(parts if isinstance(value, tuple) else sorted(parts))]
    return repr(value)
