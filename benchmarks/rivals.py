"""Other caches on the denoisers of ``benchmarks.cases``, each by its own package and as that package is meant to be used.

Each rival is a context manager: within it the case's denoiser caches, and what it yields makes the next run start afresh; after
it the denoiser is as it was found. ``setting`` is what its share of the MACs is tuned by: for a static schedule a whole
number, for a cache that decides by content a threshold.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from benchmarks.cases import Case, run

Restart = Callable[[], None]
Setting = int | float

_LEVELS = r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)"

#: denoiser -> the modules whose outputs a cache of module outputs keeps: what our masks call blocks. The SD-shaped UNet's
#: transformers return tuples of one, which TaylorSeer's hook gives back as a tensor; it gets what is in them.
BLOCKS = {
    "dit": r"transformer_blocks\.\d+\.(attn1|ff)",
    "unet": _LEVELS + r"\.(resnets|attentions)\.\d+",
    "sd": _LEVELS + r"\.(resnets\.\d+|attentions\.\d+\.transformer_blocks\.\d+\.(attn1|attn2|ff))",
    "flux": r"transformer_blocks\.\d+\.(attn|ff|ff_context)|single_transformer_blocks\.\d+\.(attn|proj_mlp|proj_out)",
}


#: denoiser -> its transformer blocks, and their parts that SmoothCache reuses
COMPONENTS = {
    "dit": ("BasicTransformerBlock", ["attn1", "ff"]),
    "sd": ("BasicTransformerBlock", ["attn1", "attn2", "ff"]),
    "flux": ("Flux(Single)?TransformerBlock", ["attn", "ff", "ff_context", "proj_mlp", "proj_out"]),
}


def evenly(steps: int, full: int) -> list[int]:
    """``full`` ones among ``steps``, spread evenly from the first step on: where a static schedule computes everything."""
    chosen = {step * steps // full for step in range(full)}
    return [int(step in chosen) for step in range(steps)]


@contextmanager
def as_found(denoiser: torch.nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes that it had before, and those alone.

    Packages differ in how much they leave behind when they are switched off: empty registries, forwards bound again.
    """
    before = [
        (
            module,
            {
                name: (value, dict(value) if type(value) in (dict, OrderedDict) else None)
                for name, value in vars(module).items()
            },
        )
        for module in denoiser.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            for name, (value, entries) in attributes.items():
                module.__dict__[name] = value
                if entries is not None:  # submodules, hooks and the like, changed in place
                    value.clear()
                    value.update(entries)


@contextmanager
def deepcache(case: Case, setting: Setting) -> Iterator[Restart]:
    """The DeepCache package (Ma et al. 2023, arXiv 2312.00858). setting: the interval; the shallowest branch always runs."""
    from DeepCache import DeepCacheSDHelper

    # Of a pipeline it uses the UNet, and the scheduler's timesteps to know the step.
    helper = DeepCacheSDHelper(SimpleNamespace(unet=case.denoiser, scheduler=case.scheduler))
    helper.set_params(cache_interval=int(setting), cache_branch_id=0)
    with as_found(case.denoiser):
        helper.enable()

        def restart() -> None:
            helper.cached_output.clear()
            helper.start_timestep = None

        try:
            yield restart
        finally:
            helper.disable()


@contextmanager
def smoothcache(case: Case, setting: Setting) -> Iterator[Restart]:
    """Roblox's SmoothCache (Liu et al. 2024, arXiv 2411.10510; on PyPI dit-smoothcache). setting: steps computed in full.

    Its helper takes any schedule for the components of a block class; the published ones for DiT-XL are FORA's and such as its
    calibration finds. Here the schedule is evenly spaced.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it announces which parts could not be imported
        from SmoothCache import SmoothCacheHelper, smooth_cache_helper

    # It prints a line for every module at every step.
    smooth_cache_helper.print = lambda *_: None
    block, components = COMPONENTS[case.name]
    classes = {type(m) for m in case.denoiser.modules() if re.fullmatch(block, type(m).__name__)}
    schedule = dict.fromkeys(components, evenly(case.steps, int(setting)))
    helper = SmoothCacheHelper(case.denoiser, sorted(classes, key=str), components, schedule)
    with as_found(case.denoiser):
        helper.enable()
        try:
            yield helper.reset_state
        finally:
            helper.disable()


@contextmanager
def cache_dit(case: Case, setting: Setting, static: bool) -> Iterator[Restart]:
    """cache-dit's DBCache, the first block always computed (F1B0).

    setting: static: the steps computed in full, as its steps computation mask; else the threshold on the residual's change.
    """
    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    import cache_dit as package
    from cache_dit import DBCacheConfig

    for name in list(logging.root.manager.loggerDict):
        if name.lower().startswith("cache_dit"):
            logging.getLogger(name).setLevel(logging.ERROR)
    mask = {"steps_computation_mask": evenly(case.steps, int(setting)), "steps_computation_policy": "static"}
    chosen = mask if static else {"residual_diff_threshold": float(setting)}
    config = DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, num_inference_steps=case.steps, enable_separate_cfg=False
    ).update(**chosen)
    with as_found(case.denoiser):
        package.enable_cache(case.denoiser, cache_config=config)
        try:
            yield partial(package.refresh_context, case.denoiser, cache_config=config)
        finally:
            package.disable_cache(case.denoiser)


@contextmanager
def _hooks(denoiser: torch.nn.Module, apply: Callable[[Any, Any], None], config: Any, *names: str) -> Iterator[Restart]:
    """Hooks of diffusers, of these names, without ``enable_cache``, which only some of its denoisers have."""

    def restart() -> None:
        HookRegistry.check_if_exists_or_initialize(denoiser).reset_stateful_hooks()
        _set_cache_context(denoiser, CacheContext("run"))

    with as_found(denoiser):
        apply(denoiser, config)
        restart()
        try:
            yield restart
        finally:
            for name in names:
                HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(name)


def taylorseer_hook(
    denoiser: torch.nn.Module, blocks: str, interval: int, order: int, warmup: int = 3, dtype: torch.dtype = torch.float32
) -> AbstractContextManager[Restart]:
    """diffusers' TaylorSeer (Liu et al. 2025, arXiv 2503.06923) on the modules whose names match ``blocks``.

    warmup: full steps before it starts, diffusers' default; see ``taylorseer_computes``. Its own patterns match no module of
    DiTTransformer2DModel, nor of UNets.
    """
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        disable_cache_before_step=warmup,
        taylor_factors_dtype=dtype,
        cache_identifiers=[blocks],
    )
    return _hooks(denoiser, apply_taylorseer_cache, config, "taylorseer_cache")


def taylorseer_computes(step: int, interval: int, warmup: int = 3) -> bool:
    """Whether that hook computes at a step: it counts its interval from the second step after the warm-up."""
    return step < warmup or (step - warmup - 1) % interval == 0


def taylorseer(case: Case, setting: Setting) -> AbstractContextManager[Restart]:
    """TaylorSeer's hook, order 1, from the second step on. setting: the interval."""
    return taylorseer_hook(case.denoiser, BLOCKS[case.name], int(setting), order=1, warmup=1, dtype=case.start.dtype)


def first_block_cache(case: Case, setting: Setting) -> AbstractContextManager[Restart]:
    """diffusers' FirstBlockCache (after ParaAttention). setting: the threshold on the first block's change."""
    config = FirstBlockCacheConfig(threshold=float(setting))
    return _hooks(case.denoiser, apply_first_block_cache, config, "fbc_leader_block_hook", "fbc_block_hook")


def mag_cache(case: Case, setting: Setting) -> AbstractContextManager[Restart]:
    """diffusers' MagCache (Ma et al. 2025, arXiv 2506.09045), its ratios calibrated on this run. setting: the threshold."""
    config = MagCacheConfig(
        threshold=float(setting), num_inference_steps=case.steps, mag_ratios=_magnitudes(case), retention_ratio=0.1
    )
    return _hooks(case.denoiser, apply_mag_cache, config, "mag_cache_leader_block_hook", "mag_cache_block_hook")


@cache
def _magnitudes(case: Case) -> list[float]:
    """What MagCache's calibration prints for a run of the original."""
    config = MagCacheConfig(calibrate=True, num_inference_steps=case.steps)
    names = ("mag_cache_leader_block_hook", "mag_cache_block_hook")
    with contextlib.redirect_stdout(io.StringIO()) as printed, _hooks(case.denoiser, apply_mag_cache, config, *names):
        run(case, case.denoiser)
    return [float(ratio) for ratio in printed.getvalue().split("[")[-1].split("]")[0].split(",")]


def pyramid(case: Case, setting: Setting) -> AbstractContextManager[Restart]:
    """diffusers' Pyramid Attention Broadcast (Zhao et al. 2024, arXiv 2408.12588): attention alone. setting: the interval."""
    everywhere = (-1, 10**6)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=int(setting),
        cross_attention_block_skip_range=int(setting),
        spatial_attention_timestep_skip_range=everywhere,
        cross_attention_timestep_skip_range=everywhere,
        current_timestep_callback=lambda: 0,
    )
    return _hooks(case.denoiser, apply_pyramid_attention_broadcast, config, "pyramid_attention_broadcast")


@dataclass(frozen=True)
class Rival:
    """A cache. module: what must be installed. denoisers: of ``cases.BATCH``, those it knows.

    settings: for so many steps those to choose from, None for a threshold. wraps: denoiser -> the modules around which it puts
    its cache.
    """

    label: str
    module: str
    denoisers: tuple[str, ...]
    install: Callable[[Case, Setting], AbstractContextManager[Restart]]
    settings: Callable[[int], Sequence[Setting]] | None
    wraps: Mapping[str, str]

    @property
    def missing(self) -> bool:
        return find_spec(self.module) is None


def _intervals(steps: int) -> Sequence[Setting]:
    return range(2, 6)


def _full_steps(steps: int) -> Sequence[Setting]:
    return range(1, steps + 1)


_TRANSFORMERS = ("dit", "flux")
_WHOLE = dict.fromkeys(_TRANSFORMERS, r"(single_)?transformer_blocks\.\d+")
RIVALS = {
    "deepcache": Rival("DeepCache package", "DeepCache", ("unet", "sd"), deepcache, _intervals, BLOCKS),
    "smoothcache": Rival("SmoothCache", "SmoothCache", ("dit", "sd", "flux"), smoothcache, _full_steps, BLOCKS),
    "cache-dit static": Rival(
        "cache-dit, steps mask", "cache_dit", _TRANSFORMERS, partial(cache_dit, static=True), _full_steps, _WHOLE
    ),
    "cache-dit": Rival("cache-dit, dynamic", "cache_dit", _TRANSFORMERS, partial(cache_dit, static=False), None, _WHOLE),
    "taylorseer": Rival("TaylorSeer hook, order 1", "diffusers", ("dit", "unet", "sd", "flux"), taylorseer, _intervals, BLOCKS),
    "fbc": Rival("FirstBlockCache hook", "diffusers", _TRANSFORMERS, first_block_cache, None, _WHOLE),
    "magcache": Rival("MagCache hook", "diffusers", _TRANSFORMERS, mag_cache, None, _WHOLE),
    # It reuses attention only, and so cannot be tuned to the others' share.
    "pab": Rival("PAB hook", "diffusers", ("dit", "sd", "flux"), pyramid, lambda steps: (2,), BLOCKS),
}
