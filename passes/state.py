"""What a denoiser keeps from call to call beside its weights: the attributes of its modules, and what is in them.

A capture must neither change it nor, where a forward goes by it, take it for constant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

#: How deep containers and objects are looked into: PEFT keeps adapters' scales in a dict of dicts, processors controllers.
DEPTH = 8
#: A larger container is taken as a whole: a vocabulary.
MOST_PARTS = 1000

_SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)

#: (a dict, list, deque or set, or the object that slots are of; a shallow copy of what is in it), outer ones first.
Snapshot = list[tuple[Any, Any]]


def parts(value: Any) -> dict[Hashable, Any] | None:
    """What a container or plain object holds, by key, position or name; None for what is taken as a whole.

    Mappings but dicts are not read: accelerate's load weights from disk.
    """
    if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
        if len(value) > MOST_PARTS:
            return None
        items = dict.items(value) if isinstance(value, dict) else enumerate(value)
        return {_label(key, position): part for position, (key, part) in enumerate(items)}
    if isinstance(value, (*_SCALARS, nn.Module, Tensor, type, ModuleType)) or hasattr(type(value), "__get__"):
        return None
    inner, slots = _dict_of(value), _slots_of(value)
    if inner is None and slots is None:
        return None
    found: dict[Hashable, Any] = {}
    found.update(inner or {})
    found.update(slots or {})
    return found if len(found) <= MOST_PARTS else None


def inner_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in containers and objects too."""
    pending, seen = [(value, DEPTH)], {}
    while pending:
        one, depth = pending.pop()
        if isinstance(one, Tensor):
            yield one
        elif depth and id(one) not in seen and (found := parts(one)) is not None:
            seen[id(one)] = one
            pending.extend((part, depth - 1) for part in found.values())


def snapshot(model: nn.Module) -> Snapshot:
    """The attributes of all modules, and what is in them, as they are, for ``restore``."""
    found: Snapshot = []
    seen: dict[int, Any] = {}

    def look(value: Any, depth: int) -> None:
        if not depth or id(value) in seen or (inside := parts(value)) is None:
            return
        seen[id(value)] = value
        if isinstance(value, (dict, list, deque, set)):
            found.append((value, _copy(value)))
        elif not isinstance(value, (tuple, frozenset)):
            inner, slots = _dict_of(value), _slots_of(value)
            if inner is not None:
                found.append((inner, inner.copy()))
            if slots is not None:
                found.append((value, slots))
        for part in inside.values():
            look(part, depth - 1)

    for module in model.modules():
        found.append((vars(module), dict(vars(module))))
        for value in vars(module).values():
            look(value, DEPTH)
    return found


def restore(before: Snapshot) -> None:
    """Put back what was there, where it is not."""
    for container, content in before:
        if isinstance(container, dict):
            for key in [key for key in container if key not in content]:
                del container[key]
            for key, value in content.items():
                if key not in container or container[key] is not value:
                    container[key] = value
        elif isinstance(container, (list, deque)):
            if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
                container.clear()
                container.extend(content)
        elif isinstance(container, set):
            if container != content:
                container.clear()
                container.update(content)
        else:
            now = _slots_of(container) or {}
            for name in now.keys() - content.keys():
                object.__delattr__(container, name)
            for name, value in content.items():
                if name not in now or now[name] is not value:
                    object.__setattr__(container, name, value)


@contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Undo on leaving what tracing did to buffers and attributes: those hold fake tensors, counts of calls that were none, and
    copies of containers, which torch.export puts in their place."""
    attributes = snapshot(model)
    try:
        with kept_buffers(model):
            yield
    finally:
        restore(attributes)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Undo on leaving what a forward wrote to buffers. Tables that a real one fills are as good as before."""
    tracked = (buffer for buffer in model.buffers() if not buffer.is_inference())
    written = {buffer: (buffer._version, buffer.detach().clone()) for buffer in tracked}
    try:
        yield
    finally:
        for buffer, (version, value) in written.items():
            if buffer._version != version or not _same_bits(buffer, value):
                buffer.copy_(value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Writes through ``.data`` are in no version. True where bits cannot be read."""
    if a.is_meta or a.is_quantized or a.layout is not torch.strided or isinstance(a, FakeTensor):
        return True
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _copy(container: dict[Any, Any] | list[Any] | deque[Any] | set[Any]) -> Any:
    if isinstance(container, dict):
        return dict.copy(container)
    return set(container) if isinstance(container, set) else list(container)


def _label(key: Any, position: int) -> Hashable:
    """A key that can be kept without keeping more alive; else its position."""
    plain = isinstance(key, _SCALARS) or (isinstance(key, tuple) and all(isinstance(part, _SCALARS) for part in key))
    return key if plain else ("position", position)


def _dict_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object, whatever its own ``__getattr__`` does."""
    try:
        inner = object.__getattribute__(value, "__dict__")
    except Exception:
        return None
    return inner if isinstance(inner, dict) else None


def _slots_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that are in slots, None where its classes have none."""
    found: dict[str, Any] | None = None
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"):
                continue
            mangled = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            found = {} if found is None else found
            try:
                found[mangled] = object.__getattribute__(value, mangled)
            except Exception:
                continue
    return found
