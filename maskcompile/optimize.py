"""``optimize``: a denoiser, or a pipeline with one, and a mask in, a faster one out."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import torch
from torch import nn

from maskcompile.artefacts import load_artefacts
from maskcompile.captures import load_captures
from maskcompile.compile import WITHOUT_CUDA_GRAPHS, Backend, load_regions, records
from maskcompile.mask import Mask
from maskcompile.runtime import CudaGraphs, OptimizedDenoiser
from maskcompile.signature import check_runnable

#: Where a pipeline holds its denoisers. Of two experts (Wan 2.2) each has steps of its own.
DENOISERS = ("transformer", "unet", "transformer_2")

_Pipeline = TypeVar("_Pipeline")


@overload
def optimize(
    model: nn.Module,
    mask: Mask,
    *,
    backend: Backend = ...,
    timestep: str | None = ...,
    regions: bool | None = ...,
    max_graphs: int | None = ...,
    dynamic: bool | None = ...,
    max_captures: int = ...,
    compiled: str | os.PathLike[str] | None = ...,
    cuda_graphs: CudaGraphs = ...,
    **compile_options: Any,
) -> OptimizedDenoiser: ...


@overload
def optimize(
    model: _Pipeline,
    mask: Mask | Mapping[str, Mask],
    *,
    backend: Backend = ...,
    timestep: str | None = ...,
    regions: bool | None = ...,
    max_graphs: int | None = ...,
    dynamic: bool | None = ...,
    max_captures: int = ...,
    compiled: str | os.PathLike[str] | None = ...,
    cuda_graphs: CudaGraphs = ...,
    **compile_options: Any,
) -> _Pipeline: ...


def optimize(
    model: Any,
    mask: Mask | Mapping[str, Mask],
    *,
    backend: Backend = "inductor",
    timestep: str | None = None,
    regions: bool | None = None,
    max_graphs: int | None = None,
    dynamic: bool | None = None,
    max_captures: int = 8,
    compiled: str | os.PathLike[str] | None = None,
    cuda_graphs: CudaGraphs = "auto",
    **compile_options: Any,
) -> Any:
    """A drop-in for ``model`` that reuses block outputs as ``mask`` says: ``pipe.unet = optimize(pipe.unet, mask)``.

    Given a pipeline, it puts such drop-ins in the place of ``pipe.transformer`` or ``pipe.unet`` and returns that pipeline, the
    same object; ``pipe.unet = pipe.unet.original`` undoes it. Where a pipeline has two experts (Wan 2.2's ``transformer_2``),
    both follow the mask, each with its own cache: the second one computes everything at the first of its steps. A dictionary
    from names of components to masks optimises those, each with its own. ``pipe.save_pretrained`` saves the originals.

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
    max_captures: how many input signatures (sizes, batches, keywords) are kept captured; those used least recently go first.
    compiled: a file of ``fast.save_compiled(path)``, from which captures and regions are taken instead of being made. It
    holds code: load only what you trust. One that was made elsewhere (torch, processor, GPU), or is no such file, is left aside
    with a warning.
    cuda_graphs: record every graph of a run as a CUDA graph, whose replay is one launch, with inputs and cache in memory of
    their own. "auto": where all inputs are on one CUDA device and the backend is not "eager" or "cudagraphs". False leaves them
    to the modes of Inductor that record its own, whose results are copied at every step. A graph that was never executed is
    executed first and recorded the next time. A call that fails ends its run: the next one starts over.
    compile_options: passed to torch.compile (mode, options).

    Raises MaskError for a mask that does not fit, ValueError for a model in train mode, with a cache of diffusers, or already
    optimised, and for regions with CUDA graphs of Inductor's own, TypeError for options that torch.compile does not have. A
    model that cannot be captured, or that has offloading hooks, is not compiled: its blocks are skipped module by module, which
    a warning and the report say. (Optimise a pipeline before ``enable_model_cpu_offload``, whose hook then sits outside and
    changes nothing.)
    """
    options: dict[str, Any] = {
        "backend": backend, "timestep": timestep, "regions": regions, "max_graphs": max_graphs, "max_captures": max_captures,
        "dynamic": dynamic, "compiled": compiled, "cuda_graphs": cuda_graphs,
        **compile_options,
    }  # fmt: skip
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), Mapping):
        masks = mask if isinstance(mask, Mapping) else dict.fromkeys(_denoisers(model), mask)
        for name, fast in {name: optimize(_component(model, name), one, **options) for name, one in masks.items()}.items():
            setattr(model, name, fast)
        return model
    if isinstance(model, OptimizedDenoiser):
        raise ValueError("this denoiser is already optimised; use fast.set_mask(mask), or optimize(fast.original, mask).")
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a denoiser (nn.Module), or a pipeline with one; got {type(model).__name__}.")
    if not isinstance(mask, Mask):
        raise TypeError(f"optimize takes a Mask; got {type(mask).__name__}. Mask.load(path) reads a file.")
    unknown = set(compile_options) - set(inspect.signature(torch.compile).parameters)
    if unknown:
        raise TypeError(f"torch.compile has no option {sorted(unknown)[0]!r}.")
    if backend == "eager" and compile_options:
        raise ValueError(f"backend 'eager' compiles nothing; leave out {sorted(compile_options)[0]!r}.")
    check_runnable(model)
    if max_graphs is not None and max_graphs < 1:
        raise ValueError(f"a run needs at least one graph; got max_graphs={max_graphs}.")
    if max_captures < 1:
        raise ValueError(f"at least one capture has to be kept; got max_captures={max_captures}.")
    if cuda_graphs not in (True, False, "auto"):
        raise ValueError(f"cuda_graphs is True, False or 'auto'; got {cuda_graphs!r}.")
    if cuda_graphs == "auto" and backend in ("eager", "cudagraphs"):
        cuda_graphs = False
    mode = compile_options.get("mode")
    if cuda_graphs and mode in WITHOUT_CUDA_GRAPHS:
        compile_options["mode"] = WITHOUT_CUDA_GRAPHS[mode]
    asked = compile_options.get("options") or {}
    if cuda_graphs and asked.get("triton.cudagraphs"):
        compile_options["options"] = {**asked, "triton.cudagraphs": False}
    theirs = records(backend, compile_options)
    if regions and theirs:
        raise ValueError("regions cannot be CUDA graphs of torch's own; leave out regions=True, or cuda_graphs=False.")
    if regions is None:
        regions = backend != "eager" and not theirs
    fast = OptimizedDenoiser(
        model,
        mask,
        backend=backend,
        timestep=timestep,
        regions=regions,
        max_graphs=max_graphs,
        cuda_graphs=cuda_graphs,
        dynamic=dynamic,
        max_captures=max_captures,
        options=compile_options,
    )
    if compiled is not None:  # code, and therefore only once all else is right
        captures, compiled_regions = load_artefacts(compiled)
        load_captures(captures)
        load_regions(compiled_regions)
    return fast


def _denoisers(pipe: Any) -> list[str]:
    """The names of a pipeline's denoisers."""
    found = [name for name in DENOISERS if isinstance(pipe.components.get(name), nn.Module)]
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has none of the components {', '.join(DENOISERS)}; pass a dictionary from the name of its "
            "denoiser to the mask."
        )
    return found


def _component(pipe: Any, name: str) -> nn.Module:
    model = pipe.components.get(name)
    if not isinstance(model, nn.Module):
        modules = [other for other, value in pipe.components.items() if isinstance(value, nn.Module)]
        raise ValueError(f"{type(pipe).__name__} has no denoiser {name!r}; its modules are {', '.join(modules)}.")
    return model
