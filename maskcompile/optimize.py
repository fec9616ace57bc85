"""``optimize``: a denoiser and a mask in, a faster denoiser out."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import nn

from maskcompile.compile import Backend, load_compiled
from maskcompile.mask import Mask
from maskcompile.runtime import CudaGraphs, OptimizedDenoiser
from maskcompile.signature import check_capturable

#: Modes of torch.compile with which Inductor records CUDA graphs of its own, and what they are without these.
WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def optimize(
    model: nn.Module,
    mask: Mask,
    *,
    backend: Backend = "inductor",
    timestep: str | None = None,
    regions: bool | None = None,
    max_graphs: int | None = None,
    dynamic: bool | None = None,
    compiled: str | os.PathLike[str] | None = None,
    cuda_graphs: CudaGraphs = "auto",
    **compile_options: Any,
) -> OptimizedDenoiser:
    """A drop-in for ``model`` that reuses block outputs as ``mask`` says: ``pipe.unet = optimize(pipe.unet, mask)``.

    Captures at the first call, once per input signature, and compiles each distinct graph once, when it is first needed or in
    ``.warmup(*example_inputs)``; a second batch size captures and compiles once more, for any batch from then on. The model
    itself is not changed, and its weights are shared, not copied.

    backend: "inductor", "eager" (the fx graphs as they are), or any backend of torch.compile.
    timestep: the name of the forward parameter that carries the timestep, where it is not a usual one.
    regions: compile the regions of the denoiser (see ``passes.regions``), each once, and put every graph together from them;
    or, where False, each graph as a whole. The default is True, but for the backend "eager" and modes with CUDA graphs of
    Inductor's own. A denoiser that passes anything but tensors between its operations is compiled as a whole.
    max_graphs: how many graphs a run may need. Rows of the mask are merged upwards until they need no more, so that some steps
    compute blocks that the mask would reuse; the report says what that costs. Runs that do not start at the first step of the
    mask may need others.
    dynamic: whether the batch, the first dimension of the inputs, may change without anything being captured and compiled anew:
    from the second batch size on (None), from the first (True), or never (False). A denoiser that does something else for each
    batch, or for one, is captured for that one alone, and the report says why.
    compiled: a file of ``fast.save_compiled(path)``, from which regions are taken instead of being compiled. It holds code:
    load only what you trust. One that was made elsewhere (torch, processor, GPU), or is no such file, is left aside with a
    warning.
    cuda_graphs: record every graph of a run as a CUDA graph, whose replay is one launch, with inputs and cache in memory of
    their own. "auto": where all inputs are on one CUDA device and the backend is not "eager". False leaves them to the modes
    of Inductor that record its own. A graph that was never executed is executed first and recorded the next time. A call that
    fails ends its run: the next one starts over.
    compile_options: passed to torch.compile (mode, options).

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
    if max_graphs is not None and max_graphs < 1:
        raise ValueError(f"a run needs at least one graph; got max_graphs={max_graphs}.")
    if compiled is not None:
        load_compiled(compiled)
    if cuda_graphs not in (True, False, "auto"):
        raise ValueError(f"cuda_graphs is True, False or 'auto'; got {cuda_graphs!r}.")
    if cuda_graphs == "auto" and backend == "eager":
        cuda_graphs = False
    mode = compile_options.get("mode")
    if cuda_graphs and mode in WITHOUT_CUDA_GRAPHS:
        compile_options["mode"] = WITHOUT_CUDA_GRAPHS[mode]
    if regions is None:  # the buffers of Inductor's own CUDA graphs are overwritten by the next replay, of any region
        regions = backend != "eager" and compile_options.get("mode") not in WITHOUT_CUDA_GRAPHS
    return OptimizedDenoiser(
        model,
        mask,
        backend=backend,
        timestep=timestep,
        regions=regions,
        max_graphs=max_graphs,
        cuda_graphs=cuda_graphs,
        dynamic=dynamic,
        options=compile_options,
    )
