"""DeepCache: the deep branch of a U-shaped denoiser at every n-th step."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
import numpy as np

from maskcompile.mask import Mask, MaskError, steps_of
from maskcompile.program import Program
from maskcompile.schedules.masks import full_steps, schedule_mask
from passes.dependencies import OUTPUT


def deepcache(
    program: Program,
    timesteps: Iterable[float],
    interval: int,
    depth: int = 1,
    *,
    warmup: int = 1,
    reuse: str = "hold",
    log_snr: Iterable[float] | None = None,
) -> Mask:
    """Everything at every ``interval``-th step; in between only the ``depth`` shallowest levels of a U-shaped denoiser.

    DeepCache (Ma et al. 2023, arXiv 2312.00858), section 3.2 with uniform 1:N inference: the deep branch is taken from the
    last full step, the shallow skip path always runs. A level is the blocks that lie on equally short ways from the input to
    the result in the dependency graph, so that ``depth=1`` keeps the outermost skip connection alone. Raises MaskError when the
    denoiser is not U-shaped (over a quarter of the blocks lie on the first level) or has no more than ``depth`` levels.
    """
    steps = steps_of(timesteps)
    levels = _levels(program)
    distinct = sorted(set(levels.values()))
    # A residual stream puts every block next to both the input and the result.
    if len(distinct) < 2 or 4 * sum(level == distinct[0] for level in levels.values()) > len(levels):
        raise MaskError(
            f"deepcache needs a U-shaped denoiser with long skip connections; many blocks of {program.denoiser} lie next "
            "to both its input and its result. Use schedules.uniform."
        )
    if not 1 <= depth < len(distinct):
        raise MaskError(f"depth must be 1 to {len(distinct) - 1} for {program.denoiser}; got {depth}.")
    shallow = np.array([levels[name] in distinct[:depth] for name in program.names], dtype=np.bool_)
    compute = full_steps(len(steps), interval, warmup)[:, None] | shallow[None, :]
    schedule = {"schedule": "deepcache", "interval": interval, "depth": depth, "warmup": warmup}
    return schedule_mask(program, steps, compute, reuse, log_snr, **schedule)


def _levels(program: Program) -> dict[str, int]:
    """Blocks on the shortest way input -> block -> result, for each block that lies on any such way."""
    graph = program.dependencies
    # Only the sample counts as the input: the timestep reaches every block directly.
    source = f"input:{program.capture.sample.name}"
    from_input = nx.single_source_shortest_path_length(graph, source)
    to_output = nx.single_source_shortest_path_length(graph.reverse(copy=False), OUTPUT)
    far = graph.number_of_nodes() * 2
    return {name: from_input.get(name, far) + to_output.get(name, far) - 1 for name in program.names}
