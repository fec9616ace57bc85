"""Pictures of masks and of block graphs, as PNG (or whatever the path's suffix says); needs matplotlib."""

from __future__ import annotations

import math
import os

import networkx as nx
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch

from maskcompile.mask import Mask
from maskcompile.program import Program
from passes.blocks import Block

_KINDS = {"attention": "#c4562f", "convolution": "#2f6fb2", "feed_forward": "#3f8f5b"}


def mask_heat_map(mask: Mask, path: str | os.PathLike[str], title: str = "") -> None:
    """Steps from left to right, blocks from top to bottom in call order; computed cells dark, extrapolated ones warm.

    Above them the reach of each step, where the mask has one.
    """
    colours = {"hold": "#e9edf1", "linear": "#f0c9a4", "compute": "#1f4e79"}
    kinds = list(colours)
    cells = np.where(mask.compute, kinds.index("compute"), [kinds.index(rule) for rule in mask.reuse])
    height = 1.2 + 0.17 * len(mask.blocks)
    figure = Figure(figsize=(2.8 + 0.16 * mask.steps, height + 0.5 * (mask.reach is not None)), layout="constrained")
    if mask.reach is None:
        axes = top = figure.subplots()
    else:
        top, axes = figure.subplots(2, 1, sharex=True, height_ratios=(0.5, height))
        top.bar(range(mask.steps), mask.reach, color=colours["linear"], width=0.9)
        top.axhline(1, color="#7a7f85", linewidth=0.5)
        top.set_ylabel("reach", fontsize=7, rotation=0, ha="right", va="center")
        top.tick_params(bottom=False, labelsize=6)
        top.spines[["top", "right"]].set_visible(False)
    cmap = ListedColormap(list(colours.values()))
    axes.imshow(cells.T, aspect="auto", interpolation="nearest", cmap=cmap, vmin=0, vmax=len(colours) - 1)
    axes.set_yticks(range(len(mask.blocks)), mask.blocks, fontsize=7)
    ticks = range(0, mask.steps, max(3, mask.steps // 10))
    axes.set_xticks(ticks, [f"{i}\n{mask.timesteps[i]:g}" for i in ticks], fontsize=7)
    axes.set_xlabel("step (0 is the noisiest), timestep below", fontsize=8)
    axes.add_collection(
        LineCollection(
            [[(x - 0.5, -0.5), (x - 0.5, len(mask.blocks) - 0.5)] for x in range(mask.steps)]
            + [[(-0.5, y - 0.5), (mask.steps - 0.5, y - 0.5)] for y in range(len(mask.blocks))],
            colors="white",
            linewidths=0.5,
        )
    )
    top.set_title(title or f"{mask.compute.mean():.0%} of the cells computed", fontsize=9)
    axes.legend(
        handles=[Patch(color=colour, label=what) for what, colour in colours.items() if what in ("compute", *mask.reuse)],
        fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def block_graph(program: Program, path: str | os.PathLike[str], title: str = "") -> None:
    """Blocks in call order from left to right, lower where their output has fewer positions; area by MACs.

    Straight edges lead to the next consumer, arcs are connections that skip blocks.
    """
    graph = program.dependencies
    names = [block.name for block in program.blocks]
    order = ["input:" + program.capture.sample.name, *names, "output"]
    x = {name: float(i) for i, name in enumerate(order)}
    heights = sorted({_positions(block) for block in program.blocks})
    y = {block.name: 1.3 * heights.index(_positions(block)) for block in program.blocks}
    y[order[0]] = y[order[-1]] = 1.3 * (len(heights) - 1)
    figure = Figure(figsize=(max(7.0, 0.42 * len(order)), 2.6 + 0.5 * len(heights)), layout="constrained")
    axes = figure.subplots()
    near = set(nx.transitive_reduction(graph).edges) if nx.is_directed_acyclic_graph(graph) else set(graph.edges)
    arc_alpha = max(0.12, min(0.5, 12 / (1 + len(graph.edges) - len(near))))
    for source, target in graph.edges:
        if source in x and target in x:
            skip = (source, target) not in near
            bend = -0.9 / math.sqrt(1 + x[target] - x[source]) if skip else 0.0
            axes.add_patch(
                FancyArrowPatch(
                    (x[source], y[source]),
                    (x[target], y[target]),
                    connectionstyle=f"arc3,rad={bend}",
                    arrowstyle="-|>",
                    mutation_scale=7,
                    color="#9aa4ae" if skip else "#4a5258",
                    alpha=arc_alpha if skip else 0.9,
                    linewidth=0.8,
                    shrinkA=6,
                    shrinkB=6,
                )
            )
    largest = max((block.macs for block in program.blocks), default=1) or 1
    for block in program.blocks:
        area = 40 + 260 * block.macs / largest
        axes.scatter(x[block.name], y[block.name], s=area, color=_KINDS[block.kind], zorder=3, edgecolors="white")
        foot = min(y.values()) - 0.45
        axes.plot([x[block.name]] * 2, [y[block.name], foot], color="#c3cad1", linewidth=0.5, linestyle=":", zorder=0)
        axes.text(x[block.name], foot, block.name, rotation=-55, fontsize=6, ha="left", va="top", rotation_mode="anchor")
    for name, side, shift in ((order[0], "right", 0.25), (order[-1], "left", -0.25)):
        axes.text(x[name] + shift, y[name], name.removeprefix("input:"), ha=side, va="center", fontsize=7, weight="bold")
    present = {block.kind for block in program.blocks}
    axes.legend(
        handles=[Patch(color=color, label=kind.replace("_", "-")) for kind, color in _KINDS.items() if kind in present],
        fontsize=7, frameon=False, loc="upper right", ncols=3,
    )  # fmt: skip
    axes.set_title(title or f"{program.denoiser}: {len(names)} blocks, {program.macs / 1e9:.2f} GMACs a step", fontsize=9)
    axes.set_ylim(min(y.values()) - 2.4, max(y.values()) + 2.2)
    axes.set_xlim(-2.5, len(order) + 1.5)
    axes.axis("off")
    figure.savefig(path, dpi=150)


def _positions(block: Block) -> int:
    """Spatial positions of a block's first output: H x W of an image tensor, tokens of a sequence."""
    shape = block.outputs[0].shape
    return math.prod(shape[2:]) if len(shape) > 3 else shape[1] if len(shape) == 3 else 1
