"""Tensors of checkpoints, ``.safetensors`` or what ``torch.save`` wrote: of a pickle, nothing but tensors in containers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

#: where trainers keep what is to be sampled from: DiT's train.py its average, PyTorch Lightning the weights
WITHIN = ("ema", "state_dict")
#: classes that PyTorch Lightning names in its checkpoints, beside the weights
LEFT_BEHIND = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.argparse.AttributeDict",
)


class Nothing(dict):  # type: ignore[type-arg]
    """In the place of a trainer's object, none of which is made."""


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU. Raises FileNotFoundError, and ValueError for a file that holds none."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}.") from None
    try:
        with torch.serialization.safe_globals([(Nothing, name) for name in LEFT_BEHIND]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that is fed another file may raise anything
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is no file of tensors that torch.load(weights_only=True) reads: {said}") from None
    for name in WITHIN:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds a {type(found).__name__} that is no state dict: names with a tensor each.")
    return found
