"""Which blocks a step needs most: the gradient of its error in the decision to compute each block, caches aged by a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maskcompile.learning.recording import Recording
from maskcompile.learning.relaxed import Features, RelaxedDenoiser, recalled
from maskcompile.mask import Mask

#: Scores at which the gradient is taken: midpoints of equal parts of the way.
AT = (0.25, 0.75)


def sensitivities(
    relaxed: RelaxedDenoiser, recording: Recording, mask: Mask, steps: Sequence[int]
) -> dict[int, NDArray[np.float64]]:
    """step -> float64 [blocks]: how much of the error of a step that reuses everything goes away by computing each block.

    The error is that of ``RelaxedDenoiser.error`` at each of ``steps``, with what ``mask``'s rules make of the last steps at
    which the mask computes the block. It is shared out by its gradient along the straight way from reusing to computing all
    (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365, eq. 1): at its start alone, nothing upstream of a reused
    block would count. Costs a forward of every step, and ``len(AT)`` forwards and backwards of each of ``steps``; memory does
    not grow with the number of steps.
    """
    kept: dict[int, Features] = {}
    result: dict[int, NDArray[np.float64]] = {}
    wanted = set(steps)
    for step, calls in enumerate(recording.steps):
        if step in wanted and step > 0:
            ran = [_ran(mask, block, step) for block in range(len(mask.blocks))]
            cached = recalled(mask.blocks, kept, ran, step, len(calls), mask.rules)
            device = calls[0].call.tensors[0].device
            slopes = [relaxed.error(calls, cached, torch.full((len(mask.blocks),), s, device=device))[1] for s in AT]
            result[step] = np.maximum(-torch.stack(slopes).double().mean(0).cpu().numpy(), 0.0)
        if mask.compute[step].any() or step == 0:
            kept[step] = relaxed.observe(calls)
        needed = {at for index in range(len(mask.blocks)) for at in _ran(mask, index, step + 1)[-2:]}
        kept = {at: features for at, features in kept.items() if at in needed}
    return result


def _ran(mask: Mask, block: int, step: int) -> list[int]:
    """The steps before ``step`` at which a block runs; at the first all do."""
    return [at for at in range(step) if at == 0 or mask.compute[at, block]]
