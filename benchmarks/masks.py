"""The masks that the benchmarks measure: published schedules, with warm-up steps or without, under each reuse rule."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import maskcompile as mc
from benchmarks.cases import Case
from benchmarks.sampling import Task

#: denoiser -> (schedule, interval); with the first of them other caches are compared
SCHEDULES = {
    "unet": [("deepcache", 2), ("deepcache", 3), ("deepcache", 5), ("uniform", 2), ("uniform", 3)],
    "dit": [("uniform", 2), ("uniform", 3), ("uniform", 4)],
    "sd": [("deepcache", 2)],
    "flux": [("uniform", 2)],
}
#: "linear by step" measures distances along the step index alone, as if the log-SNR were not known; "linear fitted" has its
#: reach fitted to other noise.
RULES = ("hold", "linear", "linear by step", "linear fitted")


@dataclass(frozen=True)
class Choice:
    """A schedule with its parameters and a reuse rule of ``RULES``."""

    schedule: str
    interval: int
    warmup: int = 1
    reuse: str = "hold"

    @property
    def label(self) -> str:
        """The mask without its rule, as a call of the schedule."""
        warmup = f", warmup={self.warmup}" if self.warmup > 1 else ""
        return f"{self.schedule}(interval={self.interval}{warmup})"

    def mask(self, program: mc.Program, t: Task | Case) -> mc.Mask:
        """The mask for the timesteps of a task, which are all of its scheduler's; its reach is not fitted yet."""
        log_snr = mc.log_snr(t.scheduler) if self.reuse in ("linear", "linear fitted") else None
        schedule = getattr(mc.schedules, self.schedule)
        rule = self.reuse.split()[0]
        mask: mc.Mask = schedule(program, t.timesteps, interval=self.interval, warmup=self.warmup, reuse=rule, log_snr=log_snr)
        return mask


def choices(name: str, warmups: tuple[int, ...] = (1, 4), rules: tuple[str, ...] = ("hold", "linear")) -> list[Choice]:
    """Every schedule for the denoiser ``name``, with each number of warm-up steps and each rule."""
    return [Choice(s, interval, w, r) for (s, interval), w, r in product(SCHEDULES[name], warmups, rules)]
