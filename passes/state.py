"""What a denoiser keeps from call to call beside its weights: the attributes of its modules, and what is in them.

A capture must neither change it nor, where a forward goes by it, take it for constant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MemberDescriptorType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

#: How deep containers and objects are looked into: PEFT keeps adapters' scales in a dict of dicts, processors controllers.
DEPTH = 8
#: A larger container is taken as a whole: a vocabulary.
MOST_PARTS = 1000

#: Taken by their values.
SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
#: Looked into, as plain objects are.
CONTAINERS = (dict, list, tuple, set, frozenset, deque)

#: What instances of their classes refer to is not the denoiser's own, and other threads may be at it.
_FOREIGN = frozenset(
    {"_io", "_queue", "_thread", "_weakrefset", "asyncio", "concurrent", "ctypes", "io", "logging", "multiprocessing", "queue"}
    | {"socket", "subprocess", "threading", "tqdm", "weakref"}
)

Container = dict[Any, Any] | list[Any] | deque[Any] | set[Any]


@dataclass(frozen=True)
class Slots:
    """The attributes of an object that lie in slots, read and written past whatever its class makes of them."""

    owner: Any
    members: tuple[MemberDescriptorType, ...]

    def read(self) -> dict[Any, Any]:
        found = {}
        for member in self.members:
            try:
                found[member] = member.__get__(self.owner)
            except AttributeError:  # it is not set
                continue
        return found


#: (what can be put back, a shallow copy of what is in it, whether it is the attributes of a module).
Snapshot = list[tuple[Container | Slots, Any, bool]]


def parts(value: Any) -> dict[Hashable, Any] | None:
    """What a container or plain object holds, by key, position or name; None for what is taken as a whole.

    Mappings but dicts are not read: accelerate's load weights from disk.
    """
    if isinstance(value, CONTAINERS):
        if len(value) > MOST_PARTS:
            return None
        items = dict.items(value) if isinstance(value, dict) else enumerate(value)
        return {_label(key, position): part for position, (key, part) in enumerate(items)}
    if isinstance(value, (*SCALARS, nn.Module, Tensor, type, ModuleType)) or _whole(type(value)):
        return None
    inner, slots = _dict_of(value), _slots_of(value)
    if inner is None and slots is None:
        return None
    found: dict[Hashable, Any] = {}
    found.update(inner or {})
    found.update({member.__name__: part for member, part in (slots.read() if slots else {}).items()})
    return found if len(found) <= MOST_PARTS else None


def _whole(kind: type) -> bool:
    if kind not in _known:
        foreign = any(base.__module__.split(".")[0] in _FOREIGN for base in kind.__mro__)
        members = [member for base in kind.__mro__ if "__slots__" in vars(base) for member in vars(base).values()]
        slots = tuple(member for member in members if isinstance(member, MemberDescriptorType))
        _known[kind] = hasattr(kind, "__get__") or foreign, slots
    return _known[kind][0]


#: class -> (whether its instances are taken as a whole, the slots that they have).
_known: WeakKeyDictionary[type, tuple[bool, tuple[MemberDescriptorType, ...]]] = WeakKeyDictionary()


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
        if not depth or id(value) in seen:
            return
        inside, container = parts(value), isinstance(value, (dict, list, deque, set))
        if inside is None and not container:
            return
        seen[id(value)] = value
        if container:
            found.append((value, _content(value), False))
        elif not isinstance(value, (tuple, frozenset)):
            inner, slots = _dict_of(value), _slots_of(value)
            found.extend((held, _content(held), False) for held in (inner, slots) if held is not None)
        for part in (inside or {}).values():
            look(part, depth - 1)

    for module in model.modules():
        found.append((vars(module), dict(vars(module)), True))
        for value in vars(module).values():
            look(value, DEPTH)
    return found


def restore(before: Snapshot) -> None:
    """Put back what was there, where it is not."""
    for held, content, _ in before:
        if isinstance(held, (dict, Slots)):
            now = held if isinstance(held, dict) else held.read()
            wrong = [key for key in {**now, **content} if now.get(key, _MISSING) is not content.get(key, _MISSING)]
            _put(held, content, wrong)
        elif list(map(id, held)) != list(map(id, content)):
            _fill(held, content)


def restore_traced(before: Snapshot) -> None:
    """Undo what tracing did: fake tensors where there were others or none, and containers of modules that torch.export replaced
    by copies. Whatever else is new is left, for other threads may have written it."""
    for held, content, of_module in before:
        if isinstance(held, (dict, Slots)):
            now = dict(held) if isinstance(held, dict) else held.read()
            changed = {key: value for key, value in now.items() if value is not content.get(key, _MISSING)}
            copies = (dict, list, tuple, set, deque) if of_module else ()
            wrong = [key for key, value in changed.items() if (isinstance(value, copies) and key in content) or _fake(value)]
            _put(held, content, wrong)
        else:
            known = set(map(id, content))
            if any(_fake(value) for value in list(held) if id(value) not in known):
                _fill(held, content)


@contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Undo on leaving what tracing did to buffers and attributes."""
    attributes = snapshot(model)
    try:
        with kept_buffers(model):
            yield
    finally:
        restore_traced(attributes)


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


_MISSING = object()


def _content(held: Container | Slots) -> Any:
    """A shallow copy of what is in it."""
    if isinstance(held, Slots):
        return held.read()
    if isinstance(held, dict):
        return dict.copy(held)
    return set(held) if isinstance(held, set) else list(held)


def _put(held: dict[Any, Any] | Slots, content: dict[Any, Any], keys: Sequence[Any]) -> None:
    """Give these keys, or slots, what they have in ``content``, or nothing."""
    for key in keys:
        if isinstance(held, dict):
            if key in content:
                held[key] = content[key]
            else:
                del held[key]
        elif key in content:
            key.__set__(held.owner, content[key])
        else:
            key.__delete__(held.owner)


def _fill(held: list[Any] | deque[Any] | set[Any], content: Any) -> None:
    held.clear()
    held.update(content) if isinstance(held, set) else held.extend(content)


def _fake(value: Any) -> bool:
    return any(isinstance(tensor, FakeTensor) for tensor in inner_tensors(value))


def _label(key: Any, position: int) -> Hashable:
    """A key that can be kept without keeping more alive; else its position."""
    plain = isinstance(key, SCALARS) or (isinstance(key, tuple) and all(isinstance(part, SCALARS) for part in key))
    return key if plain else ("position", position)


def _dict_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object, whatever its own ``__getattr__`` does."""
    try:
        inner = object.__getattribute__(value, "__dict__")
    except Exception:
        return None
    return inner if isinstance(inner, dict) else None


def _slots_of(value: Any) -> Slots | None:
    """The slots of an object, None where its classes have none."""
    _, members = _known[type(value)]
    return Slots(value, members) if members else None
