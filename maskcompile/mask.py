"""The mask: which block is computed at which step, what stands for it at the others, and its JSON file."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from math import isfinite
from pathlib import Path
from types import EllipsisType, MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from maskcompile.files import write_whole
from passes.capture import Capture
from passes.reuse import MOST_REACH, RULES, Rules

FORMAT = "maskcompile mask"
#: A file is of the first version that can say what it says: 2 has reuse rules and a log-SNR, 3 a reach.
VERSIONS = (1, 2, 3)


class MaskError(ValueError):
    """A mask, a mask file, or a mask for this denoiser is wrong; the message says what, where, and what to do."""


class Mask:
    """Boolean [steps, blocks], True = compute, False = reuse what earlier steps of the run computed.

    compute: bool array-like [T, B]. blocks: B module paths. timesteps: T values with which the denoiser is called, in
    sampling order (strictly falling, or strictly rising for denoisers that count that way). reuse: the rule that makes a
    reused output, one for all blocks or one for each: "hold" (the output of the last step that computed the block) or
    "linear" (the last two outputs extrapolated to the step; see ``passes.reuse``). log_snr: T rising values,
    log(alpha^2 / sigma^2) at each step, by which "linear" measures distances beside the step index (``maskcompile.log_snr``
    reads them off a scheduler). reach: T factors, 0 to 4, of how far "linear" reaches at each step of these very rows
    (``fit_reach`` finds them); 0 holds, and nothing reaches further than 1.5 times the distance of the last two outputs.
    denoiser and block_hash say what the mask was made for (see ``hash_blocks``) and are checked by ``optimize`` where present.
    provenance: JSON-able facts on where the mask came from (method, budget, seeds, versions).

    Immutable. Raises MaskError for a wrong shape or dtype, duplicate blocks, duplicate or unsorted timesteps, unknown rules,
    a log-SNR that does not rise, a reach out of range.
    """

    def __init__(
        self,
        compute: ArrayLike,
        *,
        blocks: Sequence[str],
        timesteps: Iterable[float],
        reuse: str | Sequence[str] = "hold",
        log_snr: Iterable[float] | None = None,
        reach: Iterable[float] | None = None,
        denoiser: str | None = None,
        block_hash: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        array = np.asarray(compute)
        self._blocks = tuple(blocks)
        self._reuse = (reuse,) * len(self._blocks) if isinstance(reuse, str) else _sequence(reuse, "reuse")
        self._timesteps = _numbers(timesteps, "timesteps")
        self._log_snr = None if log_snr is None else _numbers(log_snr, "log_snr")
        self._reach = None if reach is None else _numbers(reach, "reach")
        self._denoiser = denoiser
        self._block_hash = block_hash
        self._provenance = {name: _plain(value) for name, value in (provenance or {}).items()}
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
        if len(self.reuse) != len(self.blocks):
            raise MaskError(
                f"reuse is one rule for all blocks, or one for each of the {len(self.blocks)}; got {len(self.reuse)}."
            )
        if unknown := [rule for rule in self.reuse if rule not in RULES]:
            raise MaskError(f"a reuse rule is one of {', '.join(map(repr, RULES))}; got {unknown[0]!r}.")
        differences = np.diff(np.asarray(self.timesteps, dtype=np.float64))
        if not (np.all(differences < 0) or np.all(differences > 0)):
            worst = int(np.flatnonzero(np.sign(differences) != np.sign(differences[0]))[0]) if differences[0] else 0
            raise MaskError(
                "timesteps must be in sampling order without repeats, all falling or all rising; got "
                f"{self.timesteps[worst]} followed by {self.timesteps[worst + 1]} at step {worst + 1}."
            )
        if self.log_snr is not None:
            rises = np.diff(self.log_snr) > 0
            if len(self.log_snr) != self.steps:
                raise MaskError(
                    f"log_snr has one value for each of the {self.steps} timesteps that the denoiser is called with; got "
                    f"{len(self.log_snr)} (mc.log_snr(scheduler) gives those of the last scheduler.set_timesteps)."
                )
            if (rises.any() and not rises.all()) or 0 in np.diff(self.log_snr):
                raise MaskError("log_snr rises from step to step (or falls, for inversion).")
        if self.reach is not None and (len(self.reach) != self.steps or not all(0 <= r <= MOST_REACH for r in self.reach)):
            raise MaskError(f"reach has one factor, 0 to {MOST_REACH:g}, for each of the {self.steps} steps.")
        self._compute: NDArray[np.bool_] = array.copy()
        self._compute.setflags(write=False)

    @classmethod
    def full(cls, blocks: Sequence[str], timesteps: Iterable[float]) -> Mask:
        """The mask that computes everything."""
        steps = steps_of(timesteps)
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
    def reuse(self) -> tuple[str, ...]:
        """The reuse rule of each block."""
        return self._reuse

    @property
    def log_snr(self) -> tuple[float, ...] | None:
        """log(alpha^2 / sigma^2) at each step, None where the mask does not know it."""
        return self._log_snr

    @property
    def reach(self) -> tuple[float, ...] | None:
        """How far *linear* reaches at each step, as a factor; None where that is 1 at every step."""
        return self._reach

    @property
    def rules(self) -> Rules:
        """How the outputs of its blocks are reused, for ``passes``."""
        return Rules(self.reuse, self.log_snr, self.reach)

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
        return _rebuild, (self.compute, self._described())

    def _described(self) -> dict[str, Any]:
        """All but ``compute``, as keyword arguments."""
        return {
            "blocks": self.blocks,
            "timesteps": self.timesteps,
            "reuse": self.reuse,
            "log_snr": self.log_snr,
            "reach": self.reach,
            "denoiser": self.denoiser,
            "block_hash": self.block_hash,
            "provenance": self._provenance,
        }

    def replace(
        self,
        compute: ArrayLike | None = None,
        *,
        reuse: str | Sequence[str] | None = None,
        log_snr: Iterable[float] | EllipsisType | None = ...,
        reach: Iterable[float] | EllipsisType | None = ...,
        **provenance: Any,
    ) -> Mask:
        """The same mask with another ``compute``, ``reuse``, ``log_snr`` or ``reach`` (None takes away the last two).

        A reach is fitted to all the others, and goes where one of them changes. Provenance is added to.
        """
        if fixed := [name for name in self._described() if name in provenance]:
            raise MaskError(f"replace does not change {fixed[0]!r}: make a new Mask, or resample the timesteps.")
        described = self._described() | {"provenance": {**self.provenance, **provenance}}
        described |= {} if reuse is None else {"reuse": reuse}
        described |= {} if isinstance(log_snr, EllipsisType) else {"log_snr": log_snr}
        changed = Mask(self.compute if compute is None else compute, **(described | {"reach": None}))
        if isinstance(reach, EllipsisType):
            same = changed.rules == Rules(self.reuse, self.log_snr) and np.array_equal(changed.compute, self.compute)
            reach = self.reach if same else None
        return changed if reach is None else Mask(changed.compute, **(described | {"reach": reach}))

    def resample(self, timesteps: Iterable[float], *, log_snr: Iterable[float] | None = None) -> Mask:
        """The mask for a run of other timesteps: another number of steps, other spacing, a run that starts late.

        Every new step takes the row of one of the mask's steps that it stands for: those whose timesteps are nearer to its own
        than to its neighbours'. Which of them is chosen so that every block is computed as often as before up to there
        (error diffusion, as in dithering), for taking the nearest row would make of every second step computed either all or
        none of half as many steps. The first step of the run takes the mask's first row. A run of more steps repeats rows. On
        its own timesteps a mask stays as it is.

        A reach, which is fitted to the mask's own steps, is lost.

        timesteps: in sampling order, in the mask's direction, of any number, see ``steps_of``. log_snr: at each of them; where
        the mask has a log-SNR and none is given, it is interpolated along the timesteps. Raises MaskError for timesteps in the
        other direction or in another range, and whatever ``Mask`` raises.
        """
        new = steps_of(timesteps)
        if not new:
            raise MaskError("a mask needs at least one timestep.")
        own = np.asarray(self.timesteps, dtype=np.float64)
        sign = -1.0 if self.steps > 1 and own[1] < own[0] else 1.0
        if self.steps > 1 and len(new) > 1 and (new[1] - new[0]) * sign < 0:
            raise MaskError(
                f"the mask's timesteps {'fall' if sign < 0 else 'rise'} from {own[0]:g} to {own[-1]:g}; a mask cannot be "
                f"resampled to timesteps that go the other way, {new[0]:g} to {new[-1]:g}."
            )
        if self.steps > 1 and (max(new) < min(self.timesteps) or min(new) > max(self.timesteps)):
            raise MaskError(
                f"the mask's timesteps lie between {min(own):g} and {max(own):g}, these between {min(new):g} and {max(new):g}; "
                "give the values that the denoiser is called with, which for some pipelines (Flux, QwenImage) are "
                "scheduler.timesteps / 1000."
            )
        snr = None if log_snr is None else _numbers(log_snr, "log_snr")
        if snr is None and self.log_snr is not None:
            snr = tuple(_line(sign * np.asarray(new), sign * own, np.asarray(self.log_snr)).tolist())
        chosen = _rows_for(self.compute, np.interp(sign * np.asarray(new), sign * own, np.arange(self.steps, dtype=np.float64)))
        reach = self.reach if (new, snr) == (self.timesteps, self.log_snr) else None
        described = self._described() | {"timesteps": new, "log_snr": snr, "reach": reach}
        if new != self.timesteps:
            described["provenance"] = {**self.provenance, "resampled": f"{self.steps} to {len(new)} steps"}
        return Mask(self.compute[chosen], **described)

    def __eq__(self, other: object) -> bool:
        """Same decisions for the same blocks at the same timesteps; provenance does not count."""
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            self.blocks == other.blocks
            and self.timesteps == other.timesteps
            and self.rules == other.rules
            and np.array_equal(self.compute, other.compute)
            and self.denoiser == other.denoiser
            and self.block_hash == other.block_hash
        )

    def __hash__(self) -> int:
        return hash((self.blocks, self.timesteps, self.reuse, self.compute.tobytes()))

    def __or__(self, other: Mask) -> Mask:
        """Compute where either mask computes.

        Raises MaskError unless blocks, timesteps, reuse rules, log-SNR and reach are the same.
        """
        if not isinstance(other, Mask):
            return NotImplemented
        if (self.blocks, self.timesteps, self.rules) != (other.blocks, other.timesteps, other.rules):
            raise MaskError("masks can be joined only over the same blocks, timesteps, reuse rules, log-SNR and reach.")
        return self.replace(self.compute | other.compute)

    def __repr__(self) -> str:
        kept = float(self.compute.mean()) if self.blocks else 1.0
        rules = "" if set(self.reuse) <= {"hold"} else f", reuse {' and '.join(sorted(set(self.reuse)))}"
        rules += "" if self.reach is None else " with a reach of its own at each step"
        return f"Mask({self.steps} steps x {len(self.blocks)} blocks, {kept:.0%} computed{rules})"

    def __str__(self) -> str:
        """A line a block, a column a step: '#' computes, '.' holds, '-' extrapolates."""
        width = max((len(b) for b in self.blocks), default=0)
        sign = {"hold": ".", "linear": "-"}
        lines = [
            f"{b:<{width}}  " + "".join("#" if c else sign[self.reuse[i]] for c in self.compute[:, i])
            for i, b in enumerate(self.blocks)
        ]
        reach = [] if self.reach is None else ["reach of each step: " + " ".join(f"{factor:g}" for factor in self.reach)]
        return "\n".join([repr(self), *lines, *reach])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as JSON, rows as strings of 0 and 1; the file is there whole or not at all."""
        rules = set(self.reuse) - {"hold"}
        document = {
            "format": FORMAT,
            "version": 3 if self.reach is not None else 1 if self.log_snr is None and not rules else 2,
            "denoiser": self.denoiser,
            "block_hash": self.block_hash,
            "provenance": self._provenance,
            "blocks": list(self.blocks),
            "timesteps": list(self.timesteps),
            # One rule for all, or a list with one for each block; a file that says nothing holds.
            **({"reuse": self.reuse[0] if len(set(self.reuse)) == 1 else list(self.reuse)} if rules else {}),
            **({"log_snr": list(self.log_snr)} if self.log_snr is not None else {}),
            **({"reach": list(self.reach)} if self.reach is not None else {}),
            "compute": ["".join("1" if c else "0" for c in row) for row in self.compute],
        }
        write_whole(path, json.dumps(document, indent=1) + "\n")

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
        if document.get("version") not in VERSIONS:
            raise MaskError(
                f"{path} has mask format version {document.get('version')!r}; this maskcompile reads versions "
                f"{', '.join(map(str, VERSIONS))}."
            )
        if missing := [key for key in ("blocks", "timesteps", "compute") if not isinstance(document.get(key), list)]:
            raise MaskError(f"{path} lacks the list {missing[0]!r}.")
        blocks, rows = document["blocks"], document["compute"]
        if not all(isinstance(block, str) for block in blocks):
            raise MaskError(f"{path}: every entry of 'blocks' must be a string.")
        if document["version"] == 1 and {"reuse", "log_snr"} & set(document):
            raise MaskError(f"{path}: reuse rules and log_snr need mask format version 2; this file says 1.")
        reuse = document.get("reuse", "hold")
        if not isinstance(reuse, str) and not (isinstance(reuse, list) and all(isinstance(rule, str) for rule in reuse)):
            raise MaskError(f"{path}: 'reuse' must be a rule, or a list of rules.")
        if document["version"] < 3 and "reach" in document:
            raise MaskError(f"{path}: a reach needs mask format version 3; this file says {document['version']}.")
        for key in ("log_snr", "reach"):
            if not isinstance(document.get(key), list | None):
                raise MaskError(f"{path}: {key!r} must be a list of numbers.")
        for step, row in enumerate(rows):
            if not isinstance(row, str) or len(row) != len(blocks) or set(row) - {"0", "1"}:
                raise MaskError(f"{path}: row {step} of 'compute' must be a string of {len(blocks)} characters 0 or 1.")
        try:
            return cls(
                np.array([[c == "1" for c in row] for row in rows], dtype=np.bool_).reshape(len(rows), len(blocks)),
                blocks=blocks,
                timesteps=document["timesteps"],
                reuse=reuse,
                log_snr=document.get("log_snr"),
                reach=document.get("reach"),
                denoiser=document.get("denoiser"),
                block_hash=document.get("block_hash"),
                provenance=document.get("provenance"),
            )
        except (MaskError, TypeError, ValueError) as error:
            raise MaskError(f"{path}: {error}") from None


def _rebuild(compute: Any, described: dict[str, Any]) -> Mask:
    return Mask(compute, **described)


def _rows_for(compute: NDArray[np.bool_], places: NDArray[np.float64]) -> list[int]:
    """The step of a mask whose row each step of another run takes.

    places: where in the mask each step is, 1.5 halfway between the steps 1 and 2. The step stands for what lies between the
    middles to its neighbours; the mask's step i reaches from i - 0.5 to i + 0.5.
    """
    last = len(compute) - 1
    middles = (places[1:] + places[:-1]) / 2
    before = 2 * places[:1] - middles[:1] if len(middles) else [-0.5]
    after = 2 * places[-1:] - middles[-1:] if len(middles) else [last + 0.5]
    edges = np.clip(np.concatenate([before, middles, after]), -0.5, last + 0.5)
    owed = np.zeros(compute.shape[1])  # computations of each block, as yet
    chosen: list[int] = []
    for place, left, right in zip(places, edges[:-1], edges[1:], strict=True):
        steps = np.arange(max(0, int(np.ceil(left - 0.5))), min(last, int(np.floor(right + 0.5))) + 1)
        weights = np.minimum(right, steps + 0.5) - np.maximum(left, steps - 0.5)
        steps, weights = steps[weights > 1e-9], weights[weights > 1e-9]
        if not chosen:  # nothing is stored yet
            steps, weights = np.zeros(1, dtype=np.int64), np.ones(1)
        elif not len(steps):  # before the mask's first step, or after its last
            steps, weights = np.array([round(float(place))]), np.ones(1)
        rows = compute[steps].astype(np.float64)
        owed += weights @ rows / weights.sum()
        missing = owed - rows
        # Of all blocks together too: single ones even out, and their sum is what a run costs.
        step = int(((missing**2).sum(1) + missing.sum(1) ** 2).argmin()) if compute.shape[1] else 0
        owed = missing[step]
        chosen.append(int(steps[step]))
    return chosen


def _line(at: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear interpolation of y over rising x, and beyond its ends along the first and last piece."""
    if len(x) == 1:
        return np.asarray(y[0] - (at - x[0]))
    piece = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    share = (at - x[piece]) / (x[piece + 1] - x[piece])
    return np.asarray(y[piece] * (1 - share) + y[piece + 1] * share)


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
    if unsized := [block for block in mask.blocks if block in captured.unsized]:
        raise MaskError(
            f"the values of tensors decide on the shape or strides of what block {unsized[0]!r} returns, so the captured graph "
            "cannot reuse it; use other blocks (optimize skips such ones module by module, in eager PyTorch)."
        )


def _plain(value: Any) -> Any:
    """As JSON knows it: numbers of NumPy's are those of Python."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    return value.item() if isinstance(value, np.generic) else value


def _sequence(values: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(values, Iterable):
        raise MaskError(f"{what} is a sequence; got {values!r}.")
    return tuple(values)


def steps_of(timesteps: Iterable[float]) -> tuple[float, ...]:
    """A scheduler's timesteps as those of a mask, in which one that is called twice in a row (Heun, PNDM) is one step."""
    given = _numbers(timesteps, "timesteps")
    return tuple(t for i, t in enumerate(given) if not i or t != given[i - 1])


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    return tuple(_number(value, what) for value in _sequence(values, what))


def _number(value: Any, what: str) -> float:
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not isfinite(number):
        raise MaskError(f"{what} are finite numbers; got {value!r}.")
    return number
