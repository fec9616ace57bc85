"""The denoisers of the paper's tables at real size: ``python -m benchmarks.models``.

Each is built from its published configuration, with random weights or none at all (``with torch.device("meta")``), beside its
sampler, number of steps, guidance, and what its pipeline calls it with. The command captures all of them on the meta device,
and writes a table of the blocks found and the multiply-accumulates of a step beside the published figures.

Two conventions are in use. The figures of the U-Nets come from counters that hook modules (convolutions, linear layers), and so
leave out the two matrix products within attention; those of the DiTs count all of them, as ``maskcompile`` does. All are of one
picture and one call of the denoiser: guidance doubles them.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import maskcompile as mc
from benchmarks.dit import DiT
from benchmarks.quadratic import QuadraticDDIMScheduler
from maskcompile.files import write_whole

RESULTS = Path(__file__).parent / "results"
#: positional and named arguments of a denoiser
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
#: tokens of a prompt that the pipelines of PixArt-alpha and Stable Diffusion pad to
PIXART_TOKENS, CLIP_TOKENS = 120, 77
#: the operations of FlopCounterMode that attention's two products become on the meta device
PRODUCTS = ("bmm", "baddbmm", "attention")


@dataclass(frozen=True)
class Row:
    """A denoiser of the paper's tables.

    configuration: where the denoiser's is published. build: makes it, on the default device, in eval mode. inputs: of the
    denoiser and a number of pictures, what its pipeline calls it with at the first step. scheduler: makes it, set to ``steps``
    steps. guidance: scale of classifier-free guidance, in one call for both halves; None for none. eta: of DDIM.
    gmacs: published, 10^9 multiply-accumulates of a call for one picture; None where none was found. products: whether those
    count the products within attention. source: of the figure and the number of steps.
    """

    name: str
    title: str
    configuration: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int], Inputs]
    scheduler: Callable[[], Any]
    steps: int
    source: str
    guidance: float | None = None
    eta: float = 0.0
    gmacs: float | None = None
    products: bool = False


def ddpm_cifar10() -> nn.Module:
    """DDPM (arXiv 2006.11239), 32 x 32: google/ddpm-cifar10-32."""
    return _ddpm(32, (128, 256, 256, 256), attention=1)


def ddpm_lsun() -> nn.Module:
    """DDPM, 256 x 256: google/ddpm-ema-bedroom-256 and google/ddpm-ema-church-256, which share a configuration."""
    return _ddpm(256, (128, 128, 256, 256, 512, 512), attention=4)


def _ddpm(size: int, widths: tuple[int, ...], attention: int) -> nn.Module:
    """attention: the one level that has it, of one head as wide as the level."""
    kinds = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(len(widths))]
    unet = diffusers.UNet2DModel(
        sample_size=size, block_out_channels=widths, layers_per_block=2, attention_head_dim=None, norm_eps=1e-6,
        down_block_types=tuple(kinds), up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip
    return unet.eval()


def ldm_lsun() -> nn.Module:
    """LDM-4 (arXiv 2112.10752) for LSUN-Bedrooms: CompVis/latent-diffusion, models/ldm/lsun_beds256/config.yaml."""
    unet = diffusers.UNet2DModel(
        sample_size=64, block_out_channels=(224, 448, 672, 896), layers_per_block=2, attention_head_dim=32,
        down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3), up_block_types=(*("AttnUpBlock2D",) * 3, "UpBlock2D"),
    )  # fmt: skip
    return unet.eval()


def ldm_4_g() -> nn.Module:
    """LDM-4-G, class-conditional ImageNet: CompVis/latent-diffusion, configs/latent-diffusion/cin256-v2.yaml."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, block_out_channels=(192, 384, 576, 960), layers_per_block=2,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        attention_head_dim=1, cross_attention_dim=512,
    )  # fmt: skip
    return unet.eval()


def dit_xl_2(size: int) -> nn.Module:
    """DiT-XL/2 (arXiv 2212.09748) for pictures of this size, in the layout of its reference code."""
    return DiT(input_size=size // 8).eval()


def pixart_512() -> nn.Module:
    """PixArt-alpha (arXiv 2310.00426): PixArt-alpha/PixArt-XL-2-512x512."""
    return diffusers.PixArtTransformer2DModel(sample_size=64, caption_channels=4096).eval()


def sd15() -> nn.Module:
    """Stable Diffusion 1.5 (arXiv 2112.10752): stable-diffusion-v1-5/stable-diffusion-v1-5."""
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()


def _sample(model: Any, pictures: int) -> Tensor:
    size, channels = model.config.sample_size, model.config.in_channels
    return torch.randn(pictures, channels, size, size)


def unet_inputs(model: nn.Module, pictures: int) -> Inputs:
    """As DDIMPipeline and LDMPipeline call a UNet2DModel: one timestep for all."""
    return (_sample(model, pictures), torch.tensor(999)), {}


def class_inputs(model: Any, pictures: int) -> Inputs:
    """LDM-4-G: noise twice over, with the embeddings of the classes, then of no class."""
    context = torch.randn(2 * pictures, 1, model.config.cross_attention_dim)
    return (_sample(model, 2 * pictures), torch.tensor(999)), {"encoder_hidden_states": context}


def dit_inputs(model: Any, pictures: int) -> Inputs:
    """As ``DiT.forward_with_cfg`` is called: noise twice over, classes, then nulls."""
    x = torch.randn(2 * pictures, model.in_channels, model.input_size, model.input_size)
    nothing = torch.full((pictures,), model.num_classes)
    y = torch.cat([torch.arange(pictures) % model.num_classes, nothing])
    return (x, torch.full((2 * pictures,), 999), y), {}


def pixart_inputs(model: Any, pictures: int) -> Inputs:
    """As PixArtAlphaPipeline calls it with guidance, at 512 x 512: no micro-conditions."""
    prompts = torch.randn(2 * pictures, PIXART_TOKENS, model.config.caption_channels)
    return (_sample(model, 2 * pictures),), {
        "encoder_hidden_states": prompts, "encoder_attention_mask": torch.ones(2 * pictures, PIXART_TOKENS, dtype=torch.int64),
        "timestep": torch.full((2 * pictures,), 999), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }  # fmt: skip


def sd_inputs(model: Any, pictures: int) -> Inputs:
    """As StableDiffusionPipeline calls it with guidance."""
    prompts = torch.randn(2 * pictures, CLIP_TOKENS, model.config.cross_attention_dim)
    return (_sample(model, 2 * pictures), torch.tensor(981)), {
        "encoder_hidden_states": prompts, "timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None,
        "return_dict": False,
    }  # fmt: skip


def _ddim(steps: int, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        scheduler = diffusers.DDIMScheduler(**config)
        scheduler.set_timesteps(steps, device="cpu")
        return scheduler

    return make


def _quadratic(steps: int) -> Callable[[], Any]:
    def make() -> Any:
        scheduler = QuadraticDDIMScheduler()
        scheduler.set_timesteps(steps, device="cpu")
        return scheduler

    return make


def _dpm_solver() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    scheduler.set_timesteps(20, device="cpu")
    return scheduler


def _pndm() -> Any:
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    scheduler.set_timesteps(50, device="cpu")
    return scheduler


#: as CompVis's sampler: timesteps one later than the multiples, and the last step comes to the first timestep's noise
_LATENT = {
    "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1,
    "set_alpha_to_one": False,
}  # fmt: skip
_DIFF_PRUNING = "Diff-Pruning (arXiv 2305.10924) and DeepCache (arXiv 2312.00858)"
_QUADRATIC = f"{_DIFF_PRUNING}, with EMA weights and quadratic timesteps, of which 96 differ"
_LSUN = f"{_DIFF_PRUNING}, whose DDIM never clips the picture"
_DIT = "arXiv 2212.09748; 50 steps and guidance 1.5 as in Learning-to-Cache (arXiv 2406.01733)"

#: in the order of the paper's tables; Stable Diffusion is not one of them
ROWS = (
    Row(
        "ddpm-cifar10", "DDPM, CIFAR-10", "google/ddpm-cifar10-32", ddpm_cifar10, unet_inputs, _quadratic(100), 100,
        _QUADRATIC, gmacs=6.1,
    ),
    Row(
        "ddpm-bedroom", "DDPM, LSUN-Bedroom", "google/ddpm-ema-bedroom-256", ddpm_lsun, unet_inputs,
        _ddim(100, clip_sample=False), 100, _LSUN, gmacs=248.7,
    ),
    Row(
        "ddpm-church", "DDPM, LSUN-Church", "google/ddpm-ema-church-256", ddpm_lsun, unet_inputs,
        _ddim(100, clip_sample=False), 100, _LSUN, gmacs=248.7,
    ),
    Row(
        "ldm-bedroom", "LDM-4, LSUN-Bedroom", "CompVis/latent-diffusion, lsun_beds256", ldm_lsun, unet_inputs,
        _ddim(200, **_LATENT), 200, "no MACs published; 200 steps and eta 1 as in its model zoo", eta=1.0,
    ),
    Row(
        "ldm-4-g", "LDM-4-G, ImageNet", "CompVis/latent-diffusion, cin256-v2", ldm_4_g, class_inputs,
        _ddim(250, **_LATENT), 250, "DeepCache (arXiv 2312.00858)", guidance=1.5, gmacs=99.82,
    ),
    Row(
        "dit-256", "DiT-XL/2, ImageNet 256", "facebookresearch/DiT", lambda: dit_xl_2(256), dit_inputs,
        _ddim(50, clip_sample=False), 50, _DIT, guidance=1.5, gmacs=118.64, products=True,
    ),
    Row(
        "dit-512", "DiT-XL/2, ImageNet 512", "facebookresearch/DiT", lambda: dit_xl_2(512), dit_inputs,
        _ddim(50, clip_sample=False), 50, _DIT, guidance=1.5, gmacs=524.6, products=True,
    ),
    Row(
        "pixart", "PixArt-alpha, 512", "PixArt-alpha/PixArt-XL-2-512x512", pixart_512, pixart_inputs, _dpm_solver, 20,
        "no MACs published; steps and guidance are its pipeline's", guidance=4.5,
    ),
    Row(
        "sd15", "Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", sd15, sd_inputs, _pndm, 50,
        "no figure taken over; steps and guidance are its pipeline's", guidance=7.5,
    ),
)  # fmt: skip


def row_named(name: str) -> Row:
    """Raises ValueError for a name that no row has."""
    for row in ROWS:
        if row.name == name:
            return row
    raise ValueError(f"no row {name!r}; there are {', '.join(row.name for row in ROWS)}.")


def one_picture(row: Row) -> tuple[nn.Module, Inputs]:
    """(denoiser, inputs) on the meta device, one picture a call: of a guided row, its two halves."""
    with torch.device("meta"):
        model = row.build()
        return model, row.inputs(model, 1)


def count(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """10^9 multiply-accumulates of one call on the meta device, by torch's own counter: (all, those within attention)."""
    args, kwargs = inputs
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    flops = {str(operation): n / 2e9 for operation, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for operation, n in flops.items() if any(part in operation for part in PRODUCTS))
    return sum(flops.values()), products


@dataclass(frozen=True)
class Entry:
    """A row of the table. needed: share of the MACs left when every block is reused. gmacs: of one call for one picture, all
    counted. off: of the figure of the published one's convention from the published one."""

    name: str
    title: str
    configuration: str
    denoiser: str
    parameters: int
    sampler: str
    steps: int
    guidance: float | None
    blocks: int
    kinds: dict[str, int]
    needed: float
    gmacs: float
    without_products: float
    published: float | None
    products: bool
    off: float | None
    source: str


def entry(row: Row, program: mc.Program, parameters: int, products: float) -> Entry:
    """products: 10^9 multiply-accumulates within attention, of the captured call."""
    halves = 2 if row.guidance else 1
    total, products = program.macs / halves / 1e9, products / halves
    slots = program.slots
    floor = slots.macs_of(slots.reach(frozenset(slots.size), frozenset())[0]) / program.macs
    kinds = [block.kind for block in program.blocks]
    compared = total if row.products else total - products
    scheduler = type(row.scheduler()).__name__.removesuffix("Scheduler")
    return Entry(
        name=row.name, title=row.title, configuration=row.configuration, denoiser=program.denoiser, parameters=parameters,
        sampler=f"{scheduler}, eta {row.eta:g}" if row.eta else scheduler, steps=row.steps, guidance=row.guidance,
        blocks=len(kinds), kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))}, needed=floor,
        gmacs=total, without_products=total - products, published=row.gmacs, products=row.products,
        off=None if row.gmacs is None else compared / row.gmacs - 1, source=row.source,
    )  # fmt: skip


def entries(rows: tuple[Row, ...] = ROWS) -> list[Entry]:
    """The table's. Rows that share a denoiser share its capture."""
    programs: dict[Callable[[], nn.Module], tuple[mc.Program, int, float]] = {}
    found = []
    for row in tqdm(rows, desc="capturing", disable=None):
        if row.build not in programs:
            model, (args, kwargs) = one_picture(row)
            program = mc.trace(model, *args, **kwargs)
            parameters = sum(p.numel() for p in model.parameters())
            programs[row.build] = program, parameters, count(model, (args, kwargs))[1]
        found.append(entry(row, *programs[row.build]))
    return found


def table(found: list[Entry]) -> str:
    lines = [
        "| row | denoiser | parameters | sampler, steps | guidance | blocks | left when all are reused | GMACs a step: all "
        "| without attention's products | published | off by |",
        "|" + "---|" * 11,
    ]
    for e in found:
        ours = [f"{e.gmacs:.2f}", f"{e.without_products:.2f}"]
        if e.published is not None:
            ours[0 if e.products else 1] = f"**{ours[0 if e.products else 1]}**"
        lines.append(
            f"| {e.name}: {e.title} | {e.denoiser} | {e.parameters / 1e6:.1f}M | {e.sampler}, {e.steps} | "
            f"{f'{e.guidance:g}' if e.guidance else ''} | {e.blocks} ({', '.join(f'{n} {k}' for k, n in e.kinds.items())}) | "
            f"{e.needed:.1%} | {ours[0]} | {ours[1]} | {'' if e.published is None else f'{e.published:g}'} | "
            f"{'' if e.off is None else f'{e.off:+.2%}'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="torch")
    began, processor = time.perf_counter(), time.process_time()
    found = entries(tuple(row for row in ROWS if row.name in options.rows))
    sources = "\n".join(f"* {e.name}: {e.configuration}; {e.source}." for e in found)
    text = (
        f"# The paper's denoisers\n\n{table(found)}\n\n"
        "GMACs (10^9 multiply-accumulates) of one call of the denoiser for one picture; guidance doubles them. The figure in "
        "bold follows the published one's convention: counters that hook modules miss the two products within attention.\n"
        f"Where configurations, steps and published figures come from:\n\n{sources}\n\n"
        f"Captured on the meta device; torch {torch.__version__}, diffusers {diffusers.__version__}. "
        "Made by `python -m benchmarks.models`.\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "models.md", text)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    write_whole(options.out / "models.json", json.dumps({**versions, "rows": [asdict(e) for e in found]}, indent=1) + "\n")
    taken = f"{time.perf_counter() - began:.0f} s, {time.process_time() - processor:.0f} s of a processor"
    print(f"{text}\n{len(found)} rows in {taken}: {options.out / 'models.md'}")


if __name__ == "__main__":
    main()
