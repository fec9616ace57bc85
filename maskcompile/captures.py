"""Captures that are kept as long as their denoiser lives: tracing it, learning a mask and optimising it capture it once.

They also go into the file of ``fast.save_compiled`` and out of it in another process.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from maskcompile._version import __version__
from maskcompile.digest import digest, sources
from maskcompile.fingerprint import Fingerprint, Mark, Place, changes, fingerprint, value_at
from maskcompile.signature import Call
from passes.capture import Capture, CaptureError, capture, composite_modules, constants
from passes.serialise import restore, serialise
from passes.state import CONTAINERS, inner_tensors

#: Held while anything is captured or compiled: torch does either in one thread at a time.
MAKING = threading.RLock()

#: Captures kept of one denoiser, those used least recently go first.
MOST_KEPT = 8


@dataclass(frozen=True)
class Captured:
    """after: the denoiser's fingerprint when it had been captured. volatile: where a forward changes it by itself, except where
    the graph holds what is there: where that is set anew, the capture is of the past.

    name: in files, the same in another process. sources: the code that it is of, see ``maskcompile.digest``. unnamed: why it
    has no name; empty, too, for a capture for any batch, which has none.
    """

    capture: Capture
    after: Fingerprint
    volatile: frozenset[Place]
    name: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    unnamed: str = ""


_kept: WeakKeyDictionary[nn.Module, dict[Any, Captured]] = WeakKeyDictionary()

#: What ``load_captures`` was given, by name.
_loadable: dict[str, bytes] = {}

#: Ends the name of the constants of a capture.
CONSTANTS = ".safetensors"


def capture_once(model: nn.Module, call: Call, marked: Iterable[str] = (), batch: Mapping[int, int] | None = None) -> Captured:
    """A denoiser captured at a call, with every composite module and those in ``marked`` marked; see ``passes.capture``.

    A capture that was made before is returned while the denoiser's modules, weights, hooks and settings are what they were.
    """
    marks = frozenset(composite_modules(model)).union(marked)
    key = call.key, marks, None if batch is None else tuple(batch.items())
    with MAKING:
        before = fingerprint(model)
        kept = _kept.setdefault(model, {})
        for other in [other for other, found in kept.items() if unexplained(found.after, before, found.volatile)]:
            del kept[other]
        made = kept.pop(key, None)
        if made is None:
            made = _captured(model, call, marks, batch, before)
        kept[key] = made  # the last to go
        while len(kept) > MOST_KEPT:
            del kept[next(iter(kept))]
    return made


def _captured(
    model: nn.Module, call: Call, marks: frozenset[str], batch: Mapping[int, int] | None, before: Fingerprint
) -> Captured:
    """A capture made now. before: of the denoiser as it is."""
    name, unnamed = _name(model, call, marks) if batch is None else ("", "")
    found, code = _loaded(name, model, call) or (capture(model, call.args, call.kwargs, marks, batch), {})
    after = fingerprint(model)
    if name and not code:
        try:
            code = sources(found)
        except Exception as error:
            name, unnamed = "", str(error)
    memory = constants(found)
    volatile = set()
    for place in changes(before, after):
        if not _holds(value_at(model, place), memory):
            volatile.add(_without_mark(place))
        if Mark.ADDED in place and issubclass(type(value_at(model, within := place[: place.index(Mark.ADDED)])), CONTAINERS):
            volatile.add((*within, Mark.ADDED))  # it will add more
    return Captured(found, after, frozenset(volatile), name, code, unnamed)


def _without_mark(place: Place) -> Place:
    """Where what was added is from now on."""
    return tuple(label for label in place if label is not Mark.ADDED)


def unexplained(before: Fingerprint, now: Fingerprint, volatile: Collection[Place]) -> set[Place]:
    """Where a denoiser is not what it was, but for where its own forwards change it, and what is in there."""
    found = changes(before, now)
    return {place for place in found if not any(place[:end] in volatile for end in range(2, len(place) + 1))}


def _holds(value: Any, memory: Collection[int]) -> bool:
    """Whether a value has a tensor in one of these places in memory, itself or in containers and objects."""
    return any(tensor.untyped_storage().data_ptr() in memory for tensor in inner_tensors(value))


def saved_captures(model: nn.Module, captures: Collection[Capture]) -> dict[str, bytes]:
    """Those of the ``captures`` of a denoiser that another process can take from a file, by name.

    A warning says which cannot be kept, but for those for any batch.
    """
    files = {}
    with MAKING:
        kept = {id(made.capture.graph_module): made for made in _kept.get(model, {}).values()}
    for captured in captures:
        try:
            made = kept.get(id(captured.graph_module))
            if made is None:
                raise ValueError(f"more than {MOST_KEPT} were made")
            if made.name:
                document, constants = serialise(made.capture, model)
                content = json.dumps({**document, "sources": made.sources}).encode(), save(constants)
                files[made.name], files[made.name + CONSTANTS] = content
            elif made.unnamed:
                raise ValueError(made.unnamed)
        except Exception as error:  # of safetensors, which has errors of its own, too
            warnings.warn(
                f"the file has not every capture of {type(model).__name__}, and another process has to make it anew: {error}.",
                stacklevel=3,
            )
    return files


def load_captures(files: Mapping[str, bytes]) -> None:
    """Take captures from what ``saved_captures`` returned from now on, where they are in it."""
    _loadable.update(files)


def _name(model: nn.Module, call: Call, marks: frozenset[str]) -> tuple[str, str]:
    """(a name for a capture that another process comes to as well, "") or ("", why there is none)."""
    try:
        described = repr(call.key.parts)
        if " at 0x" in described:
            raise ValueError("an argument is told by its address alone")
        found = digest(model)
    except Exception as error:  # whatever the settings of a denoiser do when they are looked at, capturing goes on
        return "", str(error)
    return sha256("\n".join([__version__, found, described, *sorted(marks)]).encode()).hexdigest(), ""


def _loaded(name: str, model: nn.Module, call: Call) -> tuple[Capture, dict[str, str]] | None:
    """A capture of a file and the code that it is of; None where there is none, or it is not what the denoiser does."""
    if name not in _loadable:
        return None
    try:
        return _restored(name, model, call)
    except CaptureError as error:
        del _loadable[name]
        _loadable.pop(name + CONSTANTS, None)
        warnings.warn(f"a capture in a file of save_compiled is not used, and made afresh: {error}", stacklevel=2)
        return None


def _restored(name: str, model: nn.Module, call: Call) -> tuple[Capture, dict[str, str]]:
    try:
        document, constants = json.loads(_loadable[name]), load(_loadable[name + CONSTANTS])
        code: dict[str, str] = document["sources"]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CaptureError(f"it is damaged ({error}).") from error
    restored = restore(document, constants, model, call.args, call.kwargs)
    try:
        ran = sources(restored)
    except Exception as error:
        raise CaptureError(f"{error}.") from error
    if other := [module for module in ran if code.get(module) != ran[module]]:
        raise CaptureError(f"the code of {other[0]} is not what it was.")
    return restored, code
