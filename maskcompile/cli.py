"""The command line: ``maskcompile learn``, ``maskcompile show``, ``maskcompile inspect``."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskcompile.learn import Search, learn
from maskcompile.learning.recording import record, replaced_forward
from maskcompile.learning.scores import Paper
from maskcompile.mask import Mask
from maskcompile.program import Program, trace
from maskcompile.schedulers import log_snr
from passes.capture import CaptureError

#: Where a configuration says how wide the text embeddings are that the denoiser is given, before any projection of its own.
_TEXT_WIDTHS = (
    "caption_channels",
    "joint_attention_dim",
    "text_dim",
    "text_embed_dim",
    "encoder_hid_dim",
    "cross_attention_dim",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors that the user can mend are one line on stderr."""
    parser = argparse.ArgumentParser(prog="maskcompile", description="Per-timestep block masks for pretrained denoisers.")
    commands = parser.add_subparsers(dest="command", required=True)
    learning = commands.add_parser("learn", help="learn a mask for a denoiser or a pipeline in a from_pretrained folder")
    learning.add_argument("folder", type=Path)
    learning.add_argument("mask", type=Path, help="the file to write")
    learning.add_argument("--budget", type=float, required=True, help="share of the MACs to keep")
    learning.add_argument("--steps", type=_positive, default=50)
    learning.add_argument("--batch", type=_positive, default=4, help="samples in a pass, for a denoiser folder")
    learning.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    learning.add_argument("--method", choices=("search", "paper"), default="search")
    learning.add_argument("--passes", type=float, help="work of the search, in sampling passes")
    learning.add_argument("--reuse", choices=("auto", "hold", "linear"), default="auto")
    learning.add_argument("--call", type=_object, default={}, help="further arguments of the pipeline, or inputs, as JSON")
    learning.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    learning.add_argument("--device", default=_device())
    learning.add_argument("--checkpoint", type=Path, help="go on from here when interrupted (default: beside the mask)")
    showing = commands.add_parser("show", help="print a mask, and draw it with --png")
    showing.add_argument("mask", type=Path)
    showing.add_argument("--png", type=Path)
    inspecting = commands.add_parser("inspect", help="print the blocks of a denoiser, and draw their graph with --png")
    inspecting.add_argument("folder", type=Path)
    inspecting.add_argument("--batch", type=_positive, default=1, help="of the inputs, for a denoiser folder")
    inspecting.add_argument("--call", type=_object, default={}, help="further arguments of the pipeline, or inputs, as JSON")
    inspecting.add_argument("--png", type=Path)
    options = parser.parse_args(arguments)
    try:
        {"learn": _learn, "show": _show, "inspect": _inspect}[options.command](options)
    except (ValueError, TypeError, RuntimeError, OSError, FloatingPointError, ImportError) as error:
        print(f"maskcompile {options.command}: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = _checkpoint(options) if options.command == "learn" else None
        onwards = f"; the same command goes on from {kept}" if kept is not None and kept.exists() else ""
        print(f"\nmaskcompile {options.command}: interrupted{onwards}.", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is wanted; got {text!r}.")
    return int(text)


def _object(text: str) -> dict[str, Any]:
    """An argument that names further arguments."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""a JSON object is wanted, like '{{"prompt": "a lighthouse"}}'; got {text!r}.""")
    return value


def _sentence(error: BaseException) -> str:
    """The first line of what an exception says, or what it is where it says nothing.

    What a pipeline cannot be called with, Python says after the pipeline's configuration, of many lines.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].removeprefix("} ") if lines[0].endswith("{") else lines[0]


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
    program = _program(options)
    print(program)
    if options.png:
        from maskcompile.draw import block_graph

        block_graph(program, options.png)


def _program(options: argparse.Namespace) -> Program:
    """The denoiser captured as its pipeline calls it, or with inputs made up where no pipeline can be called."""
    folder, model = options.folder, None
    if not _is_pipeline(folder):
        return _captured(_denoiser(folder, torch.float32, "cpu"), options)
    try:
        with _explained(f"the pipeline in {folder} could not be called"):
            pipe, model = _pipeline(folder, torch.float32, "cpu")
            args, kwargs = _first_call(pipe, model, options.call)
    except ValueError as unusable:  # no text encoder on disk, no prompt: the blocks can be shown all the same
        try:
            program = _captured(model or _denoiser(folder, torch.float32, "cpu"), options)
        except Exception:
            raise unusable from None
        print(f"{unusable} The inputs shown are made up.", file=sys.stderr)
        return program
    return trace(model, *args, **kwargs)


def _captured(model: nn.Module, options: argparse.Namespace) -> Program:
    """A denoiser captured with inputs made up."""
    kwargs = _inputs(model, options.batch, options.call)
    with _explained(f"{type(model).__name__} could not be called with {', '.join(kwargs)}", "its pipeline's folder would do"):
        return trace(model, **kwargs)


class _Reached(Exception):
    """Ends a pipeline's run where it has come to the denoiser."""


def _first_call(pipe: Any, model: nn.Module, call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a pipeline first calls its denoiser with, which is not executed."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def reached(*args: Any, **kwargs: Any) -> Any:
        found.append((args, kwargs))
        raise _Reached

    given = _tensors(call, model, 2)
    prompted = any(name.startswith("prompt") for name in given) or getattr(pipe, "text_encoder", None) is None
    if not prompted and "prompt" in inspect.signature(pipe.__call__).parameters:
        given["prompt"] = ""  # whose embeddings are as large as those of any other
    with replaced_forward(model, reached):
        try:
            pipe(**given)
        except _Reached:
            return found[0]
    raise ValueError(f"{type(pipe).__name__} never called its {type(model).__name__}")


@contextmanager
def _explained(what: str, otherwise: str = "") -> Iterator[None]:
    """Whatever a model or a pipeline raises on arguments that do not suit it, as one sentence."""
    try:
        yield
    except (CaptureError, torch.OutOfMemoryError, FloatingPointError):  # of which the arguments are not to blame
        raise
    except Exception as error:
        hint = """what it is called with can be given by --call '{"name": value}'""" + (
            f", or {otherwise}" if otherwise else ""
        )
        raise ValueError(f"{what}: {_sentence(error).rstrip('.')}; {hint}.") from error


def _learn(options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype)
    if options.method == "paper" and options.passes is not None:
        raise ValueError("--passes is the work of the search; the paper's method has none such.")
    method: Any = Paper() if options.method == "paper" else Search() if options.passes is None else Search(options.passes)
    if options.mask.is_dir() or not options.mask.parent.is_dir():
        raise ValueError(f"the mask cannot be written to {options.mask}: it names a file in a folder that there is.")
    of = _runs if _is_pipeline(options.folder) else _loop
    model, scheduler, sample = of(options, dtype)
    with _explained(f"{options.folder} could not be sampled from"):
        timesteps = record(model, sample, options.seeds[0]).timesteps
    snr = _log_snr(scheduler(), timesteps)
    mask = learn(
        model, sample, options.budget, method=method, reuse=options.reuse, log_snr=snr, seeds=options.seeds,
        checkpoint=_checkpoint(options),
    )  # fmt: skip
    if os.environ.get("RANK", "0") != "0":
        return
    mask.save(options.mask)
    if options.checkpoint is None:
        _checkpoint(options).unlink(missing_ok=True)
    print(f"{mask!r}, {mask.provenance['share']:.1%} of the MACs: {options.mask}")


def _checkpoint(options: argparse.Namespace) -> Path:
    found: Path = options.checkpoint or options.mask.with_name(f"{options.mask.name}.checkpoint")
    return found


def _log_snr(scheduler: Any, timesteps: Sequence[float]) -> tuple[float, ...] | None:
    """At the timesteps of a run, which may leave out some of the scheduler's; None, and a word why, where it is not known."""
    if scheduler is None:
        print("distances are counted in steps: the pipeline has no scheduler by that name.", file=sys.stderr)
        return None
    own = dict.fromkeys(torch.as_tensor(scheduler.timesteps).tolist())
    try:  # as many are all of them, also where the denoiser is called with other values than the scheduler's
        values = log_snr(scheduler, None if len(own) == len(timesteps) else timesteps)
    except ValueError as unknown:
        print(f"distances are counted in steps: {_sentence(unknown).split(';')[0]}.", file=sys.stderr)
        return None
    rises = np.diff(values) > 0
    if (rises.any() and not rises.all()) or 0 in np.diff(values):
        print(f"distances are counted in steps: the log-SNR of {type(scheduler).__name__} goes up and down.", file=sys.stderr)
        return None
    return values


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").exists()


def _pipeline(folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, nn.Module]:
    """A pipeline and its denoiser."""
    from diffusers import DiffusionPipeline

    index = _configuration(folder / "model_index.json")
    # What was saved as missing (text encoders, say, where embeddings are given) would be asked for.
    missing: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **missing).to(device)
    except AttributeError as error:  # for a class that this diffusers does not have
        raise ValueError(f"the pipeline in {folder} cannot be loaded: {_sentence(error)}.") from error
    pipe.set_progress_bar_config(disable=True)
    model = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"the pipeline in {folder} ({type(pipe).__name__}) has neither a transformer nor a unet.")
    return pipe, model


def _runs(options: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Any], Callable[[int], Any]]:
    """(denoiser, the scheduler as the last run left it, sample) of a pipeline's folder."""
    pipe, model = _pipeline(options.folder, dtype, options.device)
    given = {"num_inference_steps": options.steps, "output_type": "np", **_tensors(options.call, model, 2)}

    def sample(seed: int) -> Any:
        return pipe(generator=torch.Generator(options.device).manual_seed(seed), **given)

    return model, lambda: getattr(pipe, "scheduler", None), sample


def _loop(options: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Any], Callable[[int], Any]]:
    """(denoiser, its scheduler, sample) of a denoiser's folder."""
    model = _denoiser(options.folder, dtype, options.device)
    scheduler = _scheduler(options.folder)

    @torch.no_grad()
    def sample(seed: int) -> Tensor:
        kwargs = _inputs(model, options.batch, options.call, seed)
        first = next(iter(inspect.signature(model.forward).parameters))
        scheduler.set_timesteps(options.steps)  # anew for every run: solvers remember the last one's steps
        x: Tensor = kwargs[first] * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(seed)  # for those that add noise
            for t in scheduler.timesteps:
                given = {**kwargs, first: scaled(x, t), "timestep": t.to(x.device).expand(len(x))}
                predicted: Tensor = model(**given, return_dict=False)[0]
                x = scheduler.step(predicted[:, : x.shape[1]], t, x).prev_sample
        return x

    return model, lambda: scheduler, sample


def _scheduler(folder: Path) -> Any:
    """The one in the folder's ``scheduler`` folder, of the class that its configuration names; DDIM where there is none."""
    import diffusers

    file = folder / "scheduler" / "scheduler_config.json"
    if not file.parent.exists():
        print(
            f"{folder} has no scheduler folder: it is sampled with diffusers' DDIMScheduler() as it is by default.",
            file=sys.stderr,
        )
        return diffusers.DDIMScheduler()
    return _class(file, diffusers.SchedulerMixin, "scheduler").from_pretrained(file.parent)


def _denoiser(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    if not (folder / "config.json").exists():
        inner = [name for name in ("transformer", "unet") if (folder / name / "config.json").exists()]
        if not inner:
            raise ValueError(f"{folder} holds no denoiser: no config.json, and no transformer or unet folder.")
        folder = folder / inner[0]
    kind = _class(folder / "config.json", nn.Module, "denoiser")
    model: nn.Module = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device).eval()
    return model


def _class(file: Path, base: type, what: str) -> Any:
    """The class of diffusers that a configuration names."""
    import diffusers

    name = _configuration(file).get("_class_name", "")
    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise ValueError(f"{file} names the class {name!r}, which this diffusers does not have as a {what}.")
    return kind


def _configuration(file: Path) -> dict[str, Any]:
    """A file of names and values."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not a whole JSON file ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no configuration: it does not hold a JSON object.")
    return found


def _inputs(model: nn.Module, batch: int, call: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Noise of the shape that the denoiser's configuration names, a timestep, what else its forward takes that the
    configuration tells the size of, and what ``call`` says; lists become tensors."""
    config: Any = model.config
    kind, parameters = type(model).__name__, inspect.signature(model.forward).parameters
    parameter = next(model.parameters())
    first = next(iter(parameters))
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if (unknown := [name for name in call if name not in parameters]) and not open_ended:
        raise ValueError(f"{kind} takes no {unknown[0]!r}, which --call names; it takes {', '.join(parameters)}.")

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(parameter)

    made = {"timestep": torch.full((batch,), 500, device=parameter.device)}
    if first not in call:
        made = {first: noise(batch, *_shape(model, first)), **made}
    if width := next((config[key] for key in _TEXT_WIDTHS if isinstance(config.get(key), int)), None):
        made["encoder_hidden_states"] = noise(batch, 8, width)
    if width := config.get("pooled_projection_dim"):
        made["pooled_projections"] = noise(batch, width)
    if classes := config.get("num_embeds_ada_norm") or config.get("num_class_embeds"):
        made["class_labels"] = torch.arange(batch, device=parameter.device) % classes
    return {**{name: value for name, value in made.items() if name in parameters}, **_tensors(call, model)}


def _shape(model: nn.Module, first: str) -> tuple[int, ...]:
    """Of one noisy sample."""
    config: Any = model.config
    for key in ("sample_size", "in_channels"):
        if config.get(key) is None:
            raise ValueError(
                f"the configuration of {type(model).__name__} has no {key!r}, so the shape of its {first} is not known; "
                f"use its pipeline's folder, or give {first} by --call."
            )
    size = config["sample_size"]
    return config["in_channels"], *((size, size) if isinstance(size, int) else size)


def _tensors(value: Any, model: nn.Module, nested: int = 1) -> Any:
    """What JSON says, with lists of numbers as tensors for ``model``: those within so many lists, for pipelines take flat
    ones as they are (class labels, timesteps)."""
    if isinstance(value, dict):
        return {name: _tensors(item, model, nested) for name, item in value.items()}
    if not isinstance(value, list) or not value:
        return value
    try:
        tensor = torch.tensor(value)
    except (ValueError, TypeError, RuntimeError):  # prompts, say
        return value
    if tensor.dim() < nested:
        return value
    like = next(model.parameters())
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


if __name__ == "__main__":
    sys.exit(main())
