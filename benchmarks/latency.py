"""Speed beside ``torch.compile``, as ratios within one run: ``python -m benchmarks.latency``.

For each reference denoiser: eager, ``torch.compile`` of the original, the all-ones mask, and published masks, all compiled
alike, one whole sampling run's denoiser calls each, interleaved. The realised share is (speed-up over the compiled original) /
(MACs before / MACs after): 1 means that every MAC the mask removes is time saved, less that something was added.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import maskcompile as mc
from benchmarks.sampling import Task, task
from benchmarks.timing import hardware, interleaved, ratio
from maskcompile.files import write_whole

RESULTS = Path(__file__).parent / "results"


def masks_of(name: str, program: mc.Program, timesteps: tuple[int, ...]) -> dict[str, mc.Mask]:
    """The masks to time, the all-ones mask first."""
    masks = {"all ones": mc.Mask.full(program.names, timesteps)}
    if name == "unet":
        masks |= {f"deepcache(interval={n})": mc.schedules.deepcache(program, timesteps, n) for n in (2, 3, 5)}
    else:
        masks |= {f"uniform(interval={n})": mc.schedules.uniform(program, timesteps, n) for n in (2, 3)}
    return masks


def run_of(t: Task, denoiser: Callable[..., Any], batch: int) -> Callable[[], None]:
    """The denoiser calls of one sampling run, without the scheduler's arithmetic."""
    args, kwargs = t.inputs(batch)
    kwargs["return_dict"] = False
    steps = [torch.full_like(args[1], step) for step in t.timesteps]

    @torch.no_grad()
    def run() -> None:
        for step in steps:
            denoiser(args[0], step, **kwargs)

    return run


def measure(name: str, steps: int, batch: int, repeats: int, backend: str) -> list[dict[str, Any]]:
    t = task(name, steps)
    args, kwargs = t.inputs(batch)
    program = mc.trace(t.denoiser, *args, **kwargs, return_dict=False)
    masks = masks_of(name, program, t.timesteps)
    variants = {"eager": t.denoiser, "torch.compile": torch.compile(t.denoiser, fullgraph=True, dynamic=False, backend=backend)}
    for label, mask in masks.items():
        variants[label] = mc.optimize(t.denoiser, mask, backend=backend)
    runs = {label: run_of(t, denoiser, batch) for label, denoiser in variants.items()}
    times = interleaved(runs, repeats)
    rows = []
    for label, timing in times.items():
        share = mc.cost(program, masks[label]).share if label in masks else 1.0
        speedup = ratio(times["torch.compile"], timing)
        rows.append(
            {
                "denoiser": name,
                "variant": label,
                "share": share,
                "ms_a_step": 1000 * timing.median / steps,
                "spread": timing.spread,
                "over_eager": ratio(times["eager"], timing),
                "over_compiled": speedup,
                "realised_share": speedup * share if label in masks else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| denoiser | variant | MACs kept | ms a step | spread | over eager | over torch.compile | realised share |",
        "|" + "---|" * 8,
    ]
    for r in rows:
        realised = "" if r["realised_share"] is None else f"{r['realised_share']:.3f}"
        lines.append(
            f"| {r['denoiser']} | {r['variant']} | {r['share']:.1%} | {r['ms_a_step']:.1f} | {r['spread']:.0%} "
            f"| {r['over_eager']:.2f}x | {r['over_compiled']:.3f}x | {realised} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--denoisers", nargs="+", default=["unet", "dit"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    rows = [
        row
        for name in options.denoisers
        for row in measure(name, options.steps, options.batch, options.repeats, options.backend)
    ]
    setting = (
        f"{options.steps} steps, batch {options.batch} pictures, float32, backend {options.backend}, static shapes; "
        f"{hardware()}; "
        f"median of {options.repeats} interleaved rounds after one warm-up round, spread = (max - min) / median."
    )
    text = f"# Latency\n\n{table(rows)}\n\n{setting}\nMade by `python -m benchmarks.latency`. No GPU table has been made yet.\n"
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "latency.md", text)
    write_whole(options.out / "latency.json", json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
