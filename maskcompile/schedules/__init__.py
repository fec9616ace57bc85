"""Published static schedules, as masks.

Common arguments: program, the denoiser as ``maskcompile.trace`` found it. timesteps, the values with which the denoiser is
called, in sampling order. warmup: how many steps at the start of a run compute everything; intervals are counted from the last
of them. The published schedules say 1; TaylorSeer (Liu et al. 2025, arXiv 2503.06923) begins with three full steps, and
*linear* gains the most from it, since it extrapolates from the first steps. reuse, log_snr: see ``Mask``; as published, all
hold.

All raise MaskError where a schedule does not fit the denoiser or the number of steps.
"""

from maskcompile.schedules.block_caching import block_caching
from maskcompile.schedules.changes import Changes, measure_changes
from maskcompile.schedules.deepcache import deepcache
from maskcompile.schedules.delta_dit import delta_dit
from maskcompile.schedules.l2c import l2c
from maskcompile.schedules.pab import pab
from maskcompile.schedules.smoothcache import smoothcache, smoothcache_file
from maskcompile.schedules.tgate import tgate
from maskcompile.schedules.uniform import uniform

__all__ = [
    "Changes",
    "block_caching",
    "deepcache",
    "delta_dit",
    "l2c",
    "measure_changes",
    "pab",
    "smoothcache",
    "smoothcache_file",
    "tgate",
    "uniform",
]
