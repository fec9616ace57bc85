"""Learned masks beside everything else that keeps as many MACs: ``python -m benchmarks.learning``.

Goes on where it was stopped; ``--fresh`` starts over. For each denoiser, number of steps and budget: masks learned by the
search (the default, and before it fits the reach of its steps) and by the paper's method, under extrapolating and under plain
reuse, uniform schedules, DeepCache as a mask (UNet), random masks, and fewer steps. PSNR and SSIM of the final pictures to
those of the unmasked sampler from the same noise, which no learning has seen. ``--ablations`` adds the paper's two ablations
and the knowledge-guided rules, each alone and together. One mask is learned from other noise too.

Learned masks are kept beside the results, in ``learned/``, as is the processor time that they took, in sampling passes of the
original at the same batch. Writes ``learning.json`` after every result, then ``learning.md`` and the plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

import maskcompile as mc
from benchmarks import learning_report, rows
from benchmarks.quality import DENOISERS, fewer_steps, weights_hash
from benchmarks.reference import load
from benchmarks.sampling import Task, noise, psnr, sample, with_solver
from benchmarks.timing import hardware

RESULTS = Path(__file__).parent / "results"
STEPS = (20, 50, 100)
BUDGETS = (0.5, 0.4, 0.6, 0.8, 0.3, 0.7)
#: pictures of a learning pass (for each of two seeds), held-out ones in all, and those of them that uniform and DeepCache
#: masks are chosen by
LEARN, HELD_OUT, CHOOSE = 8, 48, 16
#: steps above which the search gets fewer passes, in proportion
LONG = 50
#: seeds of the held-out noise; learning draws from 0 on, and to see what that matters, from others on
SEED, OTHER = 2_000_000, 3_000_000

#: name -> learn's method
METHODS: dict[str, Any] = {
    "search, reach not fitted": mc.Search(reach=False),
    "search": mc.Search(),
    "search, other noise": mc.Search(),
    "paper": mc.Paper(),
    "paper, Gumbel": mc.Paper(relaxation="gumbel"),
    "paper, no scaling": mc.Paper(scaling=False),
    "paper, no rectification": mc.Paper(rectification=()),
    "paper, neither": mc.Paper(scaling=False, rectification=()),
}


@dataclass(frozen=True)
class Trial:
    """kind: a method of METHODS, "uniform", "deepcache", "random" or "fewer steps". rules: knowledge rules applied after."""

    denoiser: str
    steps: int
    budget: float
    kind: str
    reuse: str = "linear"
    rules: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))

    @property
    def file(self) -> str:
        return (
            re.sub(r"[^a-z0-9.]+", "-", f"{self.denoiser} {self.steps} {self.budget} {self.kind} {self.reuse}".lower())
            + ".json"
        )


def trials(denoisers: list[str], steps: list[int], budgets: list[float], ablations: bool) -> Iterator[Trial]:
    """All of them, what matters most first."""
    for total, budget, name in product(steps, budgets, denoisers):
        yield Trial(name, total, budget, "search, reach not fitted")
        yield Trial(name, total, budget, "search")
        for other in ("uniform", "deepcache", "random") if name == "unet" else ("uniform", "random"):
            yield Trial(name, total, budget, other)
            yield Trial(name, total, budget, other, "hold")
        yield Trial(name, total, budget, "fewer steps", "")
    for total, budget, name in product(steps, budgets, denoisers):
        yield Trial(name, total, budget, "paper", "hold")
    for total, name in product(steps, denoisers) if ablations else ():
        for kind in (kind for kind in METHODS if kind.startswith("paper, ")):
            yield Trial(name, total, 0.5, kind, "hold")
        for rules in (("reused_inputs",), ("reused_consumers",), ("reused_inputs", "reused_consumers")):
            yield Trial(name, total, 0.5, "paper, no rectification", "hold", rules)
    for total, name in product(steps, denoisers):
        yield Trial(name, total, 0.5, "search, other noise")
    for total, budget, name in product(steps, budgets, denoisers):
        yield Trial(name, total, budget, "search", "hold")
        yield Trial(name, total, budget, "paper", "linear")


class Bench:
    """The denoisers, traced once, and the held-out pictures of the unmasked samplers."""

    def __init__(self, out: Path, passes: float) -> None:
        self.out, self.passes = out, passes
        self.loaded = {}
        self.programs: dict[str, mc.Program] = {}
        self.fast: dict[str, mc.OptimizedDenoiser] = {}
        self.pictures: dict[tuple[str, int], Tensor] = {}

    def task(self, name: str, steps: int) -> Task:
        if name not in self.loaded:
            self.loaded[name] = load(name)
            t = with_solver(self.loaded[name], name, steps, "DDIM", clip=False)
            args, kwargs = t.inputs(HELD_OUT)
            self.programs[name] = mc.trace(t.denoiser, *args, **kwargs, return_dict=False)
            self.fast[name] = mc.optimize(t.denoiser, mc.Mask.full(self.programs[name].names, t.timesteps), backend="eager")
        return with_solver(self.loaded[name], name, steps, "DDIM", clip=False)

    def unmasked(self, name: str, steps: int) -> Tensor:
        if (name, steps) not in self.pictures:
            t = self.task(name, steps)
            self.pictures[name, steps] = sample(t, t.denoiser, noise(HELD_OUT, SEED))
        return self.pictures[name, steps]

    def mask(self, trial: Trial) -> tuple[mc.Mask | None, dict[str, Any]]:
        """(the trial's mask, what learning it took); None where nothing keeps so few MACs."""
        t = self.task(trial.denoiser, trial.steps)
        program = self.programs[trial.denoiser]
        log_snr = mc.log_snr(t.scheduler, t.timesteps)
        common = {"reuse": trial.reuse, "log_snr": log_snr}
        if trial.kind in METHODS:
            return self.learned(trial, t, log_snr)
        if trial.kind == "random":
            return random_mask(program, t.timesteps, trial.budget, **common), {}
        candidates = [
            getattr(mc.schedules, trial.kind)(program, t.timesteps, interval=interval, warmup=warmup, **common)
            for interval in range(1, trial.steps)
            for warmup in (1, 2, 3, 4, 5, 6, 8)
            if warmup < trial.steps
        ]
        shares = [mc.cost(program, mask).share for mask in candidates]
        limits = 0.75 * trial.budget, trial.budget + 0.01
        fitting = [mask for mask, share in zip(candidates, shares, strict=True) if limits[0] <= share <= limits[1]]
        if not fitting:
            return None, {}
        reference = self.unmasked(trial.denoiser, trial.steps)[:CHOOSE]
        # The best of them on held-out pictures themselves: the rival gets the benefit.
        best = max(fitting, key=lambda mask: psnr(self.draw(trial, mask, CHOOSE), reference).mean().item())
        return best, {"interval": best.provenance["interval"], "warmup": best.provenance["warmup"]}

    def learned(self, trial: Trial, t: Task, log_snr: tuple[float, ...]) -> tuple[mc.Mask, dict[str, Any]]:
        path = self.out / "learned" / trial.file
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            method, time_taken = METHODS[trial.kind], 0.0
            if isinstance(method, mc.Search):
                method = dataclasses.replace(method, passes=self.passes * min(1, LONG / trial.steps))

            first = OTHER if trial.kind.endswith("other noise") else 0

            def one(seed: int) -> Tensor:
                return sample(t, t.denoiser, noise(LEARN, first + 1000 * seed))

            start = time.process_time()
            one(0), one(1)
            single = time.process_time() - start
            start = time.process_time()
            if trial.kind == "search" and trial.reuse == "linear":  # what ``learn`` does, in two parts, to show both
                before, described = self.learned(dataclasses.replace(trial, kind="search, reach not fitted"), t, log_snr)
                time_taken = described["passes_of_time"]
                start = time.process_time()
                mask = mc.fit_reach(t.denoiser, before, one)
            else:
                mask = mc.learn(
                    t.denoiser, one, trial.budget, method=method, reuse=trial.reuse, log_snr=log_snr,
                    checkpoint=path.with_suffix(".checkpoint"),
                )  # fmt: skip
            time_taken += (time.process_time() - start) / single
            mask.replace(passes_of_time=round(time_taken, 1)).save(path)
            path.with_suffix(".checkpoint").unlink(missing_ok=True)
        mask = mc.Mask.load(path)
        keys = ("passes", "passes_of_time", "fidelity_db", "scores_near_0_or_1")
        taken = {key: mask.provenance[key] for key in keys if key in mask.provenance}
        taken["passes"] += mask.provenance.get("reach_passes", 0.0)
        return (mc.rectify(mask, self.programs[trial.denoiser], trial.rules) if trial.rules else mask), taken

    def draw(self, trial: Trial, mask: mc.Mask, pictures: int = HELD_OUT) -> Tensor:
        fast = self.fast[trial.denoiser]
        fast.forget_graphs(100)
        fast.set_mask(mask)
        return sample(self.task(trial.denoiser, trial.steps), fast, noise(HELD_OUT, SEED)[:pictures])

    def measure(self, trial: Trial) -> dict[str, Any]:
        reference = self.unmasked(trial.denoiser, trial.steps)
        if trial.kind == "fewer steps":
            fitting = [s for s in fewer_steps(trial.steps) if s <= (trial.budget + 0.01) * trial.steps]
            if not fitting:
                return {}
            t = with_solver(self.loaded[trial.denoiser], trial.denoiser, max(fitting), "DDIM", clip=False)
            pictures, described = sample(t, t.denoiser, noise(HELD_OUT, SEED)), {"share": max(fitting) / trial.steps}
        else:
            mask, taken = self.mask(trial)
            if mask is None:
                return {}
            cost = mc.cost(self.programs[trial.denoiser], mask)
            pictures, described = self.draw(trial, mask), {"share": cost.share, "graphs": cost.graphs, **taken}
        each = psnr(pictures, reference)
        similarity = structural_similarity_index_measure(pictures, reference, data_range=1.0).item()
        return {**described, "psnr": each.mean().item(), "psnr_spread": each.std().item(), "ssim": similarity}


def random_mask(
    program: mc.Program, timesteps: tuple[float, ...], budget: float, reuse: str, log_snr: tuple[float, ...]
) -> mc.Mask:
    """Random decisions, as many as the budget allows."""
    draws = np.random.default_rng(0).random((len(timesteps), len(program.names)))
    best = None
    for threshold in np.linspace(0, 1, 101):
        mask = mc.Mask(draws < threshold, blocks=program.names, timesteps=timesteps, reuse=reuse, log_snr=log_snr)
        if mc.cost(program, mask).share <= budget:
            best = mask
    assert best is not None
    return best


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoisers", nargs="+", default=list(DENOISERS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--passes", type=float, default=60.0, help="of the search")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--only", default="", help="regular expression on the trial")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--report", action="store_true", help="only write learning.md and the plot from what there is")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    if not options.report:
        path = options.out / "learning.json"
        settings = {
            "setting": "Float32, backend eager",
            "passes": options.passes,
            "pictures": {"learning": 2 * LEARN, "held out": HELD_OUT, "choosing": CHOOSE},
            "weights": {name: weights_hash(name) for name in DENOISERS},
        }
        done = rows.opened(path, settings, options.fresh)
        bench = Bench(options.out, options.passes)
        wanted = [t for t in trials(options.denoisers, options.steps, options.budgets, options.ablations) if t.key not in done]
        for trial in tqdm([t for t in wanted if re.search(options.only, t.key)], disable=None):
            figures = bench.measure(trial)
            rows.add(path, {"key": trial.key, **asdict(trial), **figures, "hardware": hardware(threads=False)})
            tqdm.write(f"{trial} {figures}")
    learning_report.write(options.out)


if __name__ == "__main__":
    main()
