"""Which blocks a step needs most: the gradient of its error in the decision to compute each block, caches aged by a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maskcompile.learning.recording import Recording
from maskcompile.learning.relaxed import Features, RelaxedDenoiser, recalled
from maskcompile.mask import Mask


def sensitivities(relaxed: RelaxedDenoiser, recording: Recording, mask: Mask, steps: Sequence[int]) -> dict[int, NDArray[np.float64]]:
    """step -> float64 [blocks]: how much computing each block would lower the error of a step that reuses everything.

    The error of ``RelaxedDenoiser.error`` to first order, at each of ``steps``, with what ``mask``'s rules make of the last
    steps at which the mask computes the block. Costs a forward of every step, and a forward and a backward of each of
    ``steps``; memory does not grow with the number of steps.
    """
    kept: dict[int, Features] = {}
    result: dict[int, NDArray[np.float64]] = {}
    wanted = set(steps)
    for step, calls in enumerate(recording.steps):
        if step in wanted and step > 0:
            cached = recalled(mask.blocks, kept, lambda b, now=step: _ran(mask, b, now), step, len(calls), mask.reuse, mask.log_snr)
            scores = torch.zeros(len(mask.blocks), device=calls[0].call.tensors[0].device)
            _, slope = relaxed.error(calls, cached, scores)
            result[step] = np.maximum(-slope.double().cpu().numpy(), 0.0)
        if mask.compute[step].any() or step == 0:
            kept[step] = relaxed.observe(calls)
        needed = {at for index in range(len(mask.blocks)) for at in _ran(mask, index, step + 1)[-2:]}
        kept = {at: features for at, features in kept.items() if at in needed}
    return result


def _ran(mask: Mask, block: int, step: int) -> list[int]:
    """The steps before ``step`` at which a block runs; at the first all do."""
    return [at for at in range(step) if at == 0 or mask.compute[at, block]]
