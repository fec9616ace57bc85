"""Which blocks a step needs most: the gradient of its error in the decision to compute each block, caches aged by a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maskcompile.learning.recording import Recording
from maskcompile.learning.relaxed import Features, RelaxedDenoiser, recalled, since
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
    not grow with the number of steps. Calls whose trajectory begins at a step have no error there.
    """
    kept: dict[int, Features] = {}
    result: dict[int, NDArray[np.float64]] = {}
    wanted, begun = set(steps), recording.begun
    for step, calls in enumerate(recording.steps):
        ran = [np.flatnonzero(column[:step]).tolist() for column in mask.compute.T]
        if step in wanted and step > 0:
            cached = recalled(mask.blocks, kept, ran, step, begun[step], mask.rules)
            device = calls[0].call.tensors[0].device
            slopes = [relaxed.error(calls, cached, torch.full((len(mask.blocks),), s, device=device))[1] for s in AT]
            result[step] = np.maximum(-torch.stack(slopes).double().mean(0).cpu().numpy(), 0.0)
        if mask.compute[step].any() or step in begun[step]:
            kept[step] = relaxed.observe(calls)
        ran = [np.flatnonzero(column[: step + 1]).tolist() for column in mask.compute.T]
        going = {start for start in (begun[step + 1] if step + 1 < len(begun) else ()) if start <= step}
        needed = {at for start in going for each in ran for at in since(start, each)[-2:]}
        kept = {at: features for at, features in kept.items() if at in needed}
    return result
