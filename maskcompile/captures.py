"""Captures that are kept as long as their denoiser lives: tracing it, learning a mask and optimising it capture it once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from maskcompile.fingerprint import Fingerprint, changes, fingerprint
from maskcompile.signature import Call
from passes.capture import Capture, capture, composite_modules

#: Held while anything is captured or compiled: torch does either in one thread at a time.
MAKING = threading.RLock()

#: Captures kept of one denoiser, those used least recently go first.
MOST_KEPT = 8


@dataclass(frozen=True)
class Captured:
    """after: the denoiser's fingerprint when it had been captured. volatile: what of it a forward changes by itself."""

    capture: Capture
    after: Fingerprint
    volatile: set[tuple[str, str]]


_kept: WeakKeyDictionary[nn.Module, dict[Any, Captured]] = WeakKeyDictionary()


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
            found = capture(model, call.args, call.kwargs, marks, batch)
            after = _without_root(fingerprint(model))
            made = Captured(found, after, changes(before, after))
        kept[key] = made  # the last to go
        while len(kept) > MOST_KEPT:
            del kept[next(iter(kept))]
    return made


def _without_root(found: Fingerprint) -> Fingerprint:
    """A fingerprint that does not keep the denoiser itself alive."""
    return {key: value for key, value in found.items() if key != ("", "")}
