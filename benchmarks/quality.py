"""What masks do to pictures: ``python -m benchmarks.quality``. Goes on where it was stopped; ``--fresh`` starts over.

Schedules x reuse rules x step counts on both reference denoisers, beside fewer steps, better solvers at fewer steps, and
diffusers' own TaylorSeer hook on the DiT. Every result compares pictures from the same noise. No solver clips its estimates of
the picture here: DDIM alone would, by the bundled scheduler, and come to other pictures than the others.

* PSNR and SSIM of the final pictures to those of the unmasked sampler with the same steps;
* PSNR to the "limit": the pictures of DPM++ 2M at 200 steps, which the deterministic samplers come to with ever more steps;
* Frechet distance of at least 2,000 pictures to the training pictures, in the features of ``benchmarks.reference.classifier``
  (or Inception's, ``--inception weights.pth`` of torch-fidelity).

Writes ``quality.json`` after every result, then ``quality.md`` and the plot, with the speed-ups of ``benchmarks.latency``.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

import maskcompile as mc
from benchmarks import quality_report, rows
from benchmarks.masks import Choice, choices
from benchmarks.reference import HERE, load
from benchmarks.reference.classifier import load_features
from benchmarks.reference.train import training_pictures
from benchmarks.rivals import BLOCKS, taylorseer_computes, taylorseer_hook
from benchmarks.sampling import Task, noise, psnr, sample, with_solver
from benchmarks.timing import hardware

RESULTS = Path(__file__).parent / "results"
DENOISERS = ("unet", "dit")
STEPS = (50, 20, 100)
BATCH = 48
#: pictures for PSNR and SSIM, for the Frechet distance, and steps of the limit
FEW, MANY, LIMIT = 48, 2016, 200
#: pictures that a reach is fitted to
FIT = 16
#: steps of the longest runs in which the variants of the rule, and TaylorSeer, are looked at too
LONG = 50
#: noise of the pictures compared; no other benchmark draws these seeds
SEED = 1_000_000


@dataclass(frozen=True)
class Trial:
    """One sampler to look at. reference: steps of the unmasked sampler that it is compared with. frechet: what to measure.

    choice: its mask, None for none. hook: order of TaylorSeer's hook instead of a mask, at the choice's interval.
    """

    denoiser: str
    reference: int
    steps: int
    solver: str = "DDIM"
    choice: Choice | None = None
    hook: int | None = None
    frechet: bool = False

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


def fewer_steps(total: int) -> list[int]:
    """Step counts to compare with a run of ``total``, down to 0.4 of it.

    They divide 1000: where they do not, DDIMScheduler places its steps inconsistently, and would be too easy a rival.
    """
    return [steps for steps in range(total - 1, 0, -1) if 1000 % steps == 0 and steps >= 0.4 * total]


def trials(denoisers: list[str], steps: tuple[int, ...]) -> Iterator[Trial]:
    """All of them, what matters most first; first PSNR and SSIM, then the Frechet distances."""
    for total in steps:
        for name in denoisers:
            yield Trial(name, total, total)
            for choice in choices(name):
                yield Trial(name, total, total, choice=choice)
            for fewer in fewer_steps(total):
                for solver in ("DDIM", "DPM++ 2M", "UniPC"):
                    yield Trial(name, total, fewer, solver)
            if total > LONG:
                continue
            for choice in choices(name, rules=("linear by step", "linear fitted")):
                yield Trial(name, total, total, choice=choice)
            if name == "dit":
                for interval in (2, 3, 4):
                    for order in (1, 2):
                        yield Trial(name, total, total, choice=Choice("uniform", interval), hook=order)
    for name in denoisers:  # where extrapolation is hard: few steps, large gaps, a sampler that adds noise, another solver
        schedule = choices(name)[0].schedule
        for total in (20, 50):
            yield Trial(name, total, total, "DPM++ 2M")
        for rule in ("hold", "linear"):
            for warmup in (1, 2, 4):
                yield Trial(name, 10, 10, choice=Choice(schedule, 2, warmup, rule))
            for interval in (7, 10):
                for warmup in (1, 4):
                    yield Trial(name, 50, 50, choice=Choice(schedule, interval, warmup, rule))
            for solver in ("DDIM, eta 1", "DPM++ 2M"):
                for interval in (2, 3):
                    yield Trial(name, 50, 50, solver, Choice(schedule, interval, 4, rule))
                    yield Trial(name, 20, 20, solver, Choice(schedule, interval, 4, rule))
    for total in sorted(set(steps) & {20, 50}):  # minutes a row: every mask and rival at 20 steps, half the MACs at 50
        for name in denoisers:
            yield Trial(name, total, total, frechet=True)
            for choice in choices(name, (4,)):
                if total == 20 or (choice.schedule, choice.interval) == ("uniform", 2):
                    yield Trial(name, total, total, choice=choice, frechet=True)
            for fewer in fewer_steps(total) if total == 20 else [total // 2]:
                for solver in ("DDIM", "DPM++ 2M"):
                    yield Trial(name, total, fewer, solver, frechet=True)


class Samplers:
    """The denoisers, captured and compiled once for all trials, and pictures that several trials compare with."""

    def __init__(self, backend: str, batch: int) -> None:
        self.backend, self.batch = backend, batch
        self.loaded: dict[str, Any] = {}
        self.programs: dict[str, mc.Program] = {}
        self.fast: dict[str, mc.OptimizedDenoiser] = {}
        self.pictures: dict[tuple[str, int, str, int], Tensor] = {}
        self.masks: dict[Trial, mc.Mask] = {}

    def task(self, name: str, steps: int, solver: str) -> Task:
        if name not in self.loaded:
            self.loaded[name] = load(name)
            t = with_solver(self.loaded[name], name, steps, solver, clip=False)
            args, kwargs = t.inputs(self.batch)
            self.programs[name] = mc.trace(t.denoiser, *args, **kwargs, return_dict=False)
            full = mc.Mask.full(self.programs[name].names, t.timesteps)
            self.fast[name] = mc.optimize(t.denoiser, full, backend=self.backend)
        return with_solver(self.loaded[name], name, steps, solver, clip=False)

    def draw(self, trial: Trial, count: int) -> Iterator[Tensor]:
        """Pictures of the trial, a batch at a time."""
        t = self.task(trial.denoiser, trial.steps, trial.solver)
        if trial.hook is not None:
            assert trial.choice is not None
            denoiser = load(trial.denoiser)[0]
            with taylorseer_hook(denoiser, BLOCKS[trial.denoiser], trial.choice.interval, trial.hook) as restart:
                for start in range(0, count, self.batch):
                    restart()
                    yield sample(t, denoiser, noise(self.batch, SEED + start))
            return
        program = self.programs[trial.denoiser]
        unmasked = mc.Mask.full(program.names, t.timesteps)
        denoiser = self.fast[trial.denoiser]
        denoiser.set_mask(self.mask(trial) if trial.choice else unmasked)
        for start in range(0, count, self.batch):
            yield sample(t, denoiser, noise(self.batch, SEED + start))

    def mask(self, trial: Trial) -> mc.Mask:
        assert trial.choice is not None
        if trial not in self.masks:
            t = self.task(trial.denoiser, trial.steps, trial.solver)
            mask = trial.choice.mask(self.programs[trial.denoiser], t)
            if trial.choice.reuse == "linear fitted":
                mask = mc.fit_reach(t.denoiser, mask, lambda seed: sample(t, t.denoiser, noise(FIT // 2, 1000 * seed)))
            self.masks[trial] = mask
        return self.masks[trial]

    def unmasked(self, name: str, steps: int, solver: str, count: int) -> Tensor:
        """The first ``count`` pictures without a mask, kept."""
        key = (name, steps, solver, count)
        if key not in self.pictures:
            self.pictures[key] = torch.cat(list(self.draw(Trial(name, steps, steps, solver), count)))
        return self.pictures[key]

    def share(self, trial: Trial) -> float:
        """MACs of the trial as a share of those of its unmasked reference."""
        if trial.choice is None:
            return trial.steps / trial.reference
        self.task(trial.denoiser, trial.steps, trial.solver)
        program = self.programs[trial.denoiser]
        if trial.hook is not None:
            full = sum(taylorseer_computes(step, trial.choice.interval) for step in range(trial.steps))
            floor = program.slots.macs_of(program.slots.reach(frozenset(program.slots.size), frozenset())[0]) / program.macs
            return (full + (trial.steps - full) * floor) / trial.steps
        return mc.cost(program, self.mask(trial)).share


def measure(trial: Trial, samplers: Samplers, frechet: Callable[[str], FrechetInceptionDistance], few: int, many: int) -> Any:
    """The figures of one trial."""
    if trial.frechet:
        metric = frechet(trial.denoiser)
        for batch in tqdm(samplers.draw(trial, many), total=many // samplers.batch, leave=False, disable=None):
            metric.update(to_bytes(batch), real=False)
        return {"frechet": metric.compute().item()}
    solver = trial.solver if trial.choice else "DDIM"
    pictures = torch.cat(list(samplers.draw(trial, few)))
    unmasked = samplers.unmasked(trial.denoiser, trial.reference, solver, few)
    result: dict[str, Any] = {"share": samplers.share(trial)}
    if trial.choice or trial.steps != trial.reference:
        each = psnr(pictures, unmasked)
        result |= {"psnr": each.mean().item(), "psnr_spread": each.std().item()}
        result["ssim"] = structural_similarity_index_measure(pictures, unmasked, data_range=1.0).item()
    if not trial.solver.endswith("eta 1"):
        result["psnr_limit"] = psnr(pictures, samplers.unmasked(trial.denoiser, LIMIT, "DPM++ 2M", few)).mean().item()
    return result


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in 0..1 as uint8: torchmetrics does not convert them for a feature module of one's own."""
    return (pictures * 255).round().to(torch.uint8)


def frechet_metrics(inception: Path | None, many: int) -> Callable[[str], FrechetInceptionDistance]:
    """name -> a metric that has seen ``many`` training pictures of the denoiser, classes evenly."""
    seen: dict[str, FrechetInceptionDistance] = {}

    def metric(name: str) -> FrechetInceptionDistance:
        if name not in seen:
            feature = {"feature": 2048, "feature_extractor_weights_path": str(inception)} if inception else None
            options = feature or {"feature": load_features(), "input_img_size": (3, 32, 32)}
            seen[name] = FrechetInceptionDistance(**options, reset_real_features=False)
            pictures, labels = training_pictures(name)
            for label in labels.unique():
                own = pictures[labels == label] / 2 + 0.5
                index = torch.arange(many // len(labels.unique())) % len(own)
                for part in index.split(256):
                    seen[name].update(to_bytes(own[part]), real=True)
        seen[name].reset()
        return seen[name]

    return metric


def weights_hash(name: str) -> str:
    """Of a reference denoiser's checkpoint, so that results of two do not mix."""
    return sha256((HERE / name / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoisers", nargs="+", default=list(DENOISERS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--pictures", type=int, default=FEW, help="for PSNR and SSIM")
    parser.add_argument("--frechet", type=int, default=MANY, help="pictures for the Frechet distance; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--inception", type=Path, help="torch-fidelity's InceptionV3 weights")
    parser.add_argument("--only", default="", help="regular expression on the trial")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--report", action="store_true", help="only write quality.md and the plot from what there is")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.pictures % options.batch or options.frechet % options.batch:
        parser.error("--pictures and --frechet are multiples of --batch.")
    warnings.filterwarnings("ignore", module="torch")
    if not options.report:
        path = options.out / "quality.json"
        settings = {
            "setting": f"Batch {options.batch}, float32, backend {options.backend}; {hardware(threads=False)}.",
            "pictures": options.pictures,
            "frechet_pictures": options.frechet,
            "features": "Inception" if options.inception else "classifier",
            "limit": LIMIT,
            "weights": {name: weights_hash(name) for name in DENOISERS},
        }
        done = rows.opened(path, settings, options.fresh)
        samplers, metrics = Samplers(options.backend, options.batch), frechet_metrics(options.inception, options.frechet)
        wanted = [t for t in trials(options.denoisers, tuple(options.steps)) if re.search(options.only, t.key)]
        wanted = [t for t in wanted if options.frechet or not t.frechet]
        for trial in tqdm([t for t in wanted if t.key not in done], disable=None):
            figures = measure(trial, samplers, metrics, options.pictures, options.frechet)
            described = asdict(replace(trial, choice=None)) | {
                "mask": trial.choice.label if trial.choice else None,
                "warmup": trial.choice.warmup if trial.choice else None,
                "rule": f"TaylorSeer hook, order {trial.hook}" if trial.hook else trial.choice and trial.choice.reuse,
            }
            rows.add(path, {"key": trial.key, **described, **figures})
            tqdm.write(f"{described['denoiser']} {trial.steps}/{trial.reference} {trial.solver} {described['mask']} "
                       f"{described['rule']} {figures}")  # fmt: skip
    quality_report.write(options.out)


if __name__ == "__main__":
    main()
