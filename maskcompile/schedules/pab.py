"""Pyramid Attention Broadcast: each kind of attention at every n-th step of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from maskcompile.mask import Mask, MaskError, steps_of
from maskcompile.program import Program
from maskcompile.schedules.layers import attention_blocks
from maskcompile.schedules.masks import check_warmup, schedule_mask
from passes.rectify import Compute

Window = tuple[float, float]


def pab(
    program: Program,
    timesteps: Iterable[float],
    ranges: Mapping[str, int],
    window: Window | Mapping[str, Window] = (100, 800),
    *,
    warmup: int = 1,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """Attention computes at every n-th step within a window of timesteps, n by its kind, and always outside; the rest always.

    PAB (Zhao et al. 2024, arXiv 2408.12588): Y_i = ... = Y_(i + n - 1) = F(X_i) for the output F of attention, with a broadcast
    range n for each kind, the longer the less it changes: spatial, temporal, cross. Steps are counted from the start of the
    run, as by the hook of diffusers (``PyramidAttentionBroadcastConfig``). The broadcast of MLPs in the authors' code is left
    out.

    ranges: n for each kind, {"spatial": 2, "temporal": 4, "cross": 6} say; a kind that is not named always computes. Kinds are
    found from the graph (``passes.attention``); attention over frames and positions together is spatial. window: timesteps
    strictly between the two may reuse, for all kinds or for each. Raises MaskError for a kind without a block of its own, and
    for a window without a timestep.
    """
    check_warmup(warmup)
    steps = steps_of(timesteps)
    if bad := [n for n in ranges.values() if n < 1]:
        raise MaskError(f"a broadcast range is at least 1 step; got {bad[0]}.")
    blocks = attention_blocks(program, ranges)
    values, index = np.array([float(t) for t in steps]), np.arange(len(steps))
    compute: Compute = np.ones((len(steps), len(program.names)), dtype=np.bool_)
    windows = dict(window) if isinstance(window, Mapping) else dict.fromkeys(ranges, window)
    for kind, interval in ranges.items():
        if kind not in windows:
            raise MaskError(f"window names no timesteps for {kind} attention.")
        low, high = windows[kind]
        if interval > 1 and not np.any((low < values) & (values < high)):
            raise MaskError(
                f"no timestep lies in the window {low:g} to {high:g} of {kind} attention: they are between {values.min():g} "
                f"and {values.max():g}. Give window= in the values that the denoiser is called with."
            )
        runs = (index < warmup) | (index % interval == 0) | ~((low < values) & (values < high))
        compute[:, [blocks.get(name) == kind for name in program.names]] = runs[:, None]
    provenance = {
        "schedule": "pab",
        "ranges": dict(ranges),
        "window": {k: list(w) for k, w in windows.items()},
        "warmup": warmup,
    }
    return schedule_mask(program, steps, compute, reuse, log_snr, **provenance)
