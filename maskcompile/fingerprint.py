"""What a capture of a denoiser depends on besides the inputs, so that a change of it can be noticed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterator, Mapping
from enum import Enum
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from passes.state import CONTAINERS, DEPTH, SCALARS, parts

#: (module path, attribute) -> something that compares equal as long as nothing was replaced.
Fingerprint = Mapping[tuple[str, str], Any]

#: Where something is: module path, attribute, and from there keys, positions and names of what is in it.
Place = tuple[Hashable, ...]


class Mark(Enum):
    """Follow the place of a container or object: what was ADDED to it, by its label, or its ORDER."""

    ADDED = "something added"
    ORDER = "the order"


#: Attributes of a module that hold its hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# torch.compile leaves a note on the modules that it compiles, which changes nothing about them.
_IGNORED = (frozenset(vars(nn.Module())) | {"_is_torch_compile"}) - {"training"}
_PLAIN = frozenset({bool, int, str, type(None)})

#: Classes of what is not the denoiser's own, by name, where processors may refer to it: it changes from picture to picture.
_OTHERS = frozenset({"SchedulerMixin", "DiffusionPipeline", "PreTrainedTokenizerBase"})

#: Bytes of an array whose values are looked at; larger ones count by identity.
_MOST_BYTES = 2**20


class _Same:
    """Equal for one and the same object while it lives: another one that takes its place in memory is not the same.

    A weak reference, for a denoiser may be among its own settings (a method of its own in the place of ``forward``). What takes
    none goes by its address, beside which what is in it is looked at; slices, which others take the place of, are kept.
    """

    __slots__ = ("address", "kept", "kind", "reference")

    def __init__(self, value: Any) -> None:
        self.kind, self.address = type(value), id(value)
        self.kept = None
        try:
            self.reference: weakref.ref[Any] | None = weakref.ref(value)
        except TypeError:
            self.reference = None
            self.kept = value if issubclass(self.kind, (slice, range, Number)) else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self.kind is not other.kind or self.address != other.address:
            return False
        if self.reference is None or other.reference is None:
            return self.reference is other.reference
        return (value := self.reference()) is not None and other.reference() is value

    __hash__ = None  # type: ignore[assignment]


class _Again(NamedTuple):
    """What was looked into before, where that was."""

    place: Place


class _Parts(NamedTuple):
    """What a container (by its type) or an object (by itself) holds. order: of what is in a container."""

    of: type | _Same
    order: tuple[Hashable, ...]
    parts: Mapping[Hashable, Any]


_MISSING = object()


def fingerprint(model: nn.Module) -> Fingerprint:
    """Modules, hooks, parameters and buffers (identity and layout, not values), and Python attributes of all modules."""
    found: dict[tuple[str, str], Any] = {}
    seen: _Seen = {}
    found["", ""] = _Same(model)
    for path, module in model.named_modules():
        own = vars(module)
        children = {name: None if child is None else _Same(child) for name, child in own["_modules"].items()}
        found[path, "_modules"] = _Parts(dict, tuple(children), children)
        for tensors in (own["_parameters"], own["_buffers"]):
            for name, tensor in tensors.items():
                found[path, name] = None if tensor is None else _tensor(tensor)
        for key in HOOKS:
            if own[key]:
                found[path, key] = _token(own[key], seen, (path, key))
        for key, value in settings(module):
            plain = type(value) in _PLAIN  # most are; this is done at the start of every run
            found[path, key] = value if plain else _token(value, seen, (path, key))
    return found


def settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The Python attributes of a module that may change what it does."""
    for key, value in list(vars(module).items()):
        if key not in _IGNORED and not (key == "_diffusers_hook" and _without_hooks(value)):
            yield key, value


def _without_hooks(value: Any) -> bool:
    """Whether it is a registry of hooks that has none: the pipelines of diffusers put one on a denoiser when they first run."""
    return not getattr(value, "hooks", None)


def changes(before: Fingerprint, after: Fingerprint) -> set[Place]:
    """Where two fingerprints differ; what was added to something is at its place, ``Mark.ADDED`` and the label."""
    found: set[Place] = set()
    for key in before.keys() | after.keys():
        _differ(key, before.get(key, _MISSING), after.get(key, _MISSING), found)
    return found


def _differ(place: Place, before: Any, after: Any, found: set[Place]) -> None:
    if before == after:
        return
    if type(before) is type(after) is float and math.isclose(before, after):  # PEFT multiplies scales, and divides them again
        return
    if not (isinstance(before, _Parts) and isinstance(after, _Parts) and before.of == after.of):
        found.add(place)
        return
    found.update((*place, Mark.ADDED, label) for label in after.parts.keys() - before.parts.keys())
    found.update((*place, label) for label in before.parts.keys() - after.parts.keys())
    both = before.parts.keys() & after.parts.keys()
    if [label for label in before.order if label in both] != [label for label in after.order if label in both]:
        found.add((*place, Mark.ORDER))
    for label in both:
        _differ((*place, label), before.parts[label], after.parts[label], found)


def value_at(model: nn.Module, place: Place) -> Any:
    """What is at a place now; None where it is gone."""
    path, attribute, *trail = place
    module = dict(model.named_modules()).get(str(path))
    if module is None:
        return None
    held = (module._buffers, module._parameters, vars(module))
    value = next((names[str(attribute)] for names in held if str(attribute) in names), None)
    for label in trail:
        value = value if label is Mark.ADDED else (parts(value) or {}).get(label)
    return value


def dotted(place: Place) -> str:
    """A place in a denoiser, as one would write it."""
    path, attribute, *trail = (label.value if isinstance(label, Mark) else str(label) for label in place)
    return ".".join([*(part for part in (path, attribute) if part), *trail]) or "the denoiser itself"


#: What a fingerprint has looked into, by id: where, and the object, whose id no other takes meanwhile.
_Seen = dict[int, tuple[Place, Any]]


def _tensor(value: Tensor) -> Any:
    return _Same(value), value.dtype, value.device, value.shape, value.stride() if value.layout is torch.strided else None


def _token(value: Any, seen: _Seen, place: Place, depth: int = DEPTH) -> Any:
    """Equal as long as nothing in a value was replaced. What is in a second place, or in itself, is looked into once."""
    kind = type(value)
    if issubclass(kind, SCALARS):
        return value if value == value else _Again(("nan",))  # which is not equal to itself
    if kind in (tuple, list) and all(type(part) in _PLAIN for part in value):
        return kind, *value
    if issubclass(kind, Tensor):
        return _tensor(value)
    if issubclass(kind, (np.ndarray, np.generic)) and value.nbytes <= _MOST_BYTES and not value.dtype.hasobject:
        return value.dtype.str, value.shape, hash(value.tobytes())
    if not depth or issubclass(kind, (nn.Module, type)) or any(base.__name__ in _OTHERS for base in kind.__mro__):
        return _Same(value)
    if id(value) in seen:
        return _Again(seen[id(value)][0])
    container = issubclass(kind, CONTAINERS)
    if (found := parts(value)) is None:
        return _shallow(value) if container else _Same(value)
    seen[id(value)] = place, value
    tokens = {label: _token(part, seen, (*place, label), depth - 1) for label, part in found.items()}
    return _Parts(kind, tuple(tokens), tokens) if container else _Parts(_Same(value), (), tokens)


def _shallow(value: Any) -> Any:
    """Of a large container, which is not looked into further."""
    parts = [*value, *dict.values(value)] if isinstance(value, dict) else value
    return type(value), *(part if type(part) in _PLAIN or type(part) is float else _Same(part) for part in parts)
