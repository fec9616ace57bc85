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


def extrapolate(outputs, clocks, step, reach=None):
    """The line through the last two of ``outputs``, pairs (step, output) with the newest first, at ``step``.

    Of several clocks that which puts the step nearest, relative to the distance of the two outputs; at most as far as that,
    and only where the result is finite. Or reach times as far, up to one and a half times that distance.
    A clock is a function of the step, None where it does not know the time.
    """
    newest = outputs[0][1]
    if len(outputs) == 1:
        return copy(newest)
    if isinstance(newest, dict):
        return {k: extrapolate([(s, o[k]) for s, o in outputs], clocks, step, reach) for k in newest}
    if isinstance(newest, (tuple, list)):
        return type(newest)(extrapolate([(s, o[i]) for s, o in outputs], clocks, step, reach) for i in range(len(newest)))
    if not isinstance(newest, torch.Tensor) or not (newest.is_floating_point() or newest.is_complex()):
        return copy(newest)
    ahead = [1.0]
    for clock in clocks:
        now, last, before = clock(step), clock(outputs[0][0]), clock(outputs[1][0])
        if None not in (now, last, before) and last != before:
            ahead.append((now - last) / (last - before))
    wide = torch.float32 if newest.dtype in (torch.float16, torch.bfloat16) else newest.dtype
    y = newest.to(wide)
    c = min(ahead) if reach is None else min(min(ahead) * reach, 1.5)
    value = (y + c * (y - outputs[1][1].to(wide))).to(newest.dtype)
    return torch.where(value.isfinite(), value, newest)


class Executor:
    """Runs ``model`` under boolean rows [steps][blocks]: False returns what the block's rule makes of its outputs so far.

    order: 0 holds the last output, 1 extrapolates from the last two; of all blocks, or one for each. log_snr, reach: of each step.
    """

    def __init__(
        self, model, blocks: Sequence[str], compute: Sequence[Sequence[bool]], order=0, log_snr=None, reach=None
    ) -> None:
        self.model, self.blocks, self.compute = model, list(blocks), compute
        self.order = dict(zip(blocks, [order] * len(blocks) if isinstance(order, int) else order, strict=True))
        self.clocks = [lambda s: s]
        if log_snr is not None:
            self.clocks.append(lambda s: None if s in self.outside else max(log_snr[s], -6.0))
        self.reach = reach
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
                    return extrapolate(self.stored[key], self.clocks, step, None if self.reach is None else self.reach[step])
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
