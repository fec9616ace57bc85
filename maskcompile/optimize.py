"""``optimize``: a denoiser and a mask in, a faster denoiser out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from maskcompile.compile import Backend
from maskcompile.mask import Mask
from maskcompile.runtime import OptimizedDenoiser
from maskcompile.signature import check_capturable


def optimize(
    model: nn.Module,
    mask: Mask,
    *,
    backend: Backend = "inductor",
    timestep: str | None = None,
    regions: bool | None = None,
    **compile_options: Any,
) -> OptimizedDenoiser:
    """A drop-in for ``model`` that reuses block outputs as ``mask`` says: ``pipe.unet = optimize(pipe.unet, mask)``.

    Captures at the first call, once per input signature, and compiles each distinct graph once, when it is first needed or in
    ``.warmup(*example_inputs)``. The model itself is not changed, and its weights are shared, not copied.

    backend: "inductor", "eager" (the fx graphs as they are), or any backend of torch.compile.
    timestep: the name of the forward parameter that carries the timestep, where it is not a usual one.
    regions: compile the regions of the denoiser (see ``passes.regions``), each once, and put every graph together from them;
    or, where False, each graph as a whole. The default is True, but for the backend "eager".
    compile_options: passed to torch.compile (mode, options, dynamic).

    Raises MaskError for a mask that does not fit, ValueError for a model in train mode, with offloading hooks, or already
    optimised, TypeError for options that torch.compile does not have. At the first call CaptureError where the model cannot be
    captured.
    """
    if isinstance(model, OptimizedDenoiser):
        raise ValueError("this denoiser is already optimised; use fast.set_mask(mask), or optimize(fast.original, mask).")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize takes a denoiser (nn.Module); got {type(model).__name__}. For a pipeline, pass its unet or transformer."
        )
    unknown = set(compile_options) - set(inspect.signature(torch.compile).parameters)
    if unknown:
        raise TypeError(f"torch.compile has no option {sorted(unknown)[0]!r}.")
    if backend == "eager" and compile_options:
        raise ValueError(f"backend 'eager' compiles nothing; leave out {sorted(compile_options)[0]!r}.")
    check_capturable(model)
    regions = backend != "eager" if regions is None else regions
    return OptimizedDenoiser(model, mask, backend=backend, timestep=timestep, regions=regions, options=compile_options)
