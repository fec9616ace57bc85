"""CompVis's latent diffusion as a folder: ``python -m benchmarks.convert_ldm MODEL.CKPT FOLDER``.

For the checkpoints of github.com/CompVis/latent-diffusion: LDM-4-G (``cin256-v2``), which diffusers has no pipeline for, and
LDM-4 without conditions (``lsun_beds256``). Makes ``unet``, ``vqvae``, ``scheduler`` and, of classes,
``class_embedder.safetensors``, which ``benchmarks.checkpoints`` loads. diffusers renames most weights; the U-Net's are the
average of training (EMA) where the checkpoint has it, as CompVis samples. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.models import row_named
from benchmarks.weights import read

#: the autoencoder of both configurations, VQ-f4; its latents are not scaled
AUTOENCODER: dict[str, Any] = {
    "sample_size": 256, "latent_channels": 3, "vq_embed_dim": 3, "num_vq_embeddings": 8192,
    "block_out_channels": (128, 256, 512), "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 1.0,
}  # fmt: skip
#: which the checkpoints must have, and which only those with classes have
NEEDED = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quantize.embedding.weight")
CLASSES = "cond_stage_model.embedding.weight"
#: CompVis's attention without conditions, in the middle and beside ResNet blocks
ATTENTION = re.compile(r"(.*\.(?:(?:in|out)put_blocks\.\d+|middle_block)\.1)\.(norm|qkv|proj_out)\.(weight|bias)")
U_NET = "model.diffusion_model."


def row_of(weights: Mapping[str, Tensor], path: Path) -> str:
    """The row of ``benchmarks.models`` that a checkpoint is of. Raises ValueError for one that is no LDM."""
    if missing := [name for name in NEEDED if name not in weights]:
        raise ValueError(f"{path} is no LDM of CompVis's: it has no {missing[0]!r}.")
    return "ldm-4-g" if CLASSES in weights else "ldm-bedroom"


def unet_of(weights: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """The U-Net's weights for diffusers to rename: averaged, its plain attention by diffusers' names. head: its width."""
    averaged = {
        name: weights.get(f"model_ema.{name.removeprefix('model.').replace('.', '')}", value)
        for name, value in weights.items()
        if name.startswith(U_NET)
    }
    found: dict[str, Tensor] = {}
    for name, value in averaged.items():
        match = ATTENTION.fullmatch(name)
        if match is None or f"{match[1]}.qkv.weight" not in averaged:
            found[name] = value
            continue
        place, module, end = match.groups()
        value = value.squeeze(-1)  # a convolution over a line of pixels
        if module == "qkv":  # of each head q, then k, then v (QKVAttentionLegacy)
            parts = value.unflatten(0, (-1, 3, head)).unbind(1)
            found.update(
                {f"{place}.to_{part}.{end}": of_part.flatten(0, 1) for part, of_part in zip("qkv", parts, strict=True)}
            )
        else:
            found[f"{place}.{'group_norm' if module == 'norm' else 'to_out.0'}.{end}"] = value
    return found


def convert(weights: Mapping[str, Tensor], folder: Path, row: str, unet: Any, autoencoder: Any) -> None:
    """Save the weights in ``folder``. unet, autoencoder: models of diffusers to load them into.

    Raises RuntimeError where the weights are of another configuration; then nothing is written.
    """
    own = unet_of(weights, unet.config.attention_head_dim)
    unet.load_state_dict(convert_ldm_unet_checkpoint(own, dict(unet.config)), strict=True)
    renamed = convert_ldm_vae_checkpoint(dict(weights), dict(autoencoder.config))
    renamed["quantize.embedding.weight"] = weights["first_stage_model.quantize.embedding.weight"]
    autoencoder.load_state_dict(renamed, strict=True)
    unet.save_pretrained(folder / "unet")
    autoencoder.save_pretrained(folder / "vqvae")
    row_named(row).scheduler().save_pretrained(folder / "scheduler")
    if CLASSES in weights:
        save_file({"weight": weights[CLASSES].contiguous()}, folder / "class_embedder.safetensors")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        weights = read(options.checkpoint)
        row = row_of(weights, options.checkpoint)
        convert(weights, options.folder, row, row_named(row).build(), diffusers.VQModel(**AUTOENCODER))
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        print(f"benchmarks.convert_ldm: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        return 1
    print(f"{options.folder}: python -m benchmarks.paper {row} --weights {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
