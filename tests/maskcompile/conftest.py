"""Fixtures of several test modules."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import pytest

from maskcompile import captures


@pytest.fixture
def counted(monkeypatch):
    """Captures that were made, neither kept from other tests nor taken from a file."""
    made = []
    own = captures.capture

    def capture(*args, **kwargs):
        made.append(len(made))
        return own(*args, **kwargs)

    monkeypatch.setattr(captures, "capture", capture)
    monkeypatch.setattr(captures, "_kept", WeakKeyDictionary())
    monkeypatch.setattr(captures, "_loadable", {})
    return made
