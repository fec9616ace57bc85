"""diffusers' own TaylorSeer hook (Liu et al. 2025, arXiv 2503.06923) on the reference DiT, as a rival."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import HookRegistry, TaylorSeerCacheConfig, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context


def hooked(denoiser: Any, interval: int, order: int) -> Any:
    """The denoiser with the hook on the same blocks as the masks, in float32; its other settings as they are.

    DiTTransformer2DModel has no ``enable_cache``, and the hook's own patterns match none of its modules. Call ``restart``
    before each run.
    """
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
    )
    apply_taylorseer_cache(denoiser, config)
    return denoiser


def restart(denoiser: Any) -> None:
    """Forget the last run."""
    HookRegistry.check_if_exists_or_initialize(denoiser).reset_stateful_hooks()
    _set_cache_context(denoiser, CacheContext("run"))


def computes(step: int, interval: int) -> bool:
    """Whether the hook computes at a step, with its default of three full steps before it starts."""
    return step < 3 or (step - 4) % interval == 0
