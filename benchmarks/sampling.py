"""Sample from the reference denoisers with diffusers' schedulers, and compare pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from benchmarks.reference import load
from benchmarks.reference.dataset import CLASSES, SIZE

#: positional and keyword arguments of one denoiser call
Call = tuple[tuple[Any, ...], dict[str, Any]]

#: solver -> diffusers' scheduler and what its configuration gets; see ``with_solver``
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "DDIM, eta 1": (DDIMScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "UniPC": (UniPCMultistepScheduler, {}),
}


@dataclass(frozen=True)
class Task:
    """A denoiser with its scheduler set to a number of steps. classes: None where it takes none."""

    name: str
    denoiser: Any
    scheduler: Any
    timesteps: tuple[int, ...]
    classes: int | None
    eta: float = 0.0

    def inputs(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example arguments of one denoiser call for ``batch`` pictures."""
        if self.classes is None:
            return (torch.randn(batch, 3, SIZE, SIZE), torch.tensor(self.timesteps[0])), {}
        timestep = torch.full((batch,), self.timesteps[0])
        return (torch.randn(batch, 3, SIZE, SIZE), timestep), {"class_labels": labels(batch, self.classes)}


def task(name: str, steps: int, solver: str = "DDIM") -> Task:
    """The reference denoiser ``name`` ("unet" or "dit") with a scheduler of ``SOLVERS`` at ``steps`` steps."""
    return with_solver(load(name), name, steps, solver)


def with_solver(loaded: tuple[Any, Any], name: str, steps: int, solver: str, clip: bool = True) -> Task:
    """The same for what ``benchmarks.reference.load`` returned.

    clip: whether DDIM clips its estimate of the picture to -1..1, as the bundled scheduler does. The other solvers never clip,
    and so come to other pictures than it: to compare solvers, clip nowhere.
    """
    denoiser, own = loaded
    kind, changes = SOLVERS[solver]
    scheduler = kind.from_config(own.config, **changes, **({"clip_sample": clip} if kind is DDIMScheduler else {}))
    scheduler.set_timesteps(steps)
    classes = len(CLASSES) if name == "dit" else None
    timesteps = tuple(int(t) for t in scheduler.timesteps)
    return Task(name, denoiser, scheduler, timesteps, classes, 1.0 if solver.endswith("eta 1") else 0.0)


def noise(batch: int, seed: int) -> Tensor:
    """Gaussian noise [batch, 3, 32, 32]; a generator a picture, so that a batch's size changes no picture."""
    return torch.stack([torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed + i)) for i in range(batch)])


def labels(batch: int, classes: int) -> Tensor:
    """int64 [batch], the classes in order and evenly."""
    return torch.arange(batch) * classes // batch


@torch.no_grad()
def sample(t: Task, denoiser: Callable[..., Any], start: Tensor) -> Tensor:
    """Pictures [batch, 3, 32, 32] in 0..1 from the noise ``start``, by the task's scheduler and ``denoiser``."""
    t.scheduler.set_timesteps(len(t.timesteps))  # multistep solvers keep state of the last run
    extra = {} if t.classes is None else {"class_labels": labels(len(start), t.classes)}
    # What a stochastic sampler draws is the same for every denoiser.
    drawn = {"eta": t.eta, "generator": torch.Generator().manual_seed(0)} if t.eta else {}

    def call(x: Tensor, timestep: Tensor) -> Call:
        # The UNet takes one timestep for all pictures, the DiT one for each.
        given = timestep if t.classes is None else timestep.expand(len(x))
        return (t.scheduler.scale_model_input(x, timestep), given), {"return_dict": False, **extra}

    x = denoise(t.scheduler, denoiser, call, start * t.scheduler.init_noise_sigma, **drawn)
    return (x / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def denoise(
    scheduler: Any, denoiser: Callable[..., Any], call: Callable[[Tensor, Tensor], Call], start: Tensor, **drawn: Any
) -> Tensor:
    """The result of a run of the scheduler's steps from ``start``, in its dtype.

    call: the denoiser's arguments for a noisy sample at a timestep. drawn: for the scheduler's step.
    """
    x = start
    for timestep in scheduler.timesteps:
        args, kwargs = call(x, timestep)
        x = scheduler.step(denoiser(*args, **kwargs)[0], timestep, x, return_dict=False, **drawn)[0].to(start.dtype)
    return x


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """dB of each picture [batch] for pictures in 0..1; infinite where they are equal."""
    return -10 * torch.log10((a - b).square().flatten(1).mean(1))
