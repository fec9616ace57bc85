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


def extrapolate(outputs, clocks, step):
    """The value at ``step`` of the polynomial through ``outputs``: pairs (step, output), newest first.

    The clock that puts the step the nearest, relative to the last two outputs, counts; beyond their distance the newest holds.
    A clock that returns None does not know the time of a step.
    """
    newest = outputs[0][1]
    if len(outputs) == 1:
        return copy(newest)
    if not isinstance(newest, torch.Tensor):
        if isinstance(newest, dict):
            return {k: extrapolate([(s, o[k]) for s, o in outputs], clocks, step) for k in newest}
        if isinstance(newest, (tuple, list)):
            return type(newest)(extrapolate([(s, o[i]) for s, o in outputs], clocks, step) for i in range(len(newest)))
        return newest
    if not newest.is_floating_point():
        return newest.clone()
    ahead = {}
    for clock in clocks:
        if None in [clock(step), *(clock(s) for s, _ in outputs)]:
            continue
        now, last, before = clock(step), clock(outputs[0][0]), clock(outputs[1][0])
        ahead.setdefault((now - last) / (last - before), clock)
    if min(ahead) > 1:
        return newest.clone()
    clock = ahead[min(ahead)]
    wide = torch.float64 if newest.dtype == torch.float64 else torch.float32
    y, at, x = newest.to(wide), [clock(s) for s, _ in outputs], clock(step)
    total = y
    for j in range(1, len(outputs)):
        weight = 1.0
        for k in range(len(outputs)):
            if k != j:
                weight *= (x - at[k]) / (at[j] - at[k])
        total = total + -weight * (y - outputs[j][1].to(wide))
    return total.to(newest.dtype)


class Executor:
    """Runs ``model`` under boolean rows [steps][blocks]: False returns what the block's rule makes of its outputs so far.

    order: 0 holds the last output, 1 and 2 extrapolate from the last two and three; of all blocks, or one for each.
    log_snr: of each step.
    """

    def __init__(self, model, blocks: Sequence[str], compute: Sequence[Sequence[bool]], order=0, log_snr=None) -> None:
        self.model, self.blocks, self.compute = model, list(blocks), compute
        self.order = dict(zip(blocks, [order] * len(blocks) if isinstance(order, int) else order, strict=True))
        self.clocks = [lambda s: s]
        if log_snr is not None:
            self.clocks.append(lambda s: None if s in self.outside else log_snr[s])
        self.reset()

    def reset(self) -> None:
        self.stored: dict = {}
        self.within: dict = {}
        self.outside: set = set()

    @contextmanager
    def _swapped(self, row: Sequence[bool], step: int) -> Iterator[None]:
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
                    return extrapolate(self.stored[key], self.clocks, step)
                before = counts.copy()
                output = forward(*args, **kwargs)
                self.stored[key] = [(step, copy(output)), *self.stored.get(key, [])][: self.order[name] + 1]
                self.within[key] = counts - before
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
        with torch.no_grad(), self._swapped(self.compute[index], index):
            return self.model(*args, **kwargs)

    def full(self, following: int, *args, **kwargs):
        """A step outside the mask, just before ``following``: everything runs, and what was stored before is forgotten."""
        self.reset()
        self.outside = {following - 1}
        with torch.no_grad(), self._swapped([True] * len(self.blocks), following - 1):
            return self.model(*args, **kwargs)
