"""Tiny denoisers with random weights and the reference denoisers, and inputs for them: ``inputs(batch, timestep, seed) -> (args, kwargs)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from torch import nn

from benchmarks.dit import DiT
from benchmarks.reference import load


@dataclass(frozen=True)
class Case:
    model: nn.Module
    inputs: Callable[[int, float, int], tuple[tuple[Any, ...], dict[str, Any]]]
    timesteps: tuple[float, ...] = (901, 701, 501, 301, 101)
    batch: int = 2


def _noise(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def unet2d() -> Case:
    model = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return Case(model, lambda b, t, s: ((_noise(s)(b, 3, 16, 16), t), {}))


def unet2d_condition() -> Case:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip

    def inputs(b: int, t: float, s: int) -> Any:
        noise = _noise(s)
        return (noise(b, 4, 8, 8), torch.tensor(t)), {"encoder_hidden_states": noise(b, 5, 16)}

    return Case(model, inputs)


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_embeds_ada_norm=10
    )  # fmt: skip

    def inputs(b: int, t: float, s: int) -> Any:
        return (_noise(s)(b, 4, 8, 8),), {"timestep": torch.full((b,), t), "class_labels": torch.arange(b)}

    return Case(model, inputs)


def pixart() -> Case:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=12,
    )  # fmt: skip

    def inputs(b: int, t: float, s: int) -> Any:
        noise = _noise(s)
        extra = {"resolution": None, "aspect_ratio": None}
        return (noise(b, 4, 8, 8),), {
            "encoder_hidden_states": noise(b, 6, 12), "timestep": torch.full((b,), t), "added_cond_kwargs": extra, "return_dict": False,
        }  # fmt: skip

    return Case(model, inputs)


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8,
    )  # fmt: skip

    def inputs(b: int, t: float, s: int) -> Any:
        noise = _noise(s)
        return (), {
            "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 16), "pooled_projections": noise(b, 12),
            "timestep": torch.full((b,), float(t)),
        }  # fmt: skip

    return Case(model, inputs)


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip

    def inputs(b: int, t: float, s: int) -> Any:
        noise = _noise(s)
        return (), {
            "hidden_states": noise(b, 16, 8), "encoder_hidden_states": noise(b, 4, 16), "pooled_projections": noise(b, 12),
            "timestep": torch.full((b,), t), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(4, 3), "return_dict": False,
        }  # fmt: skip

    return Case(model, inputs, tuple(t / 1000 for t in (901, 701, 501, 301, 101)))


def timm_dit() -> Case:
    model = DiT(input_size=8, hidden_size=16, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=10)
    return Case(model, lambda b, t, s: ((_noise(s)(b, 4, 8, 8), torch.full((b,), t), torch.arange(b)), {}))


def reference_unet() -> Case:
    return Case(load("unet")[0], lambda b, t, s: ((_noise(s)(b, 3, 32, 32), t), {}), batch=1)


def reference_dit() -> Case:
    def inputs(b: int, t: float, s: int) -> Any:
        return (_noise(s)(b, 3, 32, 32), torch.full((b,), t)), {"class_labels": torch.arange(b)}

    return Case(load("dit")[0], inputs, batch=1)


TINY = {f.__name__: f for f in (unet2d, unet2d_condition, dit, timm_dit, pixart, sd3, flux)}
REFERENCE = {f.__name__: f for f in (reference_unet, reference_dit)}


@cache
def denoiser(name: str) -> Case:
    """The case with random weights, every parameter of them: what starts at zero would hide a wrong reuse."""
    torch.manual_seed(0)
    if name in REFERENCE:
        return REFERENCE[name]()
    case = TINY[name]()
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    case.model.eval()
    return case


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a denoiser's result, whatever it is wrapped in."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for t in (output.values() if isinstance(output, dict) else output) if isinstance(t, torch.Tensor)]
