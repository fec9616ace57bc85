"""What a mask wants to know of a sampler: the log-SNR of its steps. Reads the attributes that diffusers' schedulers have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

#: Signal or noise power taken for none: keeps the log-SNR finite at the ends of a schedule.
_NONE = 1e-8


def log_snr(scheduler: Any, timesteps: Iterable[float] | None = None) -> tuple[float, ...]:
    """log(alpha^2 / sigma^2) at each step of a scheduler on which ``set_timesteps`` was called, for ``Mask(log_snr=...)``.

    scheduler: of diffusers, or anything with ``timesteps`` and ``alphas_cumprod`` [training steps], or, for flow matching and
    EDM, ``sigmas`` [steps + 1]. timesteps: the values in sampling order where the mask is not for all of the scheduler's.
    Timesteps that a 2nd-order scheduler repeats are taken once, as in a mask.

    Raises ValueError for a scheduler that has none of these, or for a timestep that it does not have.
    """
    own = np.asarray(scheduler.timesteps.cpu(), dtype=np.float64)
    wanted = np.asarray(list(dict.fromkeys(own.tolist())) if timesteps is None else [float(t) for t in timesteps])
    config = getattr(scheduler, "config", {})
    flow = config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction"
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is not None and not flow:
        power = np.asarray(alphas.cpu(), dtype=np.float64)
        values = np.interp(wanted, np.arange(len(power)), _ratio(power, 1 - power))
        return tuple(values.tolist())
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        raise ValueError(
            f"{type(scheduler).__name__} has neither alphas_cumprod nor sigmas; give the mask log_snr values, or none."
        )
    at = [int(np.abs(own - value).argmin()) for value in wanted]
    if missing := [value for value, index in zip(wanted, at, strict=True) if not np.isclose(own[index], value)]:
        raise ValueError(f"{type(scheduler).__name__} has no timestep {missing[0]:g}; did you call set_timesteps?")
    sigma = np.asarray(sigmas.cpu(), dtype=np.float64)[at]
    # EDM adds noise to the sample as it is; flow matching goes from one to the other in a straight line.
    alpha = np.ones_like(sigma) if "sigma_data" in config else 1 - sigma
    values = _ratio(alpha**2, sigma**2)
    return tuple(values.tolist())


def _ratio(signal: np.ndarray[Any, np.dtype[np.float64]], noise: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    return np.log(np.maximum(signal, _NONE)) - np.log(np.maximum(noise, _NONE))
