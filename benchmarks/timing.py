"""Times that can be compared: interleaved in one run, medians with their spread, the hardware named."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)


def interleaved(
    variants: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    prepare: dict[str, Callable[[], Any]] | None = None,
    parts: int = 1,
) -> dict[str, Timing]:
    """Run the variants in turn, ``repeats`` times over after ``warmup`` rounds, so that drift meets all of them alike.

    prepare: what to do before a variant's run, outside the time taken. parts: calls that make a variant's run, with those of
    the others in between: where a machine's speed drifts by the second, what is compared has to be close by.
    """
    prepare = prepare or {}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    chance = random.Random(0)
    for number in tqdm(range(-warmup, repeats), desc="timing", delay=2, leave=False, disable=None):
        taken = dict.fromkeys(variants, 0.0)
        for part in range(parts):
            for name in chance.sample(list(variants), len(variants)):  # nobody always follows the same one
                if part == 0:
                    prepare.get(name, lambda: None)()
                synchronise()
                start = time.perf_counter()
                variants[name]()
                synchronise()
                taken[name] += time.perf_counter() - start
        for name, time_taken in taken.items() if number >= 0 else ():
            seconds[name].append(time_taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def in_parts(steps: Sequence[Callable[[], Any]], parts: int) -> Callable[[], None]:
    """Executes the next of ``parts`` parts of a run at every call, and begins anew after the last."""
    bounds = [len(steps) * part // parts for part in range(parts + 1)]
    ranges = cycle(pairwise(bounds))

    def execute() -> None:
        begin, end = next(ranges)
        for step in steps[begin:end]:
            step()

    return execute


def ratio(baseline: Timing, ours: Timing) -> float:
    """How many times faster: the median over the rounds of baseline / ours within one round."""
    return median(_ratios(baseline, ours))


def ratio_spread(baseline: Timing, ours: Timing) -> float:
    """(largest - smallest) / median of those. How far a speed-up is to be trusted: what slows both is not in it."""
    ratios = _ratios(baseline, ours)
    return (max(ratios) - min(ratios)) / median(ratios)


def _ratios(baseline: Timing, ours: Timing) -> list[float]:
    return [b / o for b, o in zip(baseline.seconds, ours.seconds, strict=True)]


def difference(ours: Timing, other: Timing, baseline: Timing) -> tuple[float, float, float]:
    """How much longer ours takes than the other, as a share of the baseline: (median, lower, upper quartile) over rounds."""
    shares = [(a - b) / baseline.median for a, b in zip(ours.seconds, other.seconds, strict=True)]
    low, middle, high = quantiles(shares, n=4, method="inclusive")
    return middle, low, high


def hardware(threads: bool = True, device: str = "cpu") -> str:
    """Processor or GPU, threads (where time is measured) and versions, for the line beside every figure.

    device: what the benchmark ran on, as for ``torch.device``.
    """
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
        name = f"{model}, {torch.get_num_threads()} threads" if threads else model
    import diffusers

    return f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}"


def use(device: str) -> None:
    """Make it the one that ``synchronise`` and counters of memory mean."""
    if torch.device(device).index is not None and device.startswith("cuda"):
        torch.cuda.set_device(device)


def synchronise() -> None:
    """Wait for what a GPU has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
