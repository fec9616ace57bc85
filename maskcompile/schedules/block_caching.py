"""Block caching: each block reuses its output until its calibrated change has added up to a threshold."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from maskcompile.mask import Mask
from maskcompile.program import Program
from maskcompile.schedules.changes import Changes
from maskcompile.schedules.masks import check_warmup, schedule_mask
from passes.rectify import Compute


def block_caching(
    program: Program,
    changes: Changes,
    threshold: float,
    *,
    warmup: int = 1,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """Each block computes again where its changes since it last did add up to more than ``threshold``.

    "Cache Me if You Can" (Wimbauer et al. 2023, arXiv 2312.03209), the automatic schedule: with L1rel(i, t) the relative
    absolute change of block i from one step to the next, averaged over calibration runs, what was computed at step t_a is
    reused up to the last t_b for which the sum of L1rel(i, t) over the steps since t_a is at most delta, the threshold. The
    paper's scale-shift adjustment, which is trained, is no part of a mask. changes: see ``measure_changes``; ``distance=1``
    is enough.
    """
    check_warmup(warmup)
    relative = changes.of(program, 1)[0]
    compute: Compute = np.ones(relative.shape, dtype=np.bool_)
    since = np.zeros(relative.shape[1])
    for step in range(warmup, len(relative)):
        since = since + relative[step]
        compute[step] = ~(since <= threshold)  # what was not measured computes
        since = np.where(compute[step], 0.0, since)
    provenance = {"schedule": "block_caching", "threshold": threshold, "warmup": warmup}
    return schedule_mask(program, changes.timesteps, compute, reuse, log_snr, **provenance)
