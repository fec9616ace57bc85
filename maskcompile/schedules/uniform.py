"""FORA: everything at every n-th step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from maskcompile.mask import Mask, steps_of
from maskcompile.program import Program
from maskcompile.schedules.masks import full_steps, schedule_mask


def uniform(
    program: Program,
    timesteps: Iterable[float],
    interval: int,
    *,
    warmup: int = 1,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """Everything at every ``interval``-th step, nothing in between.

    FORA (Selvaraju et al. 2024, arXiv 2407.01425), section 3: attention and MLP outputs of a DiT are recomputed at every N-th
    step.
    """
    steps = steps_of(timesteps)
    compute = np.repeat(full_steps(len(steps), interval, warmup)[:, None], len(program.blocks), 1)
    return schedule_mask(program, steps, compute, reuse, log_snr, schedule="uniform", interval=interval, warmup=warmup)
