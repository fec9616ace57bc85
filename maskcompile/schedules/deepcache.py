"""DeepCache: the deep branch of a U-shaped denoiser at every n-th step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import networkx as nx
import numpy as np

from maskcompile.mask import Mask, MaskError, steps_of
from maskcompile.program import Program
from maskcompile.schedules.masks import full_steps, schedule_mask
from passes.dependencies import OUTPUT, residual_blocks


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
    last full step, the shallow skip path always runs. A level is the blocks between one skip connection and the next, on the
    way in and on the way out: those that lie on equally short ways from the input to the result in the dependency graph, where
    residual branches count with what they add to. ``depth=1`` keeps the outermost skip connection alone. Raises MaskError when
    the denoiser is not U-shaped (over a quarter of the blocks lie next to both the input and the result) or has no more than
    ``depth`` levels.
    """
    steps = steps_of(timesteps)
    levels = _levels(program)
    distinct = sorted(set(levels.values()))
    if len(distinct) < 2 or not _is_u_shaped(program):
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


def _is_u_shaped(program: Program) -> bool:
    """Few blocks lie next to both the input and the result; a residual stream puts every block there."""
    ways = _ways(program, dict.fromkeys(program.names, 1)).values()
    return 4 * sum(way == min(ways) for way in ways) <= len(ways)


def _levels(program: Program) -> dict[str, int]:
    """Blocks on the shortest way input -> block -> result, for each block that lies on any such way.

    Residual branches do not count, since any way can go around them: each is on the level of what it adds to.
    """
    branches = residual_blocks(program.capture, program.dependencies, _source(program))
    return _ways(program, {name: int(name not in branches) for name in program.names})


def _ways(program: Program, length: Mapping[str, int]) -> dict[str, int]:
    """The length of the shortest way input -> block -> result for each block. length: of each block."""

    def of_head(tail: str, head: str, edge: object) -> int:
        return length.get(head, 0)

    graph = program.dependencies
    shortest = nx.single_source_dijkstra_path_length
    from_input = shortest(graph, _source(program), weight=of_head)
    to_output = shortest(graph.reverse(copy=False), OUTPUT, weight=of_head)
    far = graph.number_of_nodes() * 2
    return {name: from_input.get(name, far) + to_output.get(name, far) - own for name, own in length.items()}


def _source(program: Program) -> str:
    """Only the sample counts as the input: the timestep reaches every block directly."""
    return f"input:{program.capture.sample.name}"
