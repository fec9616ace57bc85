"""What every schedule begins with, its full steps, and ends in, a mask that says where it came from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from maskcompile.mask import Mask, MaskError
from maskcompile.program import Program
from passes.rectify import Compute


def full_steps(steps: int, interval: int, warmup: int) -> Compute:
    """bool [steps]: the first ``warmup`` steps, and every ``interval``-th counted from the last of them."""
    if interval < 1 or interval != int(interval):
        raise MaskError(f"interval must be a whole number, at least 1; got {interval}.")
    check_warmup(warmup)
    index = np.arange(steps)
    full: Compute = (index < warmup) | ((index - warmup + 1) % interval == 0)
    return full


def check_warmup(warmup: int) -> None:
    if warmup < 1:
        raise MaskError(f"warmup must be at least 1, since a run's first step has nothing to reuse; got {warmup}.")


def schedule_mask(
    program: Program,
    timesteps: tuple[float, ...],
    compute: Compute,
    reuse: str,
    log_snr: Iterable[float] | None,
    **provenance: object,
) -> Mask:
    """The mask of all of the program's blocks, with the schedule's name and parameters as its provenance."""
    return Mask(
        compute,
        blocks=program.names,
        timesteps=timesteps,
        reuse=reuse,
        log_snr=log_snr,
        denoiser=program.denoiser,
        block_hash=program.block_hash,
        provenance={**provenance, "torch": torch.__version__},
    )
