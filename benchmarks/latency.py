"""Speed beside ``torch.compile``, as ratios within one run: ``python -m benchmarks.latency``.

For each reference denoiser: eager, ``torch.compile`` of the original, the all-ones mask, and published masks under both reuse
rules, put together from compiled regions, and two of them compiled as whole graphs, all compiled alike; one whole sampling
run's denoiser calls each, interleaved. For the DiT also diffusers' TaylorSeer hook, which cannot be compiled whole and runs as
it is. The realised share is (speed-up over the compiled original) / (MACs before / MACs after): 1 means that every MAC the mask
removes is time saved, less that something was added. What the linear rule costs is measured step against step: one that
extrapolates beside the same one that holds, as a share of a step of the compiled original. ``--denoisers`` measures some
anew, and keeps the rows of the others where the setting is the same.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import maskcompile as mc
from benchmarks.masks import SCHEDULES, Choice, choices
from benchmarks.reference import load
from benchmarks.rivals import BLOCKS, taylorseer_hook
from benchmarks.sampling import Task, task
from benchmarks.timing import difference, hardware, interleaved, ratio
from maskcompile.files import write_whole

RESULTS = Path(__file__).parent / "results"


def take_mask(fast: mc.OptimizedDenoiser, mask: mc.Mask, t: Task, batch: int) -> None:
    """Give the denoiser another mask, and see to it that every graph of it is compiled."""
    args, kwargs = t.inputs(batch)
    fast.set_mask(mask)
    fast.warmup(*args, **kwargs, return_dict=False)


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
    chosen = choices(name, rules=("hold", "linear"))
    masks = {"all ones": mc.Mask.full(program.names, t.timesteps)}
    masks |= {f"{choice.label}, {choice.reuse}": choice.mask(program, t) for choice in chosen}
    whole = {f"{label}, whole graphs": masks[label] for label in ("all ones", "uniform(interval=2), linear")}
    fast = mc.optimize(t.denoiser, masks["all ones"], backend=backend)
    fast_whole = mc.optimize(t.denoiser, masks["all ones"], backend=backend, regions=False)
    variants = {"eager": t.denoiser, "torch.compile": torch.compile(t.denoiser, fullgraph=True, dynamic=False, backend=backend)}
    variants |= dict.fromkeys(masks, fast) | dict.fromkeys(whole, fast_whole)
    runs = {label: run_of(t, denoiser, batch) for label, denoiser in variants.items()}
    masks |= whole
    prepare: dict[str, Callable[[], Any]] = {
        label: partial(take_mask, fast_whole if label in whole else fast, mask, t, batch) for label, mask in masks.items()
    }
    with ExitStack() as hooks:
        for interval, order in product((2, 3, 4), (1, 2)) if name == "dit" else ():
            hooked = load(name)[0]
            label = f"TaylorSeer hook, order {order}, uniform(interval={interval})"
            prepare[label] = hooks.enter_context(taylorseer_hook(hooked, BLOCKS[name], interval, order))
            runs[label] = run_of(t, hooked, batch)
        times = interleaved(runs, repeats, prepare=prepare)
    rows = []
    for label, timing in times.items():
        share = mc.cost(program, masks[label]).share if label in masks else None
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


def rule_cost(name: str, batch: int, repeats: int, backend: str) -> list[dict[str, Any]]:
    """Milliseconds of the compiled original, of a step that holds, and of the same step that extrapolates."""
    t = task(name, 20)
    args, kwargs = t.inputs(batch)
    kwargs["return_dict"] = False
    program = mc.trace(t.denoiser, *args, **kwargs)
    timesteps = [torch.full_like(args[1], step) for step in t.timesteps]
    original = torch.compile(t.denoiser, fullgraph=True, dynamic=False, backend=backend)
    rows = []
    for schedule in dict.fromkeys(schedule for schedule, _ in SCHEDULES[name]):
        steps: dict[str, Callable[[], Any]] = {"original": partial(original, args[0], timesteps[0], **kwargs)}
        for rule in ("hold", "linear"):
            fast = mc.optimize(t.denoiser, Choice(schedule, 2, reuse=rule).mask(program, t), backend=backend)
            with torch.no_grad():
                for timestep in timesteps[:3]:  # computes, holds for lack of another computation, computes
                    fast(args[0], timestep, **kwargs)
            steps[rule] = partial(_again, fast, fast._threads.own.runs, args[0], timesteps[3], kwargs)
        with torch.no_grad():
            times = interleaved(steps, repeats, warmup=3)
        cost, low, high = difference(times["linear"], times["hold"], times["original"])
        medians = {f"{step}_ms": 1000 * timing.median for step, timing in times.items()}
        label = Choice(schedule, 2).label
        rows.append({"denoiser": name, "mask": label, **medians, "cost": cost, "low": low, "high": high})
    return rows


def _again(fast: mc.OptimizedDenoiser, runs: Any, sample: Tensor, timestep: Tensor, kwargs: dict[str, Any]) -> None:
    """The same step of the same run once more."""
    fast._threads.own.runs = runs
    fast(sample, timestep, **kwargs)


def rule_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| denoiser | mask | ms a step: original / hold / linear | linear adds, of an original step (quartiles) |",
        "|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['denoiser']} | {r['mask']} | {r['original_ms']:.1f} / {r['hold_ms']:.2f} / {r['linear_ms']:.2f} "
            f"| {r['cost']:+.1%} ({r['low']:+.1%} to {r['high']:+.1%}) |"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| denoiser | variant | MACs kept | ms a step | spread | over eager | over torch.compile | realised share |",
        "|" + "---|" * 8,
    ]
    for r in rows:
        share = "" if r["share"] is None else f"{r['share']:.1%}"
        realised = "" if r["realised_share"] is None else f"{r['realised_share']:.3f}"
        lines.append(
            f"| {r['denoiser']} | {r['variant']} | {share} | {r['ms_a_step']:.1f} | {r['spread']:.0%} "
            f"| {r['over_eager']:.2f}x | {r['over_compiled']:.3f}x | {realised} |"
        )
    return "\n".join(lines)


def _order(row: dict[str, Any]) -> int:
    return list(SCHEDULES).index(row["denoiser"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
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
    rule = [row for name in options.denoisers for row in rule_cost(name, options.batch, 20 * options.repeats, options.backend)]
    setting = (
        f"{options.steps} steps, batch {options.batch} pictures, float32, backend {options.backend}, static shapes; "
        f"{hardware(device='cpu')}; "
        f"median of {options.repeats} interleaved rounds after one warm-up round, spread = (max - min) / median."
    )
    if (options.out / "latency.json").exists():
        known = json.loads((options.out / "latency.json").read_text())
        if known["setting"] == setting:
            kept = [[row for row in known[kind] if row["denoiser"] not in options.denoisers] for kind in ("rows", "rule")]
            rows, rule = (sorted([*old, *new], key=_order) for old, new in zip(kept, (rows, rule), strict=True))
    tables = f"{table(rows)}\n\nWhat extrapolating costs:\n\n{rule_table(rule)}"
    text = f"# Latency\n\n{tables}\n\n{setting}\nMade by `python -m benchmarks.latency`. No GPU table has been made yet.\n"
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "latency.md", text)
    write_whole(options.out / "latency.json", json.dumps({"setting": setting, "rows": rows, "rule": rule}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
