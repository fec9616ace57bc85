"""Captures that are kept as long as their denoiser lives: tracing it, learning a mask and optimising it capture it once.

They also go into the file of ``fast.save_compiled`` and out of it in another process.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

from safetensors.torch import load, save
from torch import nn

from maskcompile._version import __version__
from maskcompile.fingerprint import Fingerprint, changes, digest, fingerprint
from maskcompile.signature import Call
from passes.capture import Capture, capture, composite_modules
from passes.serialise import restore, serialise

#: Held while anything is captured or compiled: torch does either in one thread at a time.
MAKING = threading.RLock()

#: Captures kept of one denoiser, those used least recently go first.
MOST_KEPT = 8


@dataclass(frozen=True)
class Captured:
    """after: the denoiser's fingerprint when it had been captured. volatile: what of it a forward changes by itself.

    name: in files, the same in another process; None where there is none.
    """

    capture: Capture
    after: Fingerprint
    volatile: set[tuple[str, str]]
    name: str | None


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
    before = _without_root(fingerprint(model))
    with MAKING:
        kept = _kept.setdefault(model, {})
        for other in [other for other, found in kept.items() if not changes(found.after, before) <= found.volatile]:
            del kept[other]
        made = kept.pop(key, None)
        if made is None:
            name = _name(model, call, marks) if batch is None else None
            found = _loaded(name, model, call) or capture(model, call.args, call.kwargs, marks, batch)
            after = _without_root(fingerprint(model))
            made = Captured(found, after, changes(before, after), name)
        kept[key] = made  # the last to go
        while len(kept) > MOST_KEPT:
            del kept[next(iter(kept))]
    return made


def _without_root(found: Fingerprint) -> Fingerprint:
    """A fingerprint that does not keep the denoiser itself alive."""
    return {key: value for key, value in found.items() if key != ("", "")}


def saved_captures(model: nn.Module, captures: Collection[Capture]) -> dict[str, bytes]:
    """Those of the ``captures`` of a denoiser that another process can take from a file, by name."""
    files = {}
    for made in _kept.get(model, {}).values():
        if made.name is None or not any(made.capture.graph_module is capture.graph_module for capture in captures):
            continue
        try:
            document, constants = serialise(made.capture, model)
        except ValueError:  # another process captures it anew
            continue
        files[made.name] = json.dumps(document).encode()
        if constants:
            files[made.name + CONSTANTS] = save(constants)
    return files


def load_captures(files: Mapping[str, bytes]) -> None:
    """Take captures from what ``saved_captures`` returned from now on, where they are in it."""
    _loadable.update(files)


def _name(model: nn.Module, call: Call, marks: frozenset[str]) -> str | None:
    """A name for a capture that another process comes to as well, if it is of the same code and settings at the same inputs."""
    found = digest(model)
    described = repr(call.key.parts)
    if found is None or " at 0x" in described:  # an argument that is told by its address alone
        return None
    return sha256("\n".join([__version__, found, described, *sorted(marks)]).encode()).hexdigest()


def _loaded(name: str | None, model: nn.Module, call: Call) -> Capture | None:
    """A capture of a file; None where there is none, or it is not what the denoiser does."""
    content = _loadable.get(name or "")
    if name is None or content is None:
        return None
    try:
        constants = load(_loadable[name + CONSTANTS]) if name + CONSTANTS in _loadable else {}
        return restore(json.loads(content), constants, model, call.args, call.kwargs)
    except Exception as error:  # whatever it is: if the denoiser itself fails at these inputs, a new capture will say so
        del _loadable[name]
        warnings.warn(f"a capture in a file of save_compiled is not used, and made afresh: {error}", stacklevel=2)
        return None
