"""What a denoiser keeps from call to call beside its weights: the attributes of its modules, and what is in them.

A capture must neither change it nor, where a forward goes by it, take it for constant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import getattr_static
from types import CellType, CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import ProxyTypes, WeakKeyDictionary

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

#: Functions that torch.compile makes: what they close over is torch's own, and changes as it compiles.
_OF_TORCH = frozenset({"_compile", "_dynamo", "_functorch", "_inductor"})

Container = dict[Any, Any] | list[Any] | deque[Any] | set[Any]


@dataclass(frozen=True)
class Slots:
    """What an object has in slots, or a cell of a closure in it, read and written past whatever its class makes of them."""

    owner: Any
    members: tuple[MemberDescriptorType | GetSetDescriptorType, ...]

    def read(self) -> dict[Any, Any]:
        found = {}
        for member in self.members:
            try:
                found[member] = member.__get__(self.owner)
            except (AttributeError, ValueError):  # it is not set
                continue
        return found


#: (what can be put back, a shallow copy of what is in it, whether it is the attributes of a module).
Snapshot = list[tuple[Container | Slots, Any, bool]]


def parts(value: Any) -> dict[Hashable, Any] | None:
    """What a container, function or plain object holds, by key, position or name; None for what is taken as a whole.

    Of functions, what they close over and the containers among the globals that they name; of methods, the attributes that they
    name, for what they are bound to may be a whole application. Mappings but dicts are not read: accelerate's load weights from
    disk. Nothing is asked of the object itself, which may be anything.
    """
    kind = type(value)
    found: dict[Hashable, Any] = {}
    if issubclass(kind, CONTAINERS):
        if len(value) > MOST_PARTS:
            return None
        for position, (key, part) in enumerate(list(dict.items(value) if issubclass(kind, dict) else enumerate(value))):
            label = _label(key, position)
            found[label] = part
            if label is not key:
                found["key", position] = key
        if kind not in CONTAINERS:
            found.update({("attribute", name): part for name, part in _attributes(value).items()})
        return found
    if kind is MethodType:
        return _of_method(value)
    if kind is FunctionType:
        if _of_torch(value):
            inner = vars(value).get("_torchdynamo_orig_callable")
            return None if inner is None else {"_torchdynamo_orig_callable": inner}
        found = dict(enumerate(value.__closure__ or ()))
        found.update({"__defaults__": value.__defaults__, "__kwdefaults__": value.__kwdefaults__})
        named = ((name, value.__globals__.get(name)) for name in value.__code__.co_names)
        found.update({("global", name): part for name, part in named if issubclass(type(part), CONTAINERS)})
    elif issubclass(kind, partial):
        found = {"func": value.func, "args": value.args, "keywords": value.keywords}
    elif issubclass(kind, (*SCALARS, nn.Module, Tensor, type, ModuleType)) or _known_of(kind).whole or not _has_own(value):
        return None
    found.update(_attributes(value))
    return found if len(found) <= MOST_PARTS else None


def _of_method(method: MethodType) -> dict[Hashable, Any]:
    owner, function = method.__self__, method.__func__
    if type(function) is not FunctionType or issubclass(type(owner), (*CONTAINERS, nn.Module, type, ModuleType)):
        return {"__self__": owner, "__func__": function}
    attributes = {} if _known_of(type(owner)).whole else _attributes(owner)
    names = _names(function.__code__, type(owner))  # type: ignore[arg-type]
    return {"__func__": function, **{name: part for name, part in attributes.items() if name in names}}


@lru_cache(maxsize=1024)
def _names(code: CodeType, kind: type) -> frozenset[str]:
    """What the code of a method names, and that of other methods of its class which it names."""
    names: set[str] = set()
    pending, seen = [code], {code}
    while pending:
        one = pending.pop()
        names.update(one.co_names)
        methods = (getattr_static(kind, name, None) for name in one.co_names)
        functions = (getattr(method, "fget", method) for method in methods)  # of a property
        inner = [function.__code__ for function in functions if isinstance(function, FunctionType)]
        inner += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
        pending.extend(other for other in inner if other not in seen)
        seen.update(inner)
    return frozenset(names)


def _of_torch(function: FunctionType) -> bool:
    """By where it was defined, which a decorator's ``__module__`` does not say."""
    names = str(function.__globals__.get("__name__")).split(".")
    return names[0] == "torch" and names[1:2] != [] and names[1] in _OF_TORCH


@dataclass(frozen=True)
class _Known:
    """Of a class: whether its instances are taken as a whole, and the slots that they have."""

    whole: bool
    members: tuple[MemberDescriptorType | GetSetDescriptorType, ...]


#: As long as the classes live.
_known: WeakKeyDictionary[type, _Known] = WeakKeyDictionary()


def _known_of(kind: type) -> _Known:
    if kind not in _known:
        foreign = any(base.__module__.split(".")[0] in _FOREIGN for base in kind.__mro__)
        members = [member for base in kind.__mro__ if "__slots__" in vars(base) for member in vars(base).values()]
        slots = tuple(member for member in members if isinstance(member, MemberDescriptorType))
        in_cell = (vars(CellType)["cell_contents"],) if kind is CellType else ()
        whole = hasattr(kind, "__get__") or foreign or issubclass(kind, ProxyTypes)
        _known[kind] = _Known(whole, in_cell or slots)
    return _known[kind]


def inner_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in containers and objects too."""
    pending, seen = [(value, DEPTH)], {}
    while pending:
        one, depth = pending.pop()
        if issubclass(type(one), Tensor):
            yield one
        elif depth and id(one) not in seen and (found := parts(one)) is not None:
            seen[id(one)] = one
            pending.extend((part, depth - 1) for part in found.values())


def snapshot(model: nn.Module) -> Snapshot:
    """The attributes of all modules, and what is in them, as they are."""
    found: Snapshot = []
    seen: dict[int, Any] = {}

    own = set(map(id, model.modules()))

    def look(value: Any, depth: int) -> None:
        if not depth or id(value) in seen or id(value) in own:
            return
        if issubclass(type(value), nn.Module):  # of somebody else, whom a hook hands what it sees
            seen[id(value)] = value
            found.append((vars(value), dict(vars(value)), False))
            for part in list(vars(value).values()):
                look(part, depth - 1)
            return
        inside, container = parts(value), issubclass(type(value), (dict, list, deque, set))
        if inside is None and not container:
            return
        seen[id(value)] = value
        holding: list[Any] = [value] if container else []
        owner = value.__self__ if type(value) is MethodType else value
        if type(owner) not in CONTAINERS and not issubclass(type(owner), (nn.Module, type, ModuleType)):
            holding += [] if _known_of(type(owner)).whole and owner is not value else [_dict_of(owner), _slots_of(owner)]
        found.extend((held, _content(held), False) for held in holding if held is not None)
        for part in (inside or {}).values():
            look(part, depth - 1)

    for module in model.modules():
        found.append((vars(module), dict(vars(module)), True))
        for value in list(vars(module).values()):
            look(value, DEPTH)
    return found


class Change(NamedTuple):
    """What was in something ``before``: of a dict or slots, only what is another now."""

    held: Container | Slots
    before: Any


def changed(before: Snapshot) -> list[Change]:
    """What is not as it was."""
    found = []
    for held, content, _ in before:
        now = _content(held)
        if isinstance(content, dict):
            keys = [key for key in {**now, **content} if now.get(key, _MISSING) is not content.get(key, _MISSING)]
            if keys:
                found.append(Change(held, {key: content.get(key, _MISSING) for key in keys}))
        elif _ids(now) != _ids(content):
            found.append(Change(held, content))
    return found


def _ids(content: list[Any] | set[Any]) -> list[int]:
    found = list(map(id, content))
    return sorted(found) if isinstance(content, set) else found


def put_back(changes: Iterable[Change]) -> None:
    for held, before in changes:
        if isinstance(held, (dict, Slots)):
            _put(held, before)
        else:
            _fill(held, before)


def counted_on(changes: Iterable[Change], by: int) -> list[Change]:
    """For ``put_back``: the numbers among what was changed, as if that had been done so many times more."""
    found = []
    for held, before in changes:
        now, many = _content(held), {}
        if isinstance(now, set):
            continue
        for key, value in list(before.items() if isinstance(before, dict) else enumerate(before)):
            there = key in now if isinstance(now, dict) else key < len(now)
            ago = 0 if value is None or value is _MISSING else value  # it began to count
            if there and {type(now[key]), type(ago)} <= {int, float} and now[key] != ago:
                many[key] = now[key] + by * (now[key] - ago)
        if many:
            found.append(Change(held, many if isinstance(now, dict) else [many.get(at, part) for at, part in enumerate(now)]))
    return found


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Put attributes back on leaving."""
    before = snapshot(model)
    try:
        yield
    finally:
        put_back(changed(before))


def restore_traced(before: Snapshot) -> None:
    """Undo what tracing did: fake tensors where there were others or none, and containers of modules that torch.export replaced
    by copies. Whatever else is new is left, for other threads may have written it."""
    for held, content, of_module in before:
        if isinstance(held, (dict, Slots)):
            now = dict(held) if isinstance(held, dict) else held.read()
            others = {key: value for key, value in now.items() if value is not content.get(key, _MISSING)}
            copies = (dict, list, tuple, set, deque) if of_module else ()
            wrong = [key for key, value in others.items() if (isinstance(value, copies) and key in content) or _fake(value)]
            _put(held, {key: content.get(key, _MISSING) for key in wrong})
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
    """Undo on leaving what a forward wrote to buffers and other tensors that it keeps. Tables that a real one fills are as good
    as before."""
    before = buffers_of(model, snapshot(model))
    try:
        yield
    finally:
        restore_buffers(before)


#: Tensors with their version and a copy.
Buffers = dict[Tensor, tuple[int, Tensor]]


def buffers_of(model: nn.Module, attributes: Snapshot) -> Buffers:
    """Buffers, and the other tensors among the attributes but for parameters, of which a copy might take too much memory."""
    contents = (content.values() if isinstance(content, dict) else content for _, content, _ in attributes)
    plain = (value for content in contents for value in content if issubclass(type(value), Tensor))
    tensors = (tensor for tensor in (*model.buffers(), *plain) if not isinstance(tensor, (nn.Parameter, FakeTensor)))
    tracked = {id(tensor): tensor for tensor in tensors if not tensor.is_inference()}
    return {tensor: (tensor._version, tensor.detach().clone()) for tensor in tracked.values()}


def restore_buffers(written: Buffers) -> None:
    """Write to them what was in them, where that is another."""
    with torch.no_grad():
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


def _put(held: dict[Any, Any] | Slots, content: dict[Any, Any]) -> None:
    """Give these keys, or slots, what they have in ``content``, or nothing."""
    for key, value in content.items():
        if isinstance(held, Slots):
            key.__delete__(held.owner) if value is _MISSING else key.__set__(held.owner, value)
        elif value is _MISSING:
            held.pop(key, None)
        else:
            held[key] = value


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
    members = _known_of(type(value)).members
    return Slots(value, members) if members else None


def _has_own(value: Any) -> bool:
    return _dict_of(value) is not None or bool(_known_of(type(value)).members)


def _attributes(value: Any) -> dict[Hashable, Any]:
    slots = _slots_of(value)
    return {**(_dict_of(value) or {}), **{member.__name__: part for member, part in (slots.read() if slots else {}).items()}}
