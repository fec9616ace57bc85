"""What a mask wants to know of a sampler: the log-SNR of its steps. Reads the attributes that diffusers' schedulers have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Signal or noise power taken for none: keeps the log-SNR finite at the ends of a schedule.
_NONE = 1e-8


def log_snr(scheduler: Any, timesteps: Iterable[float] | None = None) -> tuple[float, ...]:
    """log(alpha^2 / sigma^2) at each step of a scheduler on which ``set_timesteps`` was called, for ``Mask(log_snr=...)``.

    scheduler: of diffusers. timesteps: some of the scheduler's own, in sampling order; leave them out for a mask that is for
    all of its steps, also where the denoiser is called with other values than the scheduler's (Flux divides them by 1000).
    Timesteps that a 2nd-order scheduler repeats are taken once, as in a mask. Rises along the run, falls for inversion.

    Raises ValueError for a timestep that the scheduler does not have, and for a scheduler that is neither variance preserving
    (``alphas_cumprod``), nor EDM (``sigma_data``), nor flow matching.
    """
    own = np.asarray(scheduler.timesteps.cpu(), dtype=np.float64)
    wanted = list(dict.fromkeys(own.tolist())) if timesteps is None else [float(t) for t in timesteps]
    at = [int(np.abs(own - value).argmin()) for value in wanted]
    if missing := [value for value, index in zip(wanted, at, strict=True) if not np.isclose(own[index], value)]:
        raise ValueError(
            f"{type(scheduler).__name__} has no timestep {missing[0]:g}; call set_timesteps first, and give timesteps of its "
            "own, or leave them out."
        )
    values = _of_steps(scheduler, own)[at]
    return tuple(values.tolist())


def _of_steps(scheduler: Any, own: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log-SNR at every one of the scheduler's timesteps ``own``."""
    config, kind = getattr(scheduler, "config", {}), type(scheduler).__name__
    sigmas = getattr(scheduler, "sigmas", None)
    # One sigma a timestep, and usually one more at the end; else they are of the training steps.
    sigma = None if sigmas is None or len(sigmas) - len(own) not in (0, 1) else np.asarray(sigmas.cpu(), np.float64)[: len(own)]
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction" or kind.startswith("FlowMatch")
    if flow and sigma is not None:
        sigma = 1 - sigma if config.get("invert_sigmas") else sigma
        return _ratio((1 - sigma) ** 2, sigma**2)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    midpoints = sigma is not None and len(np.unique(sigma)) < len(np.unique(own))  # DPM++ SDE calls the denoiser at them
    if sigma is not None and ("sigma_data" in config if alphas is None else not midpoints):
        return _ratio(np.ones_like(sigma), sigma**2)  # in units of the signal
    if alphas is not None and not flow:
        power = np.asarray(alphas.cpu(), dtype=np.float64)
        return np.interp(own, np.arange(len(power)), _ratio(power, 1 - power))
    raise ValueError(f"the log-SNR of {kind} is not known; give the mask values of your own, or none.")


def _ratio(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.log(np.maximum(signal, _NONE)) - np.log(np.maximum(noise, _NONE))
    return values
