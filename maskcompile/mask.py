"""The mask: which block is computed at which step, and its JSON file."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from passes.capture import Capture

FORMAT = "maskcompile mask"
VERSION = 1


class MaskError(ValueError):
    """A mask, a mask file, or a mask for this denoiser is wrong; the message says what, where, and what to do."""


class Mask:
    """Boolean [steps, blocks], True = compute, False = reuse the output of the last step that computed the block.

    compute: bool array-like [T, B]. blocks: B module paths. timesteps: T values with which the denoiser is called, in
    sampling order (strictly falling, or strictly rising for denoisers that count that way). denoiser and block_hash say what
    it was made for (see ``hash_blocks``) and are checked by ``optimize`` where present. provenance: JSON-able facts on where
    the mask came from (method, budget, seeds, versions).

    Immutable. Raises MaskError for a wrong shape or dtype, duplicate blocks, duplicate or unsorted timesteps.
    """

    def __init__(
        self,
        compute: ArrayLike,
        *,
        blocks: Sequence[str],
        timesteps: Iterable[float],
        denoiser: str | None = None,
        block_hash: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        array = np.asarray(compute)
        self._blocks = tuple(blocks)
        self._timesteps = tuple(_number(t) for t in timesteps)
        self._denoiser = denoiser
        self._block_hash = block_hash
        self._provenance = dict(provenance or {})
        if array.dtype != np.bool_:
            raise MaskError(
                f"a mask is boolean, True = compute; got dtype {array.dtype}: pass `compute > threshold` or `.bool()`."
            )
        expected = (len(self.timesteps), len(self.blocks))
        if array.shape != expected:
            raise MaskError(
                f"a mask has the shape [timesteps, blocks] = [{expected[0]}, {expected[1]}]; got {list(array.shape)}."
            )
        if not self.timesteps:
            raise MaskError("a mask needs at least one timestep.")
        if repeated := [b for b in self.blocks if self.blocks.count(b) > 1]:
            raise MaskError(f"block {repeated[0]!r} is named more than once in the mask.")
        differences = np.diff(np.asarray(self.timesteps, dtype=np.float64))
        if not (np.all(differences < 0) or np.all(differences > 0)):
            worst = int(np.flatnonzero(np.sign(differences) != np.sign(differences[0]))[0]) if differences[0] else 0
            raise MaskError(
                "timesteps must be in sampling order without repeats, all falling or all rising; got "
                f"{self.timesteps[worst]} followed by {self.timesteps[worst + 1]} at step {worst + 1}."
            )
        self._compute: NDArray[np.bool_] = array.copy()
        self._compute.setflags(write=False)

    @classmethod
    def full(cls, blocks: Sequence[str], timesteps: Iterable[float]) -> Mask:
        """The mask that computes everything."""
        steps = tuple(timesteps)
        return cls(np.ones((len(steps), len(blocks)), dtype=np.bool_), blocks=blocks, timesteps=steps)

    @property
    def compute(self) -> NDArray[np.bool_]:
        """bool [steps, blocks], read-only."""
        return self._compute

    @property
    def blocks(self) -> tuple[str, ...]:
        return self._blocks

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self._timesteps

    @property
    def denoiser(self) -> str | None:
        """Class name of the denoiser that the mask was made for."""
        return self._denoiser

    @property
    def block_hash(self) -> str | None:
        return self._block_hash

    @property
    def provenance(self) -> Mapping[str, Any]:
        return MappingProxyType(self._provenance)

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.timesteps)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.compute, self.blocks, self.timesteps, self.denoiser, self.block_hash, self._provenance)

    def replace(self, compute: ArrayLike, **provenance: Any) -> Mask:
        """The same blocks, timesteps and denoiser with another ``compute``; provenance is added to."""
        return Mask(
            compute,
            blocks=self.blocks,
            timesteps=self.timesteps,
            denoiser=self.denoiser,
            block_hash=self.block_hash,
            provenance={**self.provenance, **provenance},
        )

    def __eq__(self, other: object) -> bool:
        """Same decisions for the same blocks at the same timesteps; provenance does not count."""
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            self.blocks == other.blocks
            and self.timesteps == other.timesteps
            and np.array_equal(self.compute, other.compute)
            and self.denoiser == other.denoiser
            and self.block_hash == other.block_hash
        )

    def __hash__(self) -> int:
        return hash((self.blocks, self.timesteps, self.compute.tobytes()))

    def __or__(self, other: Mask) -> Mask:
        """Compute where either mask computes. Raises MaskError unless both are over the same blocks and timesteps."""
        if not isinstance(other, Mask):
            return NotImplemented
        if self.blocks != other.blocks or self.timesteps != other.timesteps:
            raise MaskError("masks can be joined only over the same blocks and the same timesteps.")
        return self.replace(self.compute | other.compute)

    def __repr__(self) -> str:
        kept = float(self.compute.mean()) if self.blocks else 1.0
        return f"Mask({self.steps} steps x {len(self.blocks)} blocks, {kept:.0%} computed)"

    def __str__(self) -> str:
        """A line a block, a column a step: '#' computes, '.' reuses."""
        width = max((len(b) for b in self.blocks), default=0)
        lines = [f"{b:<{width}}  " + "".join("#" if c else "." for c in self.compute[:, i]) for i, b in enumerate(self.blocks)]
        return "\n".join([repr(self), *lines])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as JSON, rows as strings of 0 and 1; the file is there whole or not at all."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "denoiser": self.denoiser,
            "block_hash": self.block_hash,
            "provenance": self._provenance,
            "blocks": list(self.blocks),
            "timesteps": list(self.timesteps),
            "compute": ["".join("1" if c else "0" for c in row) for row in self.compute],
        }
        text = json.dumps(document, indent=1) + "\n"
        target = Path(path)
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(partial, 0o644)
            os.replace(partial, target)
        except BaseException:
            os.unlink(partial)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a mask file. Raises MaskError when it is truncated, no mask, or of a newer format."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise MaskError(
                f"{path} is not a whole JSON file ({error}); was it cut short? Save or download it again."
            ) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise MaskError(f'{path} is JSON but no mask file: it lacks "format": "{FORMAT}".')
        if document.get("version") != VERSION:
            raise MaskError(
                f"{path} has mask format version {document.get('version')!r}; this maskcompile reads version {VERSION}."
            )
        if missing := [key for key in ("blocks", "timesteps", "compute") if not isinstance(document.get(key), list)]:
            raise MaskError(f"{path} lacks the list {missing[0]!r}.")
        blocks, rows = document["blocks"], document["compute"]
        if not all(isinstance(block, str) for block in blocks):
            raise MaskError(f"{path}: every entry of 'blocks' must be a string.")
        for step, row in enumerate(rows):
            if not isinstance(row, str) or len(row) != len(blocks) or set(row) - {"0", "1"}:
                raise MaskError(f"{path}: row {step} of 'compute' must be a string of {len(blocks)} characters 0 or 1.")
        try:
            return cls(
                np.array([[c == "1" for c in row] for row in rows], dtype=np.bool_).reshape(len(rows), len(blocks)),
                blocks=blocks,
                timesteps=document["timesteps"],
                denoiser=document.get("denoiser"),
                block_hash=document.get("block_hash"),
                provenance=document.get("provenance"),
            )
        except (MaskError, TypeError, ValueError) as error:
            raise MaskError(f"{path}: {error}") from None


def _rebuild(compute: Any, blocks: Any, timesteps: Any, denoiser: Any, block_hash: Any, provenance: Any) -> Mask:
    return Mask(compute, blocks=blocks, timesteps=timesteps, denoiser=denoiser, block_hash=block_hash, provenance=provenance)


def hash_blocks(model: nn.Module, blocks: Sequence[str]) -> str:
    """A hash of the block list: each path with the names and shapes of its parameters."""
    described = [[block, [[n, list(p.shape)] for n, p in model.get_submodule(block).named_parameters()]] for block in blocks]
    return sha256(json.dumps(described).encode()).hexdigest()[:16]


def check_mask(mask: Mask, model: nn.Module) -> None:
    """Raises MaskError when the mask names blocks that the denoiser lacks, or was made for another denoiser."""
    name = type(model).__name__
    if mask.denoiser is not None and mask.denoiser != name:
        raise MaskError(f"the mask was made for a {mask.denoiser}, this denoiser is a {name}.")
    modules = [path for path, _ in model.named_modules() if path]
    for block in mask.blocks:
        if block not in set(modules):
            near = difflib.get_close_matches(block, modules, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise MaskError(f"the mask names block {block!r}, which {name} does not have{hint}.")
    if mask.block_hash is not None and mask.block_hash != hash_blocks(model, mask.blocks):
        raise MaskError(
            f"the mask was made for another {name}: its blocks have the same names and other parameter shapes. "
            "Make a mask for this denoiser."
        )


def check_blocks(captured: Capture, mask: Mask) -> None:
    """Raises MaskError when a block of the mask returns nothing that could be stored."""
    if opaque := [block for block in mask.blocks if block in captured.opaque]:
        raise MaskError(
            f"block {opaque[0]!r} returns no tensor that torch's pytree can see, so nothing of it can be reused; "
            "use the blocks within it, or register its return type with torch.utils._pytree."
        )


def _number(value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != number:
        raise MaskError(f"timesteps are numbers; got {value!r}.")
    return number
