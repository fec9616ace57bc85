"""What makes a module pass for another one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn


class DropIn(nn.Module):
    """Has the parameters, buffers and submodules of ``original`` (the same objects, under the same names), is of its class for
    ``isinstance``, saves and loads its weights, moves with it, and passes every other attribute through to it.
    """

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # The dictionaries themselves are shared, so that both modules always hold the same parameters and submodules.
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = original.__dict__[kind]
        self.__dict__["_complete"] = False  # until then all that is set is this one's own
        self.__dict__["original"] = original
        self.__dict__["__module__"] = type(original).__module__  # with __class__, by which pipelines name their components
        self.training = original.training
        self._lock = threading.RLock()

    def _moved(self) -> None:
        """Called when weights may be elsewhere, or of another dtype."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The original's: ``isinstance`` holds for both, and a pipeline saves the component as what it loads it as."""
        original = self.__dict__.get("original")
        return type(self) if original is None else type(original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the original has and this has not is the original's: a setting of the model, which its forward reads."""
        original = self.__dict__.get("original")
        own = original is None or not self._complete or name in self.__dict__ or hasattr(nn.Module, name)
        if own or not hasattr(original, name):
            super().__setattr__(name, value)
        else:
            setattr(original, name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        self.original.train(mode)
        self.training = mode
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        with self._lock, _same_buffers(self.original):
            self.original.to(*args, **kwargs)
        with self._lock:
            self._moved()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        with self._lock, _same_buffers(self.original):
            self.original._apply(fn, recurse)
        with self._lock:
            self._moved()
        return self


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that are moved or cast meanwhile stay the same objects, as parameters do, so that who holds them follows."""
    before = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    yield
    for module, name, buffer in before:
        now = module._buffers.get(name)
        if now is None or buffer is None or now is buffer or buffer.is_meta or now.is_meta:
            continue
        if not (buffer.is_inference() or now.is_inference()) and torch._has_compatible_shallow_copy_type(buffer, now):
            buffer.data = now
            module._buffers[name] = buffer
