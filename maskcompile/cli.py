"""The command line: ``maskcompile learn``, ``maskcompile show``, ``maskcompile inspect``."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskcompile.learn import Search, learn
from maskcompile.learning.scores import Paper
from maskcompile.mask import Mask
from maskcompile.program import trace
from maskcompile.schedulers import log_snr


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors that the user can mend are one line on stderr."""
    parser = argparse.ArgumentParser(prog="maskcompile", description="Per-timestep block masks for pretrained denoisers.")
    commands = parser.add_subparsers(dest="command", required=True)
    learning = commands.add_parser("learn", help="learn a mask for a denoiser or a pipeline in a from_pretrained folder")
    learning.add_argument("folder", type=Path)
    learning.add_argument("mask", type=Path, help="the file to write")
    learning.add_argument("--budget", type=float, required=True, help="share of the MACs to keep")
    learning.add_argument("--steps", type=int, default=50)
    learning.add_argument("--batch", type=int, default=4, help="samples in a pass, for a denoiser folder")
    learning.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    learning.add_argument("--method", choices=("search", "paper"), default="search")
    learning.add_argument("--passes", type=float, help="work of the search, in sampling passes")
    learning.add_argument("--reuse", choices=("auto", "hold", "linear"), default="auto")
    learning.add_argument("--call", type=json.loads, default={}, help="further arguments of the pipeline, or inputs, as JSON")
    learning.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    learning.add_argument("--device", default=_device())
    learning.add_argument("--checkpoint", type=Path, help="go on from here when interrupted (default: beside the mask)")
    showing = commands.add_parser("show", help="print a mask, and draw it with --png")
    showing.add_argument("mask", type=Path)
    showing.add_argument("--png", type=Path)
    inspecting = commands.add_parser("inspect", help="print the blocks of a denoiser, and draw their graph with --png")
    inspecting.add_argument("folder", type=Path)
    inspecting.add_argument("--batch", type=int, default=1)
    inspecting.add_argument("--call", type=json.loads, default={}, help="further inputs, as JSON")
    inspecting.add_argument("--png", type=Path)
    options = parser.parse_args(arguments)
    try:
        {"learn": _learn, "show": _show, "inspect": _inspect}[options.command](options)
    except (ValueError, TypeError, RuntimeError, OSError, FloatingPointError, ImportError) as error:
        print(f"maskcompile {options.command}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


def _device() -> str:
    """The GPU of this process where there are several, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _show(options: argparse.Namespace) -> None:
    mask = Mask.load(options.mask)
    print(mask)
    for name, value in mask.provenance.items():
        print(f"{name}: {value}")
    if options.png:
        from maskcompile.draw import mask_heat_map

        mask_heat_map(mask, options.png)


def _inspect(options: argparse.Namespace) -> None:
    denoiser = _denoiser(options.folder, torch.float32, "cpu")
    kwargs = _inputs(denoiser, options.batch, options.call)
    program = trace(denoiser, **kwargs)
    print(program)
    if options.png:
        from maskcompile.draw import block_graph

        block_graph(program, options.png)


def _learn(options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype)
    method: Any = Paper() if options.method == "paper" else Search(**({"passes": options.passes} if options.passes else {}))
    of = _pipeline if (options.folder / "model_index.json").exists() else _loop
    model, scheduler, sample = of(options, dtype)
    sample(options.seeds[0])  # after which a pipeline's scheduler has the timesteps of its runs
    try:
        snr = log_snr(scheduler)
    except ValueError as unknown:
        snr = None
        print(f"distances are counted in steps: {unknown}", file=sys.stderr)
    mask = learn(
        model, sample, options.budget, method=method, reuse=options.reuse, log_snr=snr, seeds=options.seeds,
        checkpoint=options.checkpoint or options.mask.with_suffix(".checkpoint"),
    )  # fmt: skip
    if os.environ.get("RANK", "0") != "0":
        return
    mask.save(options.mask)
    if options.checkpoint is None:
        options.mask.with_suffix(".checkpoint").unlink(missing_ok=True)
    print(f"{mask!r}, {mask.provenance['share']:.1%} of the MACs: {options.mask}")


def _pipeline(options: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, Any, Callable[[int], Any]]:
    """(denoiser, scheduler, sample) of a pipeline's folder."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(options.folder, torch_dtype=dtype, local_files_only=True).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"the pipeline in {options.folder} ({type(pipe).__name__}) has neither a transformer nor a unet.")

    def sample(seed: int) -> Any:
        generator = torch.Generator(options.device).manual_seed(seed)
        return pipe(num_inference_steps=options.steps, generator=generator, **{"output_type": "np", **options.call})

    return model, pipe.scheduler, sample


def _loop(options: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, Any, Callable[[int], Any]]:
    """(denoiser, scheduler, sample) of a denoiser's folder, with the scheduler in its ``scheduler`` folder, or DDIM."""
    from diffusers import DDIMScheduler

    model = _denoiser(options.folder, dtype, options.device)
    own = options.folder / "scheduler"
    scheduler: Any = DDIMScheduler.from_pretrained(own) if own.exists() else DDIMScheduler()
    scheduler.set_timesteps(options.steps)

    @torch.no_grad()
    def sample(seed: int) -> Tensor:
        kwargs = _inputs(model, options.batch, options.call, seed)
        first = next(iter(kwargs))
        x: Tensor = kwargs[first] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            given = {**kwargs, first: scheduler.scale_model_input(x, t), "timestep": t.to(x.device).expand(len(x))}
            predicted: Tensor = model(**given, return_dict=False)[0]
            x = scheduler.step(predicted[:, : x.shape[1]], t, x).prev_sample
        return x

    return model, scheduler, sample


def _denoiser(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    import diffusers

    if not (folder / "config.json").exists():
        inner = [name for name in ("transformer", "unet") if (folder / name / "config.json").exists()]
        if not inner:
            raise ValueError(f"{folder} holds no denoiser: no config.json, and no transformer or unet folder.")
        folder = folder / inner[0]
    name = json.loads((folder / "config.json").read_text()).get("_class_name", "")
    kind = getattr(diffusers, str(name), None)
    if kind is None or not issubclass(kind, nn.Module):
        raise ValueError(f"{folder / 'config.json'} names the class {name!r}, which diffusers does not have as a denoiser.")
    model: nn.Module = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device).eval()
    return model


def _inputs(model: nn.Module, batch: int, call: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Noise of the shape that the denoiser's configuration names, a timestep, and what ``call`` adds; lists become tensors."""
    config: Any = model.config
    parameter = next(model.parameters())
    try:
        size, channels = config["sample_size"], config["in_channels"]
    except KeyError as missing:
        raise ValueError(f"the configuration of {type(model).__name__} has no {missing}; use a pipeline's folder.") from None
    shape = (batch, channels, *((size, size) if isinstance(size, int) else size))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(parameter)
    first = next(iter(inspect.signature(model.forward).parameters))
    given = {k: torch.tensor(v, device=parameter.device) if isinstance(v, list) else v for k, v in call.items()}
    if "encoder_hidden_states" not in given and isinstance(width := config.get("cross_attention_dim"), int):
        given["encoder_hidden_states"] = torch.randn((batch, 8, width), generator=torch.Generator().manual_seed(seed)).to(
            parameter
        )
    if "class_labels" not in given and config.get("num_embeds_ada_norm"):  # a class-conditional DiT
        given["class_labels"] = torch.arange(batch, device=parameter.device) % config["num_embeds_ada_norm"]
    timestep = torch.full((batch,), 500, device=parameter.device)
    return {first: noise, "timestep": timestep, **given}


if __name__ == "__main__":
    sys.exit(main())
