from __future__ import annotations

import diffusers
import pytest


class NoBar:
    def __init__(self, iterable=None, total=None):
        self.iterable = iterable

    def __iter__(self):
        return iter(self.iterable)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def update(self, n=1):
        pass


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    diffusers.utils.logging.disable_progress_bar()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "progress_bar", lambda self, *args, **kwargs: NoBar(*args, **kwargs))
