"""SmoothCache: layer types reuse while their calibrated error is under a threshold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskcompile.mask import Mask, MaskError, steps_of
from maskcompile.program import Program
from maskcompile.schedules.changes import Changes
from maskcompile.schedules.layers import layer_types
from maskcompile.schedules.masks import check_warmup, schedule_mask
from passes.rectify import Compute


def smoothcache(
    program: Program,
    changes: Changes,
    threshold: float,
    *,
    longest: int = 3,
    warmup: int = 1,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """All layers of a type reuse their outputs over as many steps as keep their mean calibrated error within ``threshold``.

    SmoothCache (Liu et al. 2024, arXiv 2411.10510): from a computed step i, the layers j of one type reuse it for the largest
    k <= ``longest`` steps (the maximum caching interval) for which mean_j(|y_j(i + k) - y_j(i)| / |y_j(i + k)|) <= alpha, in
    the L1 norm; step i + k + 1 computes again. As in the authors' package, the last step computes everything. Layer types are
    self-attention (spatial and temporal apart), cross-attention, feed-forward and convolution; with
    ``mc.trace(..., blocks=...)`` others can be left out. changes: of a few runs, see ``measure_changes``.
    """
    check_warmup(warmup)
    if longest < 1:
        raise MaskError(f"longest must be at least 1 step; got {longest}.")
    measured = changes.of(program, longest)
    types = np.array(layer_types(program))
    steps = len(changes.timesteps)
    compute: Compute = np.zeros((steps, len(types)), dtype=np.bool_)
    for kind in dict.fromkeys(types.tolist()):
        of_kind = types == kind
        error = measured[:, :, of_kind].mean(axis=2)  # [distance, newer step]
        compute[np.ix_(_computed(error, threshold, warmup - 1), of_kind)] = True
    compute[:warmup] = True
    compute[-1] = True
    provenance = {"schedule": "smoothcache", "threshold": threshold, "longest": longest, "warmup": warmup}
    return schedule_mask(program, changes.timesteps, compute, reuse, log_snr, **provenance)


def _computed(error: Any, threshold: float, start: int) -> list[int]:
    """The steps that compute. error: float [longest, steps], ``error[k - 1, i]`` between the steps i - k and i."""
    longest, steps = error.shape
    computed, step = [], start
    while step < steps:
        computed.append(step)
        reach = (k for k in range(longest, 0, -1) if step + k < steps and error[k - 1, step + k] <= threshold)
        step += 1 + next(reach, 0)
    return computed


def smoothcache_file(
    program: Program,
    timesteps: Iterable[float],
    schedule: str | os.PathLike[str] | Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    warmup: int = 1,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """A schedule of the SmoothCache package (PyPI dit-smoothcache), from its JSON file or the parsed content of one.

    The file maps a layer to a list of 0 and 1, one for each step, 1 = compute: ``"attn"`` stands for all modules of that name,
    ``"attn-3"``, which counts before it, for the one in the fourth transformer block. Blocks that it does not name compute.
    names: what a name of the file is called in this denoiser, such as {"attn": "attn1", "mlp": "ff"} for a file made for the
    reference layout of DiT and a denoiser of diffusers.
    """
    check_warmup(warmup)
    steps = steps_of(timesteps)
    document = _document(schedule)
    called = {_renamed(key, names or {}): key for key in document}
    compute: Compute = np.ones((len(steps), len(program.names)), dtype=np.bool_)
    used = set()
    for position, name in enumerate(program.names):
        *_, index, layer = "", "", *name.split(".")
        key = called.get(f"{layer}-{index}", called.get(layer))
        if key is not None:
            compute[:, position] = _column(document[key], key, len(steps))
            used.add(key)
    if unused := [key for key in document if key not in used]:
        raise MaskError(
            f"the schedule's {unused[0]!r} is no block of {program.denoiser}; say with names= what it is called there, "
            "or trace the denoiser with blocks= that take it."
        )
    compute[:warmup] = True
    return schedule_mask(program, steps, compute, reuse, log_snr, schedule="smoothcache_file", warmup=warmup)


def _document(schedule: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    document: Any = schedule
    if isinstance(schedule, (str, os.PathLike)):
        try:
            document = json.loads(Path(schedule).read_text(encoding="utf-8"))
        except ValueError as error:
            raise MaskError(f"{schedule} is not a whole JSON file ({error}).") from None
    if not isinstance(document, Mapping) or not document:
        raise MaskError("a SmoothCache schedule maps layers to lists of 0 and 1.")
    return document


def _renamed(key: str, names: Mapping[str, str]) -> str:
    layer, dash, index = key.rpartition("-")
    return f"{names.get(layer, layer)}-{index}" if dash and index.isdigit() else names.get(key, key)


def _column(values: Any, key: str, steps: int) -> Any:
    if not isinstance(values, list) or set(values) - {0, 1} or len(values) != steps:
        found = len(values) if isinstance(values, list) else values
        raise MaskError(
            f"the schedule's {key!r} must be a list of {steps} numbers, 0 or 1, one for each timestep; got {found}."
        )
    return np.array(values, dtype=np.bool_)
