"""Learning-to-Cache: the import of learned routers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from maskcompile.mask import Mask, MaskError, steps_of
from maskcompile.program import Program
from maskcompile.schedules.masks import check_warmup, schedule_mask
from passes.rectify import Compute

#: Scores [steps, layers], or the path of a JSON file with them, as they are or under "scores"; None for a row not needed.
Router = str | os.PathLike[str] | ArrayLike | Sequence[Sequence[float] | None]


def l2c(
    program: Program,
    timesteps: Iterable[float],
    router: Router,
    threshold: float = 0.1,
    *,
    warmup: int = 1,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """The layers that a learned router computes, at every second step; everything at the others.

    L2C (Ma et al. 2024, arXiv 2406.01733): at a step s after a full step m, layer i gives b_i f_i(x_s) + (1 - b_i) f_i(x_m). In
    training b_i is a learned score, the router's; at inference it is 1 where that is over a threshold (0.1 for the published
    routers of DiT-XL/2 256) and 0 elsewhere. Layers are the attention (index 2j) and the MLP (2j + 1) of the j-th transformer
    block; here attention and feed-forward blocks in call order. Steps are indexed as in the respaced diffusion, 0 the least
    noisy, so that a run visits rows from last to first; odd rows compute everything, whatever their scores, and an even one
    reuses what the row before it in the run computed.

    router: scores between 0 and 1, float [steps, layers]. The published files are pickles, of logits: load one with
    ``torch.load(path, weights_only=True)["routers"]`` and pass ``torch.stack(list(of_it.values())).sigmoid()``.
    Raises MaskError where the numbers of steps or layers differ, or blocks do not alternate between attention and
    feed-forward.
    """
    check_warmup(warmup)
    steps = steps_of(timesteps)
    rows = _rows(router)
    kinds = [block.kind for block in program.blocks]
    if kinds != ["attention", "feed_forward"] * (len(kinds) // 2):
        raise MaskError(
            f"a router's layers are attention and MLP in turn; the blocks of {program.denoiser} are not. "
            "Trace it with blocks= that take these."
        )
    if len(rows) != len(steps):
        raise MaskError(f"the router was learned for {len(rows)} steps; got {len(steps)} timesteps.")
    compute: Compute = np.ones((len(steps), len(kinds)), dtype=np.bool_)
    for step in range(warmup, len(steps)):
        index = len(steps) - 1 - step
        if index % 2 == 0:
            compute[step] = _scores(rows[index], index, len(kinds)) > threshold
    return schedule_mask(program, steps, compute, reuse, log_snr, schedule="l2c", threshold=threshold, warmup=warmup)


def _rows(router: Any) -> list[Any]:
    if isinstance(router, (str, os.PathLike)):
        try:
            router = json.loads(Path(router).read_text(encoding="utf-8"))
        except ValueError as error:
            raise MaskError(
                f"{router} is no JSON file ({error}); a router in a pickle is for you to load, and to pass as a tensor."
            ) from None
    if isinstance(router, dict):
        router = router.get("scores")
    rows = router if isinstance(router, list) else np.asarray(getattr(router, "tolist", lambda: router)())
    if not isinstance(rows, list) and rows.ndim != 2:
        raise MaskError(f"a router is scores [steps, layers]; got an array of the shape {list(rows.shape)}.")
    return list(rows)


def _scores(row: Any, index: int, layers: int) -> Any:
    scores = np.asarray([] if row is None else row, dtype=np.float64)
    if scores.shape != (layers,):
        raise MaskError(f"row {index} of the router has the shape {list(scores.shape)}; the denoiser has {layers} layers.")
    if not (np.all(scores >= 0) and np.all(scores <= 1)):
        raise MaskError(f"row {index} of the router is not between 0 and 1; take the sigmoid of its logits.")
    return scores
