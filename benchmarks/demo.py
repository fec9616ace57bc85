"""The whole way on the two bundled denoisers: ``make demo``.

Capture, blocks and dependency graph, a published static mask, rectification, specialised graphs, ``torch.compile``, sampling
with diffusers' DDIM scheduler; the original beside the masked denoiser. Prints one table and writes it with the pictures.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._inductor.config
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import maskcompile as mc
from benchmarks.masks import Choice
from benchmarks.reference.dataset import CLASSES
from benchmarks.sampling import Task, noise, psnr, sample, task
from benchmarks.timing import hardware, interleaved, ratio, ratio_spread
from maskcompile import draw
from maskcompile.files import write_whole

#: denoiser -> its published schedule; both reuse by linear extrapolation
SCHEDULES = {"unet": Choice("deepcache", 3, reuse="linear"), "dit": Choice("uniform", 2, reuse="linear")}


@dataclass(frozen=True)
class Row:
    """One denoiser in the table.

    ms: median of a step, over whole runs. spread: of the speed-up over torch.compile between runs, (max - min) / median.
    """

    denoiser: str
    schedule: str
    blocks: int
    share: float
    graphs: int
    cache_mib: float
    compile_original_s: float
    compile_masked_s: float
    ms_eager: float
    ms_compiled: float
    ms_masked: float
    over_eager: float
    over_compiled: float
    spread: float
    psnr_db: float


def demonstrate(name: str, steps: int, batch: int, repeats: int, backend: str, out: Path) -> Row:
    stages = tqdm(total=4, desc=f"{name}: capture", leave=False, disable=None)
    t = task(name, steps)
    args, kwargs = t.inputs(batch)
    kwargs["return_dict"] = False
    start = noise(batch, seed=0)

    began = time.perf_counter()
    program = mc.trace(t.denoiser, *args, **kwargs)
    compile_masked = time.perf_counter() - began  # ``optimize`` goes on with this capture
    print(f"\n{program}\n")
    choice = SCHEDULES[name]
    label = f"{choice.label}, {choice.reuse}"
    mask = mc.rectify(choice.mask(program, t), program)
    mask.save(out / f"{name}_mask.json")
    draw.mask_heat_map(mask, out / f"{name}_mask.png", f"{label} on {program.denoiser}")
    draw.block_graph(program, out / f"{name}_blocks.png")

    _next_stage(stages, f"{name}: compiling the masked denoiser")
    fast = mc.optimize(t.denoiser, mask, backend=backend)
    began = time.perf_counter()
    fast.warmup(*args, **kwargs)
    compile_masked += time.perf_counter() - began
    _next_stage(stages, f"{name}: compiling the original")
    compiled = torch.compile(t.denoiser, fullgraph=True, dynamic=False, backend=backend)
    began = time.perf_counter()
    with torch.no_grad():
        compiled(*args, **kwargs)
    compile_original = time.perf_counter() - began

    _next_stage(stages, f"{name}: sampling")
    variants = {"eager": t.denoiser, "compiled": compiled, "masked": fast}
    pictures: dict[str, Tensor] = {}

    def run(variant: str) -> None:
        pictures[variant] = sample(t, variants[variant], start)

    times = interleaved({v: (lambda v=v: run(v)) for v in variants}, repeats)
    stages.close()
    print(fast.report())
    draw_samples(t, pictures["eager"], pictures["masked"], out / f"{name}_samples.png", label)
    cost = mc.cost(program, mask)
    return Row(
        denoiser=f"{name} ({program.denoiser})",
        schedule=label,
        blocks=len(program.blocks),
        share=cost.share,
        graphs=cost.graphs,
        cache_mib=cost.peak_cache_bytes / 2**20,
        compile_original_s=compile_original,
        compile_masked_s=compile_masked,
        ms_eager=1000 * times["eager"].median / steps,
        ms_compiled=1000 * times["compiled"].median / steps,
        ms_masked=1000 * times["masked"].median / steps,
        over_eager=ratio(times["eager"], times["masked"]),
        over_compiled=ratio(times["compiled"], times["masked"]),
        spread=ratio_spread(times["compiled"], times["masked"]),
        psnr_db=psnr(pictures["masked"], pictures["eager"]).mean().item(),
    )


def _next_stage(stages: tqdm, name: str) -> None:
    stages.update()
    stages.set_description(name)


def draw_samples(t: Task, original: Tensor, masked: Tensor, path: Path, label: str) -> None:
    """The two grids side by side, the same noise at the same place."""
    columns = min(8, len(original)) if t.classes is None else len(original) // t.classes
    rows = len(original) // columns
    figure = Figure(figsize=(2 * 0.75 * columns + 1.5, 0.75 * rows + 0.6), layout="constrained")
    for axes, pictures, title in zip(figure.subplots(1, 2), (original, masked), ("original", label), strict=True):
        grid = (
            pictures[: rows * columns]
            .reshape(rows, columns, 3, 32, 32)
            .permute(0, 3, 1, 4, 2)
            .reshape(rows * 32, columns * 32, 3)
        )
        axes.imshow(grid.numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        names = [] if t.classes is None else [kind for kind, _ in CLASSES]
        axes.set_yticks([32 * i + 16 for i in range(len(names))], names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=120)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = "| denoiser | mask | blocks | MACs kept | graphs | cache MiB | compile s: original / masked "
    head += "| ms a step: eager / compiled / masked | faster than eager | faster than torch.compile | PSNR dB |"
    lines = [head, "|" + "---|" * 11]
    for r in rows:
        lines.append(
            f"| {r.denoiser} | {r.schedule} | {r.blocks} | {r.share:.1%} | {r.graphs} | {r.cache_mib:.2f} "
            f"| {r.compile_original_s:.0f} / {r.compile_masked_s:.0f} "
            f"| {r.ms_eager:.1f} / {r.ms_compiled:.1f} / {r.ms_masked:.1f} "
            f"| {r.over_eager:.2f}x | **{r.over_compiled:.2f}x** (spread {r.spread:.0%}) | {r.psnr_db:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", default="inductor", help="of torch.compile, for the original and the masked denoiser")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="torch")
    # So that compile seconds are those of compiling, not of a cache or of what the first compilation sets up.
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(lambda x: x.sin() + 1, backend=options.backend)(torch.ones(8))
        rows = [
            demonstrate(name, options.steps, options.batch, options.repeats, options.backend, options.out) for name in SCHEDULES
        ]
    caption = (
        f"{options.steps} DDIM steps, batch {options.batch}, float32, {options.backend}; {hardware()}; "
        f"medians of {options.repeats} interleaved runs; spread: of the speed-up over torch.compile, (max - min) / median."
    )
    text = f"{table(rows)}\n\n{caption}\n"
    write_whole(options.out / "table.md", text)
    document = {"setting": caption, "rows": [asdict(row) for row in rows]}
    write_whole(options.out / "table.json", json.dumps(document, indent=1) + "\n")
    print(f"\n{text}\nPictures, masks and this table are in {options.out}/")


if __name__ == "__main__":
    main()
