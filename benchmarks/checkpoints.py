"""Samplers of the paper's rows, with real checkpoints on the user's disk: ``load``. Nothing is fetched.

Every sampler draws picture i from noise of its own (a generator seeded with i), of class i modulo their number, or by prompt i
modulo theirs: a picture does not depend on those drawn with it, nor on how work is divided.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import dit
from benchmarks.models import ROWS, Row, row_named
from benchmarks.reference import HERE
from benchmarks.reference import load as load_bundled
from benchmarks.reference.dataset import CLASSES
from benchmarks.sampling import task


@dataclass(frozen=True)
class Request:
    """What to load. weights: a folder (or, for DiT, the checkpoint in one). prompts: of text-to-image rows. heads: of
    ``benchmarks.dit.load``.
    """

    row: Row
    weights: Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    prompts: tuple[str, ...] = ()
    heads: int | None = None


@dataclass(frozen=True)
class Sampler:
    """draw: of a callable in the denoiser's place, indices of pictures, and whether to decode: float pictures [n, 3, S, S] in
    0..1 on the CPU, or what the scheduler came to. beside: what else has weights that its pictures depend on, by name.
    """

    row: Row
    denoiser: nn.Module
    scheduler: Any
    draw: Callable[[Any, Sequence[int], bool], Tensor]
    beside: Mapping[str, nn.Module | Tensor] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Samples in a denoiser call for one picture."""
        return 2 if self.row.guidance else 1


def load(request: Request) -> Sampler:
    """The row's sampler, in eval mode.

    Raises FileNotFoundError for what is missing in the folder, and ValueError for what is not what the row needs.
    """
    if not request.weights.exists():
        raise FileNotFoundError(f"no folder {request.weights}.")
    return LOADERS[request.row.name](request)


#: (denoiser, latents scaled for it, timestep, indices of the pictures) -> its prediction for each picture
Predict = Callable[[Any, Tensor, Tensor, Sequence[int]], Tensor]


def loop(request: Request, denoiser: nn.Module, scheduler: Any, shape: Sequence[int], predict: Predict, vae: Any) -> Sampler:
    """A sampler that runs the scheduler's steps. shape: of one picture's latents. vae: None where they are the picture."""
    row = request.row

    @torch.no_grad()
    def draw(called: Any, indices: Sequence[int], decode: bool) -> Tensor:
        generators = [torch.Generator().manual_seed(index) for index in indices]

        def noise() -> Tensor:
            return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(request.device, request.dtype)

        x = noise() * scheduler.init_noise_sigma
        scheduler.set_timesteps(row.steps, device=request.device)
        for t in scheduler.timesteps:
            predicted = predict(called, scheduler.scale_model_input(x, t), t, indices)
            drawn = {"eta": row.eta, "variance_noise": noise()} if row.eta else {}
            x = scheduler.step(predicted, t, x, return_dict=False, **drawn)[0]
        if not decode:
            return x
        if vae is not None:
            x = vae.decode(x / vae.config.scaling_factor, return_dict=False)[0]
        return (x / 2 + 0.5).clamp(0, 1).float().cpu()

    scheduler.set_timesteps(row.steps)
    return Sampler(row, denoiser, scheduler, draw, {} if vae is None else {"decoder": vae})


def unconditional(called: Any, x: Tensor, t: Tensor, indices: Sequence[int]) -> Tensor:
    """As DDIMPipeline and LDMPipeline call a UNet2DModel."""
    predicted: Tensor = called(x, t, return_dict=False)[0]
    return predicted


def classes_of(indices: Sequence[int], classes: int, device: torch.device) -> Tensor:
    """int64 [n], by the index of each picture."""
    return torch.tensor([index % classes for index in indices], device=device)


def ddpm(request: Request) -> Sampler:
    """A UNet2DModel in a DDPMPipeline's folder, or in one of its own."""
    unet = part(request, "unet", diffusers.UNet2DModel)
    scheduler = scheduler_of(request)
    size = unet.config.sample_size
    return loop(request, unet, scheduler, (unet.config.in_channels, size, size), unconditional, None)


def ldm(request: Request) -> Sampler:
    """An LDMPipeline's folder, or one of ``benchmarks.convert_ldm``: unet, vqvae (or vae) and scheduler."""
    unet = part(request, "unet", diffusers.UNet2DModel)
    size = unet.config.sample_size
    shape = (unet.config.in_channels, size, size)
    return loop(request, unet, scheduler_of(request), shape, unconditional, decoder(request))


def ldm_class(request: Request) -> Sampler:
    """unet, vqvae, scheduler, and class_embedder.safetensors: ``weight`` [classes + 1, width], the last row for no class."""
    unet, vae = part(request, "unet", diffusers.UNet2DConditionModel), decoder(request)
    path = request.weights / "class_embedder.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; {CONVERSION}.")
    return _guided_by_class(request, unet, vae, load_file(path)["weight"], scheduler_of(request))


CONVERSION = "python -m benchmarks.convert_ldm MODEL.CKPT FOLDER makes a folder of CompVis's checkpoint"


def _guided_by_class(request: Request, unet: Any, vae: Any, table: Tensor, scheduler: Any) -> Sampler:
    scale, size = request.row.guidance, unet.config.sample_size
    table = table.to(request.device, request.dtype)

    def predict(called: Any, x: Tensor, t: Tensor, indices: Sequence[int]) -> Tensor:
        wanted = classes_of(indices, len(table) - 1, x.device)
        if scale is None:
            return called(x, t, encoder_hidden_states=table[wanted][:, None], return_dict=False)[0]  # type: ignore[no-any-return]
        context = table[torch.cat([wanted, torch.full_like(wanted, len(table) - 1)])][:, None]
        both = called(torch.cat([x, x]), t, encoder_hidden_states=context, return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        guided: Tensor = unconditional + scale * (conditional - unconditional)
        return guided

    made = loop(request, unet, scheduler, (unet.config.in_channels, size, size), predict, vae)
    return replace(made, beside={**made.beside, "class embedder": table})


def dit_reference(request: Request) -> Sampler:
    """DiT's own checkpoint, ``FOLDER/*.pt`` or ``.safetensors``, and its decoder (sd-vae-ft-mse or -ema) in ``FOLDER/vae``."""
    folder = request.weights if request.weights.is_dir() else request.weights.parent
    found = [request.weights] if request.weights.is_file() else sorted(_checkpoints(folder))
    if len(found) != 1:
        named = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(
            f"{folder} must hold one DiT checkpoint (.pt or .safetensors) and has {named}; or name the file."
        )
    model = dit.load(found[0], request.heads).to(request.device, request.dtype)
    scale, channels = request.row.guidance, model.in_channels

    def predict(called: Any, x: Tensor, t: Tensor, indices: Sequence[int]) -> Tensor:
        y = classes_of(indices, model.num_classes, x.device)
        if scale is None:
            return called(x, t.expand(len(x)), y)[:, :channels]  # type: ignore[no-any-return]
        y = torch.cat([y, torch.full_like(y, model.num_classes)])
        return dit.guided(called(torch.cat([x, x]), t.expand(len(y)), y), scale)[: len(x), :channels]

    beside = replace(request, weights=folder)
    return loop(request, model, scheduler_of(beside), (channels, model.input_size, model.input_size), predict, decoder(beside))


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors")]


def text_to_image(request: Request) -> Sampler:
    """A PixArtAlphaPipeline's or StableDiffusionPipeline's folder, run as it is; the safety checker is left out."""
    row, folder = request.row, request.weights
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"{folder} holds no pipeline: no model_index.json.")
    if not request.prompts:
        raise ValueError(f"the row {row.name} needs prompts: give --prompts with a file of one a line.")
    named = json.loads((folder / "model_index.json").read_text())
    without = {"safety_checker": None} if "safety_checker" in named else {}
    options = {"torch_dtype": request.dtype, "local_files_only": True, **without}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options).to(request.device)
    pipe.set_progress_bar_config(disable=True)
    slot = "transformer" if row.name == "pixart" else "unet"
    denoiser = getattr(pipe, slot, None)
    if not isinstance(denoiser, nn.Module):
        raise ValueError(f"the pipeline in {folder} ({type(pipe).__name__}) has no {slot}, which the row {row.name} needs.")

    @torch.no_grad()
    def draw(called: Any, indices: Sequence[int], decode: bool) -> Tensor:
        setattr(pipe, slot, called)
        try:
            output: Tensor = pipe(
                prompt=[request.prompts[index % len(request.prompts)] for index in indices],
                generator=[torch.Generator().manual_seed(index) for index in indices],
                num_inference_steps=row.steps, guidance_scale=row.guidance or 1.0, output_type="pt" if decode else "latent",
            ).images  # fmt: skip
        finally:
            setattr(pipe, slot, denoiser)
        return output.float().cpu().clamp(0, 1) if decode else output

    pipe.scheduler.set_timesteps(row.steps)
    beside = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name != slot}
    return Sampler(row, denoiser.eval(), pipe.scheduler, draw, beside)


def bundled(request: Request) -> Sampler:
    """A reference denoiser of the repository: see ``benchmarks.reference``."""
    name = request.row.name.removeprefix("reference-")
    denoiser, scheduler = load_bundled(name)
    denoiser.to(request.device)
    if request.dtype is not torch.float32:
        denoiser.to(request.dtype)

    def by_class(called: Any, x: Tensor, t: Tensor, indices: Sequence[int]) -> Tensor:
        y = classes_of(indices, len(CLASSES), x.device)
        predicted: Tensor = called(x, t.expand(len(x)), class_labels=y, return_dict=False)[0]
        return predicted

    size = denoiser.config.sample_size
    predict = by_class if name == "dit" else unconditional
    return loop(request, denoiser, scheduler, (denoiser.config.in_channels, size, size), predict, None)


def _bundled_row(name: str, title: str) -> Row:
    return Row(
        f"reference-{name}", title, f"benchmarks/reference/{name}", lambda: load_bundled(name)[0],
        lambda model, pictures: task(name, 50).inputs(pictures), lambda: task(name, 50).scheduler, 50, "of this repository",
    )  # fmt: skip


#: those of the repository, which need no weights of the user's
BUNDLED = (_bundled_row("unet", "reference U-Net, emoji"), _bundled_row("dit", "reference DiT, emoji"))

LOADERS: dict[str, Callable[[Request], Sampler]] = {
    "ddpm-cifar10": ddpm, "ddpm-bedroom": ddpm, "ddpm-church": ddpm, "ldm-bedroom": ldm, "ldm-4-g": ldm_class,
    "dit-256": dit_reference, "dit-512": dit_reference, "pixart": text_to_image, "sd15": text_to_image,
    **{row.name: bundled for row in BUNDLED},
}  # fmt: skip


def find_row(name: str) -> Row:
    """A row of ``models.ROWS``, or one of ``BUNDLED``. Raises ValueError for another name."""
    return next((row for row in BUNDLED if row.name == name), None) or row_named(name)


def names() -> list[str]:
    return [row.name for row in (*ROWS, *BUNDLED)]


def default_weights(row: Row) -> Path | None:
    """Where the bundled ones are."""
    return HERE / row.name.removeprefix("reference-") if LOADERS[row.name] is bundled else None


def part(request: Request, name: str, kind: Any) -> Any:
    """The model of class ``kind`` in the folder's subfolder ``name``, or in the folder itself."""
    folder = request.weights / name
    if not (folder / "config.json").exists():
        folder = request.weights
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{request.weights} has no {name}: no {name}/config.json, and no config.json.")
    found = json.loads((folder / "config.json").read_text()).get("_class_name")
    if found != kind.__name__:
        raise ValueError(f"{folder / 'config.json'} is of a {found}, and the row {request.row.name} needs a {kind.__name__}.")
    model = kind.from_pretrained(folder, torch_dtype=request.dtype, local_files_only=True)
    return model.to(request.device).eval()


def decoder(request: Request) -> Any:
    """The decoder of latents, in the folder's ``vqvae`` or ``vae``."""
    kinds = {"VQModel": diffusers.VQModel, "AutoencoderKL": diffusers.AutoencoderKL}
    for name in ("vqvae", "vae"):
        path = request.weights / name / "config.json"
        if path.exists():
            found = json.loads(path.read_text()).get("_class_name")
            if found not in kinds:
                raise ValueError(f"{path} is of a {found}; a decoder is one of {', '.join(kinds)}.")
            return part(request, name, kinds[found])
    raise FileNotFoundError(f"{request.weights} has no decoder: no folder vae or vqvae with a config.json.")


def scheduler_of(request: Request) -> Any:
    """The row's kind of scheduler, configured as the folder's where there is one, but for clipping, which the row decides."""
    own = request.row.scheduler()
    for path in (request.weights / "scheduler", request.weights):
        if (path / "scheduler_config.json").exists():
            clips = {"clip_sample": own.config.clip_sample} if "clip_sample" in own.config else {}
            return type(own).from_config(json.loads((path / "scheduler_config.json").read_text()), **clips)
    return own
