"""The denoisers on which caches are compared: the bundled ones, and an SD-shaped and a Flux-shaped one with random weights.

A cache may decide by content, so each case holds the calls of a real sampling run of the original, step by step. Weights do
not matter to a latency; the two random denoisers are there because some caches know their classes only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor

from benchmarks.reference import load
from benchmarks.sampling import Call, denoise, labels, noise, psnr, with_solver


@dataclass(frozen=True, eq=False)
class Case:
    """A denoiser, and the calls of one sampling run of it.

    timesteps: the values it is called with, in order. scheduler: at that many steps. trained: whether its pictures mean
    anything. call: the arguments for a noisy sample at a timestep of the scheduler.
    """

    name: str
    denoiser: Any
    scheduler: Any
    timesteps: tuple[float, ...]
    trained: bool
    start: Tensor
    call: Callable[[Tensor, Tensor], Call]
    calls: tuple[Call, ...]

    @property
    def steps(self) -> int:
        return len(self.calls)


#: denoiser -> pictures in a batch: on two CPU cores an eager step then takes 50 to 100 ms
BATCH = {"dit": 16, "unet": 16, "sd": 4, "flux": 4}


def case(name: str, steps: int, batch: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    """The denoiser ``name`` of ``BATCH``, and its calls over a run of ``steps`` steps for ``batch`` pictures."""
    batch = batch or BATCH[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random weights
        denoiser, scheduler = _BUILDERS[name](steps)
    denoiser = denoiser.to(device).eval()
    if dtype != torch.float32:
        denoiser = denoiser.to(dtype)
    call: Callable[[Tensor, Tensor], Call]
    start = random(batch, 4, 32, 32)
    scale = 1.0
    if name == "flux":
        side = 16
        ids = torch.zeros(side * side, 3)
        ids[:, 1], ids[:, 2] = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        start, scale = random(batch, side * side, 16), 1000.0  # its pipeline divides the timesteps
        constant = {
            "encoder_hidden_states": random(batch, 32, 128),
            "pooled_projections": random(batch, 64),
            "img_ids": ids.to(device, dtype),
            "txt_ids": torch.zeros(32, 3, device=device, dtype=dtype),
            "return_dict": False,
        }

        def call(x: Tensor, timestep: Tensor) -> Call:
            return (), {"hidden_states": x, "timestep": timestep.expand(batch).to(dtype) / scale, **constant}
    elif name == "sd":
        prompt = random(batch, 16, 64)

        def call(x: Tensor, timestep: Tensor) -> Call:
            return (x, timestep, prompt), {"return_dict": False}
    else:
        start = noise(batch, 0).to(device, dtype)
        if name == "dit":
            classes = labels(batch, 6).to(device)

            def call(x: Tensor, timestep: Tensor) -> Call:
                return (x, timestep.expand(batch)), {"class_labels": classes, "return_dict": False}
        else:

            def call(x: Tensor, timestep: Tensor) -> Call:
                return (x, timestep), {"return_dict": False}

    scheduler.timesteps = scheduler.timesteps.to(device)
    timesteps = tuple(float(t) / scale for t in scheduler.timesteps.to(dtype if name == "flux" else torch.float64))
    recorded: list[Call] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        recorded.append((args, kwargs))
        return denoiser(*args, **kwargs)

    unrecorded = Case(name, denoiser, scheduler, timesteps, name in ("dit", "unet"), start, call, ())
    sample(unrecorded, recording)
    return Case(**{**vars(unrecorded), "calls": tuple(recorded)})


def sample(of: Case, denoiser: Callable[..., Any]) -> Tensor:
    """The result of a sampling run by ``denoiser`` from the start of the case."""
    of.scheduler._step_index = None  # flow matching counts its steps
    return denoise(of.scheduler, denoiser, of.call, of.start)


def likeness(pictures: Tensor, original: Tensor) -> float:
    """Mean PSNR in dB of samples in -1..1 to the original's."""
    return float(psnr(*((x.float() / 2 + 0.5).clamp(0, 1) for x in (pictures, original))).mean())


@torch.no_grad()
def run(of: Case, denoiser: Callable[..., Any]) -> list[Tensor]:
    """The outputs of the denoiser for every call of the case, copied: CUDA graphs overwrite theirs."""
    return [denoiser(*args, **kwargs)[0].clone() for args, kwargs in of.calls]


def calls(of: Case, denoiser: Callable[..., Any]) -> list[Callable[[], Any]]:
    """Every call of the case, to be made without gradients, and nothing else."""
    return [torch.no_grad()(partial(denoiser, *args, **kwargs)) for args, kwargs in of.calls]


def _bundled(name: str) -> Callable[[int], tuple[Any, Any]]:
    def build(steps: int) -> tuple[Any, Any]:
        task = with_solver(load(name), name, steps, "DDIM")
        return task.denoiser, task.scheduler

    return build


def _sd(steps: int) -> tuple[Any, Any]:
    """Stable Diffusion's UNet with three levels instead of four, one layer each, and 32 to 96 channels."""
    denoiser = UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    scheduler.set_timesteps(steps)
    return denoiser, scheduler


def _flux(steps: int) -> tuple[Any, Any]:
    """Flux's transformer with two joint and four single blocks of width 128, for 16 x 16 picture and 32 text tokens."""
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return denoiser, scheduler


_BUILDERS = {"dit": _bundled("dit"), "unet": _bundled("unet"), "sd": _sd, "flux": _flux}
