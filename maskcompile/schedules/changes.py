"""How much blocks' outputs change over a run, measured: what calibrated schedules are made of."""

from __future__ import annotations

import inspect
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maskcompile.learning.recording import Sample, replaced_forward
from maskcompile.mask import MaskError
from maskcompile.program import Program
from maskcompile.signature import bind, check_runnable


@dataclass(frozen=True)
class Changes:
    """Relative changes of blocks' outputs.

    relative: float64 [distances, steps, blocks]. ``relative[d - 1, i, b]`` is |y_i - y_(i-d)| / |y_i| in the L1 norm, for the
    output y of block b at steps i and i - d; NaN where i < d. blocks, timesteps: as in a mask.
    """

    blocks: tuple[str, ...]
    timesteps: tuple[float, ...]
    relative: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = (len(self.timesteps), len(self.blocks))
        if self.relative.ndim != 3 or self.relative.shape[1:] != shape:
            raise MaskError(f"changes have the shape [distances, {shape[0]}, {shape[1]}]; got {list(self.relative.shape)}.")

    def of(self, program: Program, distance: int) -> NDArray[np.float64]:
        """float64 [distance, steps, blocks of the program]. Raises MaskError for a block or a distance not measured."""
        if missing := [name for name in program.names if name not in self.blocks]:
            raise MaskError(f"the changes of block {missing[0]!r} were not measured; measure those of this program.")
        if distance > len(self.relative):
            raise MaskError(f"changes were measured over {len(self.relative)} steps; measure them with distance={distance}.")
        return self.relative[:distance, :, [self.blocks.index(name) for name in program.names]]


def measure_changes(
    model: nn.Module,
    sample: Sample,
    program: Program,
    *,
    seeds: Sequence[int] = (0, 1),
    distance: int = 3,
    timestep: str | None = None,
) -> Changes:
    """Run ``sample(seed)`` for each seed and measure the changes of the program's blocks over 1 to ``distance`` steps.

    L1rel of block caching (Wimbauer et al. 2023, arXiv 2312.03209) and the layer representation error of SmoothCache (Liu et
    al. 2024, arXiv 2411.10510): the L1 norm of the difference over that of the newer output, over the whole
    batch, averaged over seeds and over the calls of a step. sample, timestep: as in ``learn``. Outputs of the last
    ``distance`` steps are held, of every block. Raises ValueError for a pass that never calls
    the denoiser or goes through its timesteps both ways, where seeds differ in their timesteps, and for a denoiser that is
    optimised already.
    """
    check_runnable(model)
    if distance < 1 or not seeds:
        raise ValueError("changes need a distance of at least 1 and at least one seed.")
    measured = [_of_run(model, sample, seed, program.names, distance, timestep) for seed in seeds]
    timesteps = measured[0][0]
    for seed, (others, _) in zip(seeds, measured, strict=True):
        if others != timesteps:
            raise ValueError(f"sample({seed}) went through other timesteps than sample({seeds[0]}).")
    return Changes(program.names, timesteps, np.mean([relative for _, relative in measured], axis=0))


def _of_run(
    model: nn.Module, sample: Sample, seed: int, blocks: Sequence[str], distance: int, timestep: str | None
) -> tuple[tuple[float, ...], NDArray[np.float64]]:
    """(timesteps, relative) of one run; the calls of a block within a step are compared each with its own of other steps."""
    forward, signature = model.forward, inspect.signature(model.forward)
    timesteps: list[float] = []
    called: Counter[str] = Counter()
    past: dict[tuple[str, int], deque[tuple[int, list[Tensor]]]] = {}
    found: dict[tuple[int, int, str], list[float]] = {}

    def watched(*args: Any, **kwargs: Any) -> Any:
        at = bind(model, args, kwargs, signature, timestep).timestep
        if at is None:
            raise ValueError(f"{type(model).__name__}.forward has no timestep among its arguments; pass timestep='its name'.")
        value = float(at.reshape(-1)[0])
        if not timesteps or value != timesteps[-1]:
            timesteps.append(value)
            called.clear()
        return forward(*args, **kwargs)

    def hook(name: str) -> Any:
        def measure(module: nn.Module, args: Any, output: Any) -> None:
            step, leaves = len(timesteps) - 1, pytree.tree_leaves(output)
            tensors = [t.detach().clone() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
            kept = past.setdefault((name, called[name]), deque(maxlen=distance))
            called[name] += 1
            for then, older in kept:
                if 0 < step - then <= distance:
                    found.setdefault((step - then, step, name), []).append(_relative(tensors, older))
            kept.append((step, tensors))

        return measure

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in blocks]
    try:
        with replaced_forward(model, watched):
            sample(seed)
    finally:
        for handle in handles:
            handle.remove()
    if not timesteps:
        raise ValueError(f"sample({seed}) never called the denoiser; it must call the very {type(model).__name__} given.")
    if len({b > a for a, b in pairwise(timesteps)}) > 1:
        raise ValueError(f"a sampling pass must go through its timesteps in one direction; sample({seed}) went both ways.")
    relative = np.full((distance, len(timesteps), len(blocks)), np.nan)
    for (over, step, name), values in found.items():
        relative[over - 1, step, blocks.index(name)] = np.mean(values)
    return tuple(timesteps), relative


def _relative(newer: Sequence[Tensor], older: Sequence[Tensor]) -> float:
    """|newer - older| / |newer| in the L1 norm, over all tensors; infinite where only the older is not zero."""
    if [t.shape for t in newer] != [t.shape for t in older]:
        return float("inf")
    change = sum(float((a.float() - b.float()).abs().sum()) for a, b in zip(newer, older, strict=True))
    size = sum(float(a.float().abs().sum()) for a in newer)
    return change / size if size else (float("inf") if change else 0.0)
