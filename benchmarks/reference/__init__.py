"""The reference denoisers: their pictures (``dataset``), recipe (``train``) and checkpoints (``unet/``, ``dit/``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel

HERE = Path(__file__).parent
CLASS_OF_DENOISER = {"unet": UNet2DModel, "dit": DiTTransformer2DModel}


def load(name: str) -> tuple[Any, DDIMScheduler]:
    """(denoiser in float32 and eval mode, its DDIM scheduler) from the checkpoint in the repository."""
    denoiser = CLASS_OF_DENOISER[name].from_pretrained(HERE / name)
    return denoiser.float().eval(), DDIMScheduler.from_pretrained(HERE / name / "scheduler")
