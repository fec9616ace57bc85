"""The ground truth for masks: module forwards swapped for their stored outputs. Shares no code with the library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def copy(value):
    """Clone every tensor in tuples, lists and dicts, so that in-place code of a model cannot reach what is stored."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(copy(v) for v in value)
    if isinstance(value, dict):
        return type(value)((k, copy(v)) for k, v in value.items())
    return value


class Executor:
    """Runs ``model`` under boolean rows [steps][blocks]: False returns the block's output of the last step that ran it."""

    def __init__(self, model, blocks: Sequence[str], compute: Sequence[Sequence[bool]]) -> None:
        self.model, self.blocks, self.compute = model, list(blocks), compute
        self.reset()

    def reset(self) -> None:
        self.stored: dict = {}
        self.within: dict = {}

    @contextmanager
    def _swapped(self, row: Sequence[bool]) -> Iterator[None]:
        counts: Counter = Counter()
        modules = [self.model.get_submodule(name) for name in self.blocks]
        own = [vars(module).get("forward") for module in modules]

        def swap(name, module, runs):
            forward = module.forward

            def masked(*args, **kwargs):
                key = (name, counts[name])
                counts[name] += 1
                if not runs and key in self.stored:
                    counts.update(self.within[key])  # calls that would have happened inside keep their numbers
                    return copy(self.stored[key])
                before = counts.copy()
                output = forward(*args, **kwargs)
                self.stored[key], self.within[key] = copy(output), counts - before
                return output

            module.forward = masked

        for name, module, runs in zip(self.blocks, modules, row, strict=True):
            swap(name, module, bool(runs))
        try:
            yield
        finally:
            for module, forward in zip(modules, own, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward

    def step(self, index: int, *args, **kwargs):
        with torch.no_grad(), self._swapped(self.compute[index]):
            return self.model(*args, **kwargs)

    def full(self, *args, **kwargs):
        """A step outside the mask: everything runs, and is stored."""
        with torch.no_grad(), self._swapped([True] * len(self.blocks)):
            return self.model(*args, **kwargs)
