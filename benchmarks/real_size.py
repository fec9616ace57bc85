"""Speed of the paper's denoisers at real size, with random weights: ``python -m benchmarks.real_size``.

A mask's speed does not depend on the weights. For each row of ``benchmarks.models`` that ``MASKS`` names: eager,
``torch.compile`` of the original, and the mask, compiled alike; the denoiser's calls of one sampling run each, on a CPU in turn
step by step, one picture a call (both halves of a guided one). A schedule that repeats itself is timed over a short run of the
row's sampler, L2C's published masks of DiT-XL/2 over the run that they were learned for. The realised share is (speed-up over
the compiled original) / (MACs before / MACs after). Writes ``real_size.json`` and ``real_size.md``, a table for each machine,
and goes on with the rows that this machine has not measured yet.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import maskcompile as mc
from benchmarks import rows
from benchmarks.models import Inputs, row_named
from benchmarks.timing import hardware, in_parts, interleaved, ratio, ratio_spread, use
from maskcompile.files import write_whole
from maskcompile.mask import steps_of

RESULTS = Path(__file__).parent / "results"
#: how ``measure`` takes times: a GPU would be idle at the end of every turn
TIMED = {
    "cpu": "in which the three take turns at every step; spread: of the speed-up over torch.compile, (max - min) / median",
    "cuda": "after one to warm up, in which each runs as a whole in turn; "
    "spread: of the speed-up over torch.compile, (max - min) / median",
}
ROUTERS = Path(__file__).parent.parent / "tests" / "maskcompile" / "data"


@dataclass(frozen=True)
class Trial:
    """A row of ``benchmarks.models`` under a schedule with these arguments, over a run of so many steps."""

    row: str
    schedule: str
    arguments: tuple[tuple[str, Any], ...]
    steps: int

    @property
    def label(self) -> str:
        said = (f"{name}={Path(value).name if name == 'router' else value}" for name, value in self.arguments)
        return f"{self.schedule}({', '.join(said)})"

    def mask(self, program: mc.Program, timesteps: tuple[float, ...]) -> mc.Mask:
        mask: mc.Mask = getattr(mc.schedules, self.schedule)(program, timesteps, **dict(self.arguments))
        return mask


def _l2c(steps: int, threshold: float) -> Trial:
    router = str(ROUTERS / f"l2c_dit_xl_2_ddim{steps}.json")
    return Trial("dit-256", "l2c", (("router", router), ("threshold", threshold)), steps)


MASKS = (
    _l2c(20, 0.1),
    Trial("dit-256", "uniform", (("interval", 2),), 6),
    Trial("ddpm-cifar10", "deepcache", (("interval", 3),), 9),
    Trial("ldm-4-g", "deepcache", (("interval", 3),), 6),
    Trial("pixart", "uniform", (("interval", 2),), 4),
    Trial("sd15", "deepcache", (("interval", 3),), 3),
    Trial("ddpm-bedroom", "deepcache", (("interval", 3),), 6),
    Trial("dit-512", "uniform", (("interval", 2),), 4),
    _l2c(50, 0.1),
)


def at(inputs: Inputs, timestep: Tensor) -> Inputs:
    """The same call at another timestep, an element of a scheduler's tensor: the argument of that name, or the second one."""
    args, kwargs = inputs
    if "timestep" in kwargs:
        return args, {**kwargs, "timestep": timestep.expand(kwargs["timestep"].shape)}
    return (args[0], timestep.expand(args[1].shape), *args[2:]), kwargs


def moved(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    """The same on a device, floating-point tensors of a dtype."""
    found: Inputs = pytree.tree_map_only(Tensor, lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype), inputs)
    return found


def apart(*given: Any) -> dict[str, Any]:
    """``measure`` in a process of its own, with empty compiler caches."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_caches_in, folder, *given).result()


def _with_caches_in(folder: str, *given: Any) -> dict[str, Any]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    warnings.filterwarnings("ignore", module="torch")
    return measure(*given)


def measure(trial: Trial, repeats: int, device: str, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Seconds a step of the variants of one trial, and how they compare."""
    use(device)
    row = row_named(trial.row)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = row.build().to(device, dtype)
        inputs = moved(row.inputs(model, 1), device, dtype)
    scheduler = row.scheduler()
    scheduler.set_timesteps(trial.steps, device="cpu")
    timesteps = steps_of(float(t) for t in scheduler.timesteps)
    given = inputs[1]["timestep"] if "timestep" in inputs[1] else inputs[0][1]
    calls = [at(inputs, t) for t in torch.tensor(timesteps, device=device).to(given.dtype)]
    args, kwargs = calls[0]

    original = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    program = mc.trace(model, *args, **kwargs)
    mask = trial.mask(program, timesteps)
    fast = mc.optimize(model, mask, backend=backend, cuda_graphs=False)
    fast.warmup(*args, **kwargs)

    parts = 1 if device.startswith("cuda") else len(calls)

    def run_of(denoiser: Callable[..., Any]) -> Callable[[], None]:
        return in_parts([partial(denoiser, *args, **kwargs) for args, kwargs in calls], parts)

    variants = {"eager": model, "compiled": original, "ours": fast}
    runs = {name: run_of(denoiser) for name, denoiser in variants.items()}
    with torch.no_grad():
        for denoiser in variants.values():
            denoiser(*args, **kwargs)
        times = interleaved(runs, repeats, warmup=int(device.startswith("cuda")), prepare={"ours": fast.reset}, parts=parts)
    cost = mc.cost(program, mask)
    speedup = ratio(times["compiled"], times["ours"])
    return {
        "title": row.title, "mask": trial.label, "steps": len(calls), "gmacs": program.macs / 1e9, "share": cost.share,
        "graphs": cost.graphs, "seconds": {name: timing.median / len(calls) for name, timing in times.items()},
        "spread": ratio_spread(times["compiled"], times["ours"]),
        "over_eager": ratio(times["eager"], times["ours"]), "over_compiled": speedup, "realised_share": speedup * cost.share,
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| row | mask | steps timed | GMACs a call | MACs kept | s a step: eager / torch.compile / ours | over eager "
        "| over torch.compile | spread | of the MACs | realised share | graphs |",
        "|" + "---|" * 12,
    ]
    for r in found:
        seconds, ideal = r["seconds"], 1 / r["share"]
        lines.append(
            f"| {r['row']}: {r['title']} | {r['mask']} | {r['steps']} | {r['gmacs']:.1f} | {r['share']:.1%} "
            f"| {seconds['eager']:.3g} / {seconds['compiled']:.3g} / {seconds['ours']:.3g} | {r['over_eager']:.2f}x "
            f"| {r['over_compiled']:.3f}x | {r['spread']:.0%} | {ideal:.3f}x | {r['realised_share']:.3f} | {r['graphs']} |"
        )
    return "\n".join(lines)


def document(found: dict[str, Any]) -> str:
    """Markdown of ``real_size.json``: a table for each machine and way of timing."""
    parts = ["# Speed at real size"]
    for machine, timed in dict.fromkeys((row["hardware"], row["timed"]) for row in found["rows"]):
        results = [row for row in found["rows"] if (row["hardware"], row["timed"]) == (machine, timed)]
        order = {_key(trial): place for place, trial in enumerate(MASKS)}
        results.sort(key=lambda row: order.get(row["key"].partition(" on ")[0], len(order)))
        parts += [
            table(results),
            f"Random weights, one picture a call (both halves of a guided one), {found['dtype']}, backend {found['backend']}; "
            f"{machine}; medians of {found['repeats']} rounds, {timed}. "
            "Of the MACs: MACs before / after. "
            + ("" if timed == TIMED["cuda"] else "Graphs that reuse run in the first round for the first time. ")
            + "Each row in a process of its own.",
        ]
    return "\n\n".join(parts) + "\nMade by `python -m benchmarks.real_size`.\n"


def _key(trial: Trial) -> str:
    return f"{trial.row} {trial.label} {trial.steps} steps"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(dict.fromkeys(t.row for t in MASKS)), help="default: all")
    parser.add_argument("--trials", nargs="+", type=int, choices=range(len(MASKS)), help="their numbers, instead of rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    path = options.out / "real_size.json"
    given = {name: getattr(options, name) for name in ("repeats", "dtype", "backend")}
    done = rows.opened(path, given, options.fresh)
    timed = TIMED[torch.device(options.device).type]
    for number, trial in enumerate(MASKS):
        machine = hardware(device=options.device)
        key = f"{_key(trial)} on {machine}"
        if key in done or (options.rows and trial.row not in options.rows) or (options.trials and number not in options.trials):
            continue
        dtype = getattr(torch, options.dtype)
        figures = apart(trial, options.repeats, options.device, dtype, options.backend)
        rows.add(path, {"key": key, "row": trial.row, "hardware": machine, "timed": timed, **figures})
        print(key, figures, flush=True)
    text = document(json.loads(path.read_text()))
    write_whole(options.out / "real_size.md", text)
    print(text)


if __name__ == "__main__":
    main()
