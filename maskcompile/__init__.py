"""maskcompile: a compiler for per-timestep block masks. ``fast = maskcompile.optimize(model, mask)``.

A sampling run calls one denoiser many times, and between neighbouring steps most blocks return nearly the same tensor. A mask
says for each step and block whether to compute it or to reuse its last outputs, held or extrapolated. maskcompile captures
the denoiser as a torch.fx graph and emits one static graph for each distinct row of the mask, in which reused blocks no longer
exist.
"""

import passes

if getattr(passes, "OWNER", None) != "maskcompile":
    raise ImportError(
        f"maskcompile needs its own package 'passes', but Python found {passes.__file__!r} first; "
        "rename that module or move it off sys.path."
    )

from maskcompile import schedules
from maskcompile._version import __version__
from maskcompile.accounting import Cost, cost, count_macs, rectify
from maskcompile.fallback import block_names
from maskcompile.learn import Search, fit_reach, learn
from maskcompile.learning.scores import Paper
from maskcompile.mask import Mask, MaskError
from maskcompile.optimize import optimize
from maskcompile.program import Program, trace
from maskcompile.report import Report
from maskcompile.runtime import OptimizedDenoiser
from maskcompile.schedulers import log_snr
from passes.blocks import Block
from passes.capture import CaptureError

__all__ = [
    "Block",
    "CaptureError",
    "Cost",
    "Mask",
    "MaskError",
    "OptimizedDenoiser",
    "Paper",
    "Program",
    "Report",
    "Search",
    "__version__",
    "block_names",
    "cost",
    "count_macs",
    "fit_reach",
    "learn",
    "log_snr",
    "optimize",
    "rectify",
    "schedules",
    "trace",
]
