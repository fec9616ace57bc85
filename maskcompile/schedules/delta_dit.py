"""Delta-DiT: the rear layers of a transformer are reused early in a run, the front layers late."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np

from maskcompile.mask import Mask, MaskError, steps_of
from maskcompile.program import Program
from maskcompile.schedules.layers import transformer_layers
from maskcompile.schedules.masks import full_steps, schedule_mask
from passes.rectify import Compute


def delta_dit(
    program: Program,
    timesteps: Iterable[float],
    interval: int,
    cached: int,
    boundary: int,
    *,
    warmup: int = 1,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """Everything at every ``interval``-th step; in between, ``cached`` layers are reused: rear ones early, front ones late.

    Delta-DiT (Chen et al. 2024, arXiv 2406.01125): Delta-Cache skips a range of N_c layers F and adds to its input
    what F added at the last step s that computed it, F(x_t) = x_t + (F(x_s) - x_s). Front layers make the outline and
    rear ones the details, so that the rear ones are skipped before the boundary b and the front ones after it.

    As a mask: the attention and MLP blocks of the range are reused. In a residual stream x + f(x) + g(x + f(x)) + ... their
    outputs add up to the delta, so that the two are the same. Where the layer scales a block's output outside of the block by
    the timestep, as the gates of DiT's adaLN do, the mask applies the gates of the present step and Delta-Cache those of the
    step s; the two differ by that.

    interval: N. cached: N_c, in layers: from one self-attention to before the next. boundary: how many steps, from the start of
    the run, skip the rear layers.
    """
    steps = steps_of(timesteps)
    layers = transformer_layers(program)
    if not 1 <= cached <= len(layers):
        raise MaskError(f"cached must be 1 to {len(layers)} layers for {program.denoiser}; got {cached}.")
    if not 0 <= boundary <= len(steps):
        raise MaskError(f"boundary must be 0 to {len(steps)} steps; got {boundary}.")
    full = full_steps(len(steps), interval, warmup)
    front, rear = list(chain(*layers[:cached])), list(chain(*layers[-cached:]))
    compute: Compute = np.ones((len(steps), len(program.names)), dtype=np.bool_)
    for step in np.flatnonzero(~full):
        compute[step, rear if step < boundary else front] = False
    provenance = {"schedule": "delta_dit", "interval": interval, "cached": cached, "boundary": boundary, "warmup": warmup}
    return schedule_mask(program, steps, compute, reuse, log_snr, **provenance)
