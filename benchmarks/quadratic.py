"""DDIM at quadratically spaced timesteps, as papers sample CIFAR-10 (``--skip_type quad``): diffusers spaces them evenly."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor


class QuadraticDDIMScheduler(diffusers.DDIMScheduler):  # type: ignore[misc]
    """DDIM (arXiv 2010.02502, Eq. 12) with eta 0 at timesteps whose square roots are evenly spaced, up to 0.8 of training's.

    As the DDIM authors' code, which Diff-Pruning (arXiv 2305.10924) and DeepCache (arXiv 2312.00858) sample CIFAR-10 with: the
    last step comes to the picture, and the estimate of the picture is never clipped. Some of the first timesteps are the same
    number: of 100, 0 comes four times and 2 twice. A step from a timestep to itself changes nothing at eta 0, so that each is
    taken once here: 96 steps for 100.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        roots = np.linspace(0, np.sqrt(0.8 * self.config.num_train_timesteps), num_inference_steps)
        rising = np.unique((roots**2).astype(np.int64)).tolist()
        self.before = dict(zip(rising, [None, *rising[:-1]], strict=True))
        self.timesteps = torch.tensor(rising[::-1], device=device)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0, return_dict: bool = True) -> Any:
        """Raises ValueError for another eta than 0, and for a denoiser that does not predict noise."""
        if eta or self.config.prediction_type != "epsilon":
            raise ValueError(f"quadratic timesteps are for eta 0 and noise; got {eta:g}, {self.config.prediction_type}.")
        before = self.before[int(timestep)]
        here = self.alphas_cumprod[int(timestep)]
        there = torch.ones_like(here) if before is None else self.alphas_cumprod[before]
        picture = (sample - (1 - here) ** 0.5 * model_output) / here**0.5
        less_noisy = there**0.5 * picture + (1 - there) ** 0.5 * model_output
        if not return_dict:
            return less_noisy, picture
        return diffusers.schedulers.scheduling_ddim.DDIMSchedulerOutput(prev_sample=less_noisy, pred_original_sample=picture)
