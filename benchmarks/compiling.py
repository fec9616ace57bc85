"""What compiling costs beside one ``torch.compile`` of the original: ``python -m benchmarks.compiling``.

A mask of 50 steps whose rows all differ, drawn at random: every graph of its run compiled, region by region, with Inductor's
caches empty; in another process with the file of ``fast.save_compiled``; for another such mask in the same process; and for a
second and a third batch size. Each in a process of its own, with a cache folder of its own, capture included. Writes
``compiling.json`` and ``compiling.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import maskcompile as mc
from benchmarks.reference import load
from benchmarks.sampling import Task, with_solver
from benchmarks.timing import hardware
from maskcompile.files import write_whole

RESULTS = Path(__file__).parent / "results"
STEPS = 50
KINDS = ("original", "cold", "saved")


def random_mask(program: mc.Program, t: Task, seed: int) -> mc.Mask:
    compute = np.random.default_rng(seed).random((STEPS, len(program.names))) < 0.5
    return mc.Mask(compute, blocks=program.names, timesteps=t.timesteps, reuse="linear", log_snr=mc.log_snr(t.scheduler))


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def write_masks(folder: Path, name: str, batch: int) -> None:
    """The two masks, as files: a process that makes one has captured the denoiser already."""
    t = with_solver(load(name), name, STEPS, "DDIM", clip=False)
    args, kwargs = t.inputs(batch)
    program = mc.trace(t.denoiser, *args, **kwargs)
    for seed in range(2):
        random_mask(program, t, seed).save(folder / f"{name}-{seed}.json")


def child(kind: str, name: str, batch: int, file: str) -> dict[str, Any]:
    """Seconds of one kind, measured in this process. file: to save to or take from; the masks lie beside it."""
    t = with_solver(load(name), name, STEPS, "DDIM", clip=False)
    args, kwargs = t.inputs(batch)
    kwargs["return_dict"] = False
    if kind == "original":
        compiled = torch.compile(t.denoiser, fullgraph=True, dynamic=False)
        with torch.no_grad():
            return {"original": timed(lambda: compiled(*args, **kwargs))}
    mask, other = (mc.Mask.load(Path(file).parent / f"{name}-{seed}.json") for seed in range(2))
    start = time.perf_counter()
    fast = mc.optimize(t.denoiser, mask, compiled=file if kind == "saved" else None)
    fast.warmup(*args, **kwargs)
    found = {kind: time.perf_counter() - start}
    signature = fast.report().signatures[0]
    found |= {"graphs": signature.graphs, "regions": signature.regions}
    if kind == "cold":
        fast.save_compiled(file)
        found["megabytes"] = Path(file).stat().st_size / 1e6
        fast.set_mask(other)
        found["new mask"] = timed(lambda: fast.warmup(*args, **kwargs))
        for what, size in (("new batch", batch // 2), ("another batch", batch // 4)):
            args, kwargs = t.inputs(size)
            found[what] = timed(partial(fast.warmup, *args, **kwargs, return_dict=False))
    return found


def measure(name: str, batch: int, repeats: int) -> dict[str, Any]:
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        write_masks(Path(folder), name, batch)
        for number in range(repeats):
            found: dict[str, Any] = {}
            for kind in KINDS:
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{number}-{kind}"}
                command = [sys.executable, "-m", "benchmarks.compiling", "--child", kind, "--denoisers", name]
                command += ["--batch", str(batch), "--file", f"{folder}/{number}.compiled"]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                found |= json.loads(done.stdout.splitlines()[-1])
                print(name, found, flush=True)
            rounds.append(found)
    return {"denoiser": name, **{key: [found[key] for found in rounds] for key in rounds[0]}}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| denoiser | graphs, regions | original, s | cold | saved, other process | new mask | second batch size | third "
        "| file, MB |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        original = median(row["original"])
        times = [
            f"{median(row[key]):.1f} s, {median(row[key]) / original:.2f}x"
            for key in ("cold", "saved", "new mask", "new batch", "another batch")
        ]
        lines.append(
            f"| {row['denoiser']} | {row['graphs'][0]}, {row['regions'][0]} | {original:.1f} | {' | '.join(times)} "
            f"| {median(row['megabytes']):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoisers", nargs="+", default=["unet", "dit"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    if options.child:
        print(json.dumps(child(options.child, options.denoisers[0], options.batch, options.file)))
        return
    rows = [measure(name, options.batch, options.repeats) for name in options.denoisers]
    setting = (
        f"A mask of {STEPS} steps, batch {options.batch} pictures, float32, static shapes; {hardware()}; median of "
        f"{options.repeats} round{'s' * (options.repeats > 1)}, the original in the same round; x: of the original."
    )
    text = f"# Compiling\n\n{table(rows)}\n\n{setting}\nMade by `python -m benchmarks.compiling`.\n"
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "compiling.md", text)
    write_whole(options.out / "compiling.json", json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
