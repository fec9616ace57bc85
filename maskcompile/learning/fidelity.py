"""How faithful a mask is: whole sampling passes through the specialised graphs, against recorded ones without a mask.

This is the true objective, of which errors at single steps say little: what a mask does at one step ages, adds up and is
partly undone by the steps after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maskcompile.learning.processes import Processes
from maskcompile.learning.recording import Recording, Sample, instance_forward, outcome_of, restored_forward
from maskcompile.mask import Mask
from maskcompile.optimize import optimize

#: Error to the reference, as a share of its power, below which nothing counts (80 dB).
FLOOR = 1e-8
#: Specialised graphs kept between masks; the search meets the same ones again and again.
MOST_GRAPHS = 64


class Fidelity:
    """Runs masks. ``fidelity(mask)``: float64 [elements] in dB, 10 log10(power of the reference / squared error).

    Each element of the outcome of each seed is one; the reference's power is its variance. Minus infinity where the outcome
    is not finite, and ``broken`` then says at which step that began. recordings: of the seeds, without a mask.

    Raises ValueError where a reference does not vary: any mask would do for it. ``fidelity`` raises it for a sampler that does
    not do the same for the same seed.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Sample,
        recordings: Sequence[Recording],
        full: Mask,
        backend: str | Callable[..., Any],
        timestep: str | None,
        processes: Processes,
    ) -> None:
        self.model, self.sample, self.processes = model, sample, processes
        self.recordings = {recording.seed: recording for recording in recordings}
        self.seeds, self.timestep = tuple(self.recordings), timestep
        for recording in recordings:
            if bool((recording.outcome.std(dim=1, unbiased=False) == 0).any()) and recording.outcome.shape[1] > 1:
                raise ValueError(
                    f"what sample({recording.seed}) returned has an element all of whose numbers are the same (a safety "
                    "checker's black picture?), by which no mask can be told from another."
                )
        self.fast = optimize(model, full, backend=backend, timestep=timestep)
        self.own_forward = instance_forward(model)
        self.finite: list[Tensor] = []  # a flag for each masked call of the last pass
        self.broken = ""

    def __call__(self, mask: Mask, seeds: Sequence[int] | None = None) -> NDArray[np.float64]:
        wanted = self.seeds if seeds is None else tuple(seeds)
        own = {seed: self._of(mask, seed) for seed in (seed for seed in wanted if seed in self.processes.mine(self.seeds))}
        every = self.processes.gather(own)
        return np.concatenate([every[seed] for seed in wanted])

    def _of(self, mask: Mask, seed: int) -> NDArray[np.float64]:
        return fidelity(self.outcome(mask, seed), self.recordings[seed].outcome)

    def outcome(self, mask: Mask, seed: int) -> Tensor:
        """[elements, numbers] of a sampling pass under the mask, in this process."""
        if mask != self.fast.mask:
            self.fast.forget_graphs(MOST_GRAPHS)
            self.fast.set_mask(mask)
        self.fast.reset()
        self.finite.clear()
        first, *later = self.recordings[seed].steps
        # All that the first step is given, and so what it comes to, is the same under any mask: there everything is computed.
        alike = [recorded.call for recorded in (*first, *(later[0][:1] if later else ()))]
        found = outcome_of(self.model, self.sample, seed, self._masked, self.timestep, alike)
        if not found.isfinite().all():
            self.broken = self._where_broken(seed)
        return found

    def _where_broken(self, seed: int) -> str:
        recording = self.recordings[seed]
        step_of = [step for step, calls in enumerate(recording.steps) for _ in calls]
        for step, finite in zip(step_of, self.finite, strict=False):
            if not finite:
                at = f"step {step} (timestep {recording.timesteps[step]:g}) of sample({seed})"
                return f"the denoiser's output is not finite at {at}"
        return f"what sample({seed}) returned is not finite, although the denoiser's outputs are"

    def _masked(self, *args: Any, **kwargs: Any) -> Any:
        # The optimised denoiser may capture, which takes the model as it is.
        with restored_forward(self.model, self.own_forward):
            result = self.fast(*args, **kwargs)
        flags = [leaf.isfinite().all() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.finite.append(torch.stack(flags).all())  # read only where the outcome is not finite: reading waits for a GPU
        return result


def fidelity(outcome: Tensor, reference: Tensor) -> NDArray[np.float64]:
    """float64 [elements] in dB of two outcomes [elements, numbers].

    Raises ValueError where their shapes differ.
    """
    if outcome.shape != reference.shape:
        raise ValueError(
            f"sample(seed) came to {list(outcome.shape)} numbers with a mask and {list(reference.shape)} without; "
            "it must do the same thing at every call."
        )
    error = (outcome.double() - reference.double()).square().mean(dim=1) / power(reference)
    decibels = -10 * torch.log10(error.clamp_min(FLOOR))
    return torch.where(error.isfinite(), decibels, -torch.inf).numpy()


def power(reference: Tensor) -> Tensor:
    """float64 [elements] of an outcome [elements, numbers]: the variance of its numbers, or the square of a single one."""
    many = reference.shape[1] > 1
    found = reference.double().var(dim=1, unbiased=False) if many else reference.double().square()[:, 0]
    return found.clamp_min(1e-30)


def better(candidate: NDArray[np.float64], incumbent: NDArray[np.float64]) -> bool:
    """Whether the mean is higher by more than its standard error over the elements: not by the luck of these seeds."""
    gain = candidate - incumbent
    if not np.isfinite(gain).all():
        return bool(np.isfinite(candidate).all())
    error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return bool(gain.mean() > max(error, 1e-6))
