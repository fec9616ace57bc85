"""T-GATE: cross-attention up to the gate step, and no further."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from maskcompile.mask import Mask, MaskError, steps_of
from maskcompile.program import Program
from maskcompile.schedules.layers import attention_blocks
from maskcompile.schedules.masks import check_warmup, schedule_mask
from passes.rectify import Compute


def tgate(
    program: Program,
    timesteps: Iterable[float],
    gate: int = 10,
    *,
    planning: int = 1,
    improving: int = 1,
    warmup: int = 2,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """Cross-attention computes at the first ``gate`` steps and is reused at all later ones.

    T-GATE (Zhang et al. 2024, arXiv 2404.02747): cross-attention converges within a few steps, up to the gate step m, and
    C_i = C_(m - 1) stands for its output at all steps i >= m. The extension of the authors' package to self-attention:
    between ``warmup`` and the gate (the semantics-planning phase) it computes at every ``planning``-th step, from the gate on
    (the fidelity-improving phase) at every ``improving``-th, counted from the start of the run; 1, as in the paper, is always.

    What a mask does not express: after the gate the method also drops guidance, halves the batch and reuses the mean of the
    conditional and unconditional outputs. Under a mask guidance goes on, and each half of the batch keeps its own output;
    dropping it is for the pipeline (``guidance_scale``) to do.
    """
    check_warmup(warmup)
    if gate < 1 or planning < 1 or improving < 1:
        raise MaskError(f"gate, planning and improving are at least 1; got {gate}, {planning} and {improving}.")
    steps = steps_of(timesteps)
    blocks = attention_blocks(program, ["cross"])
    index = np.arange(len(steps))
    in_turn = np.where(index < gate, index % planning, index % improving) == 0
    runs = {"cross": (index < gate) | (index < warmup)}
    # The step at the end of the warm-up and the one before the gate fill the cache, whatever their turn.
    runs |= dict.fromkeys(("spatial", "temporal"), in_turn | (index <= warmup) | (index == gate - 1))
    compute: Compute = np.ones((len(steps), len(program.names)), dtype=np.bool_)
    for position, name in enumerate(program.names):
        if name in blocks:
            compute[:, position] = runs[blocks[name]]
    provenance = {"schedule": "tgate", "gate": gate, "planning": planning, "improving": improving, "warmup": warmup}
    return schedule_mask(program, steps, compute, reuse, log_snr, **provenance)
