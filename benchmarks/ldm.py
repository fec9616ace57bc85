"""CompVis's class-conditional checkpoint as a folder: ``python -m benchmarks.ldm MODEL.CKPT FOLDER``.

For LDM-4-G (``cin256-v2``, github.com/CompVis/latent-diffusion), which diffusers has no pipeline for: ``unet``, ``vqvae``,
``scheduler`` and ``class_embedder.safetensors``, which ``benchmarks.checkpoints`` loads. diffusers renames the weights of the
U-Net and of the autoencoder. Nothing is fetched, and no pickled object of the checkpoint is made: what its trainer left in it
beside the weights (the names of its callbacks) is read as empty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.models import ldm_4_g, row_named

#: the autoencoder of configs/latent-diffusion/cin256-v2.yaml; its latents are not scaled
AUTOENCODER: dict[str, Any] = {
    "sample_size": 256, "latent_channels": 3, "vq_embed_dim": 3, "num_vq_embeddings": 8192,
    "block_out_channels": (128, 256, 512), "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 1.0,
}  # fmt: skip
#: classes that the trainer names in its checkpoints
LEFT_BEHIND = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.argparse.AttributeDict",
)


class Nothing(dict):  # type: ignore[type-arg]
    """In the place of a trainer's object."""


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint. Raises FileNotFoundError, and ValueError for a file that is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    try:
        with torch.serialization.safe_globals([(Nothing, name) for name in LEFT_BEHIND]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that is fed another file may raise anything
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is no checkpoint that torch.load(weights_only=True) reads: {said}") from None
    weights = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(weights, dict) or "cond_stage_model.embedding.weight" not in weights:
        raise ValueError(f"{path} is no class-conditional LDM: it has no 'cond_stage_model.embedding.weight'.")
    return weights


def convert(weights: Mapping[str, Tensor], folder: Path, unet: Any, autoencoder: Any) -> None:
    """Save the weights in ``folder``. unet, autoencoder: models of diffusers to load them into.

    Raises RuntimeError where the weights are of another configuration; then nothing is written.
    """
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), dict(unet.config)), strict=True)
    renamed = convert_ldm_vae_checkpoint(dict(weights), dict(autoencoder.config))
    renamed["quantize.embedding.weight"] = weights["first_stage_model.quantize.embedding.weight"]
    autoencoder.load_state_dict(renamed, strict=True)
    unet.save_pretrained(folder / "unet")
    autoencoder.save_pretrained(folder / "vqvae")
    row_named("ldm-4-g").scheduler().save_pretrained(folder / "scheduler")
    table = weights["cond_stage_model.embedding.weight"].contiguous()
    save_file({"weight": table}, folder / "class_embedder.safetensors")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        convert(read(options.checkpoint), options.folder, ldm_4_g(), diffusers.VQModel(**AUTOENCODER))
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        print(f"benchmarks.ldm: {' '.join(str(error).split())[:500]}", file=sys.stderr)
        return 1
    print(f"{options.folder}: python -m benchmarks.paper ldm-4-g --weights {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
