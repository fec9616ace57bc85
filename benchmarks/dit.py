"""DiT in the layout of its reference code, so that ``DiT-XL-2-256x256.pt`` loads by its own names.

"Scalable Diffusion Models with Transformers" (arXiv 2212.09748), github.com/facebookresearch/DiT. Built of timm's
``PatchEmbed``, ``Attention`` and ``Mlp``, for sampling alone: labels are never dropped at random. Nothing is
fetched; see ``load``.

diffusers' ``DiTTransformer2DModel`` is the same network but for two constants: its time embedding divides the exponents of its
128 frequencies by 127 where the reference code divides by 128 (``frequency_shift``), and the second norm of its blocks adds
1e-5 by default where the reference code adds 1e-6. ``to_diffusers`` and ``from_diffusers`` move weights between the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn

from benchmarks.weights import read

#: width -> attention heads of the published sizes XL, L, B and S; a state dict does not say
HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}
#: width of the sinusoidal time embedding
FREQUENCIES = 256


class TimestepEmbedder(nn.Module):
    """Timesteps [B] to [B, width]. frequency_shift: 0 as in the reference code, 1 as in diffusers."""

    def __init__(self, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - self.frequency_shift)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)
        embedded: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Class labels [B] to [B, width]; the last row of the table is for no class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(y)
        return embedded


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens [B, N, width] scaled and shifted by [B, width]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Attention and feed-forward, each with a shift, a scale and a gate of the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        tokens: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return tokens


class DiT(nn.Module):
    """The defaults are those of DiT-XL/2 at 256 x 256: latents [B, 4, 32, 32].

    learn_sigma: predicts the variance beside the noise, in as many more channels.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        frequency_shift: int = 0,
    ) -> None:
        super().__init__()
        self.input_size, self.in_channels, self.num_classes, self.num_heads = input_size, in_channels, num_classes, num_heads
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = position_embedding(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions.to(self.x_embedder.proj.weight.device), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noise (and variance) [B, out_channels, S, S] in x [B, in_channels, S, S] at timesteps t [B], for classes y [B]."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens [B, N, patch * patch * out_channels] put together."""
        p, side = self.x_embedder.patch_size[0], math.isqrt(x.shape[1])
        x = x.reshape(-1, side, side, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.out_channels, side * p, side * p)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """The guided noise, for both halves. The first half of x is what counts; y holds classes, then as many nulls."""
        half = x[: len(x) // 2]
        return guided(self(torch.cat([half, half]), t, y), cfg_scale)


def guided(output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of a denoiser's output for classes, then for none.

    On the first three channels only, as in the reference code and its published figures; diffusers' pipeline guides all four.
    """
    noise, rest = output[:, :3], output[:, 3:]
    conditional, unconditional = noise.chunk(2)
    half = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([half, half]), rest], dim=1)


def position_embedding(width: int, side: int) -> Tensor:
    """Sines and cosines of the column, then of the row, of side x side patches: float32 [1, side * side, width]."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns, rows = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, width).float()


def settings_of(weights: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """The arguments of ``DiT`` that a state dict in its layout was made with.

    heads: needed for widths other than those of ``HEADS``. Raises ValueError where the weights are no DiT's, or say too little.
    """
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"the state dict has no {missing[0]!r}: not a DiT in the layout of the reference code.")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    if heads is None and width not in HEADS:
        known = ", ".join(map(str, HEADS))
        raise ValueError(f"a state dict does not say how many attention heads a DiT {width} wide has (known: {known}); say.")
    return {
        "input_size": patch * math.isqrt(weights["pos_embed"].shape[1]),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": heads or HEADS[width],
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width if "blocks.0.mlp.fc1.weight" in weights else 4.0,
        "num_classes": weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": weights["final_layer.linear.weight"].shape[0] == 2 * channels * patch * patch,
    }


def load(path: str | Path, heads: int | None = None) -> DiT:
    """The DiT in eval mode whose checkpoint (``.pt`` or ``.safetensors``) is at ``path``: official, or of this layout.

    heads: see ``settings_of``. A checkpoint of the reference code's ``train.py`` gives its average ("ema"). A ``.pt`` file is a
    pickle, of which nothing but tensors in containers is read. Raises FileNotFoundError, and ValueError for a file that is
    no such checkpoint, with what was wrong.
    """
    path = Path(path)
    weights = read(path)
    try:
        settings = settings_of(weights, heads)
        with torch.device("meta"):
            model = DiT(**settings)
        model.load_state_dict(weights, strict=True, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not load as a DiT: {' '.join(str(error).split())}") from None
    return model.requires_grad_(False).eval()


#: name here -> name in diffusers' model, without the ends "weight" and "bias"; {i} is the block
_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "blocks.{i}.attn.proj": "transformer_blocks.{i}.attn1.to_out.0",
    "blocks.{i}.mlp.fc1": "transformer_blocks.{i}.ff.net.0.proj",
    "blocks.{i}.mlp.fc2": "transformer_blocks.{i}.ff.net.2",
    "blocks.{i}.adaLN_modulation.1": "transformer_blocks.{i}.norm1.linear",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
#: what diffusers' model holds once in each block
_CONDITION = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of this layout as one of ``diffusers.DiTTransformer2DModel``. Position embeddings: it makes its own."""
    depth = settings_of(weights, heads=1)["depth"]
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "pos_embed":
            continue
        module, _, end = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.", module)
        index = block[1] if block else ""
        general = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", module)
        if general == "blocks.{i}.attn.qkv":
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                converted[f"transformer_blocks.{index}.attn1.to_{part}.{end}"] = chunk.clone()
        elif module in _CONDITION:
            for i in range(depth):
                converted[f"transformer_blocks.{i}.norm1.emb.{_CONDITION[module]}.{end}"] = value
        else:
            converted[_NAMES[general].format(i=index) + f".{end}"] = value
    return converted


def from_diffusers(weights: Mapping[str, Tensor], input_size: int) -> dict[str, Tensor]:
    """A state dict of ``diffusers.DiTTransformer2DModel`` as one of this layout. input_size: side of its latents."""
    depth = len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")})
    width, _, patch, _ = weights["pos_embed.proj.weight"].shape
    converted = {"pos_embed": position_embedding(width, input_size // patch)}
    for end in ("weight", "bias"):
        for ours, theirs in _CONDITION.items():
            if (name := f"transformer_blocks.0.norm1.emb.{theirs}.{end}") in weights:
                converted[f"{ours}.{end}"] = weights[name]
        for i in range(depth):
            parts = [weights[f"transformer_blocks.{i}.attn1.to_{part}.{end}"] for part in "qkv"]
            converted[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(parts)
        for ours, theirs in _NAMES.items():
            for i in range(depth) if "{i}" in ours else (0,):
                converted[ours.format(i=i) + f".{end}"] = weights[theirs.format(i=i) + f".{end}"]
    return converted
