"""Frechet distances of folders of pictures, by torchmetrics: Inception's features where the user has its weights.

Without them the bundled classifier's at 32 x 32 (see ``benchmarks.reference.classifier``), whose distances compare with each
other and with nothing published.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks.reference.classifier import Features, load_features

#: pictures read at once
BATCH = 64
#: a count to write statistics of unknown origin with; it cancels out
COUNT = 50_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class SmallFeatures(nn.Module):
    """The bundled classifier's features of uint8 pictures of any size [N, 3, S, S]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = load_features()
        self.num_features = Features.num_features

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.float()
        if x.shape[-1] != 32:
            x = nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        features: Tensor = self.features(x.round().to(torch.uint8))
        return features


def metric(inception: Path | None, device: str) -> FrechetInceptionDistance:
    """inception: weights of torch-fidelity's InceptionV3 (``weights-inception-2015-12-05-6726825d.pth``).

    Raises FileNotFoundError, and ImportError where torch-fidelity, which has the network, is not installed.
    """
    alone: dict[str, Any] = {"reset_real_features": False, "sync_on_compute": False}  # one process measures; no other answers
    if inception is None:
        made = FrechetInceptionDistance(SmallFeatures(), input_img_size=(3, 32, 32), **alone)
    else:
        if not inception.is_file():
            raise FileNotFoundError(f"no file {inception} with the weights of torch-fidelity's InceptionV3.")
        try:
            made = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(inception), **alone)
        except ModuleNotFoundError:
            raise ImportError("Inception's features need torch-fidelity: pip install torch-fidelity.") from None
    return made.to(device)


def name(inception: Path | None) -> str:
    """What to call the distance."""
    return "FID" if inception else "Frechet distance (bundled classifier, not Inception)"


def see_real(found: FrechetInceptionDistance, real: Path, size: int) -> None:
    """Let the metric see the real pictures: a folder's, or statistics in an ``.npz`` with ``mu`` and ``sigma``.

    size: of the samples; real pictures are cut square and resized to it, as for training. Statistics are what pytorch-fid
    (``--save-stats``) and guided-diffusion publish, of Inception's last pooling; they come from ports of one network that
    resize pictures in slightly different ways. Raises ValueError for statistics of other features, FileNotFoundError.
    """
    if real.is_dir():
        see(found, pictures_in(real), real=True, size=size)
        return
    if not real.is_file():
        raise FileNotFoundError(f"no folder of pictures and no .npz file at {real}.")
    mean, covariance = _statistics(real)
    if mean.shape != found.real_features_sum.shape:
        raise ValueError(
            f"{real} holds statistics of {len(mean)} features, and there are {len(found.real_features_sum)} here; "
            "statistics of Inception need --inception, and the bundled classifier a folder of pictures."
        )
    found.real_features_sum = (mean * COUNT).to(found.real_features_sum)
    found.real_features_cov_sum = (covariance * (COUNT - 1) + COUNT * torch.outer(mean, mean)).to(found.real_features_cov_sum)
    found.real_features_num_samples = torch.tensor(COUNT).to(found.real_features_num_samples)


def _statistics(path: Path) -> tuple[Tensor, Tensor]:
    """(mu, sigma) in float64."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return torch.from_numpy(stored["mu"].astype(np.float64)), torch.from_numpy(stored["sigma"].astype(np.float64))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path} is no .npz with 'mu' and 'sigma' ({type(error).__name__}).") from None


def pictures_in(folder: Path) -> list[Path]:
    """Raises FileNotFoundError where there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"no pictures ({', '.join(SUFFIXES)}) in {folder}.")
    return found


def fingerprint(path: Path) -> str:
    """Tells real pictures apart: a file by its content, a folder by the names, sizes and times of change of its pictures."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    said = [(str(one.relative_to(path)), one.stat().st_size, one.stat().st_mtime_ns) for one in pictures_in(path)]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def see(found: FrechetInceptionDistance, paths: Sequence[Path], real: bool, size: int) -> None:
    for batch in batches(paths, size):
        found.update(batch.to(found.device), real=real)


def batches(paths: Sequence[Path], size: int) -> Iterator[Tensor]:
    """uint8 [n, 3, size, size]."""
    for start in range(0, len(paths), BATCH):
        yield torch.stack([_read(path, size) for path in paths[start : start + BATCH]])


def _read(path: Path, size: int) -> Tensor:
    with Image.open(path) as opened:
        picture: Any = opened.convert("RGB")
        if picture.size != (size, size):
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
