"""One call of a denoiser: its arguments in one canonical form, its timestep, and the key of the capture that fits it."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Parameter names by which denoisers take the timestep, tried in this order.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "sigma", "sigmas", "noise_labels")


class Key:
    """Equal for calls that one capture serves: the structure of the arguments, and what tells tensors and constants apart."""

    __slots__ = ("hash", "parts")

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts
        self.hash = hash(parts)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.parts == other.parts)


@dataclass(frozen=True)
class Call:
    """A call in canonical form.

    args, kwargs: as given, keywords sorted; a timestep given as a whole Python number is a 0-d tensor.
    tensors: the tensor leaves in pytree order, dense ones, on one device. given: the same as they were given. timestep: as
    given, None where the denoiser has no such parameter.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: tuple[Tensor, ...]
    key: Key
    timestep: Tensor | None
    given: tuple[Tensor, ...]


class Bound(NamedTuple):
    """What executing a call takes of its canonical form, see ``Call``."""

    tensors: tuple[Tensor, ...]
    key: Key
    timestep: Tensor | None
    given: tuple[Tensor, ...]


def timestep_name(signature: inspect.Signature) -> str | None:
    """The parameter of ``forward`` that carries the timestep, None where none has a usual name."""
    return next((name for name in TIMESTEP_NAMES if name in signature.parameters), None)


def bind(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    signature: inspect.Signature | None = None,
    timestep: str | None = None,
) -> Call:
    """Put a call into canonical form. Raises TypeError for arguments that ``forward`` does not take or a capture cannot hold.

    What is positional stays so, and keywords stay keywords, because decorators of ``forward`` may look into either. A Python
    number is baked into a captured graph, so a timestep given as a whole one becomes a 0-d tensor: int64 for an int, float64
    for a float. A fractional float is left to the model (UNet2DModel truncates it) and gets a capture of its own.
    """
    signature = signature or inspect.signature(model.forward)
    timestep = timestep or timestep_name(signature)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{type(model).__name__}.forward{signature}: {error}") from None
    args, kwargs = list(args), {name: kwargs[name] for name in sorted(kwargs)}
    value = bound.arguments.get(timestep) if timestep else None
    if timestep and isinstance(value, numbers.Real) and not isinstance(value, bool):
        device = next((leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        device = None if device is None or device.type == "cuda" else device  # it is brought there below
        number = value
        dtype = torch.int64 if isinstance(number, numbers.Integral) else torch.float64
        value = torch.tensor(number, dtype=dtype, device=device)
        if float(number).is_integer():
            if timestep in kwargs:
                kwargs[timestep] = value
            else:
                args[list(signature.parameters).index(timestep)] = value
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    given = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    if isinstance(value, Tensor) and value.is_cpu and (moved := _cuda_device(leaves)) is not None:
        # Some pipelines leave their timesteps on the CPU, where they are read without waiting; a CUDA graph cannot read them.
        there = value.to(moved, non_blocking=True)
        leaves = [there if leaf is value else leaf for leaf in leaves]
    described: list[tuple[Any, ...]] = []
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[position] = leaf = _dense(leaf)
            described.append((leaf.shape, leaf.dtype, leaf.device, leaf.is_contiguous()))
        else:
            described.append((type(leaf), _hashable(leaf, model)))
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    timestep_given = value if isinstance(value, Tensor) else None
    return Call(tuple(args), dict(kwargs), tensors, Key((spec, *described)), timestep_given, given)


class Binder:
    """Binds calls of one denoiser, quickly where a call is like an earlier one."""

    def __init__(self, model: nn.Module, signature: inspect.Signature, timestep: str) -> None:
        self.model, self.signature, self.timestep = model, signature, timestep
        self.likes: list[_Like] = []

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        for like in self.likes:
            if (bound := like.bind(args, kwargs)) is not None:
                return bound
        call = self.bind(args, kwargs)
        if call.timestep is not None:
            moved = _cuda_device(call.tensors) if call.timestep.is_cpu else None
            new = _Like.of(args, kwargs, call.key, self._place(args, kwargs), call.timestep.device, moved)
            if new is not None:
                self.likes = [new, *self.likes[: MOST_LIKES - 1]]
        return Bound(call.tensors, call.key, call.timestep, call.given)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return bind(self.model, args, kwargs, self.signature, self.timestep)

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """The timestep's place among the arguments, keywords after the others; None where it is not given."""
        if self.timestep in kwargs:
            return len(args) + list(kwargs).index(self.timestep)
        place = list(self.signature.parameters).index(self.timestep)
        return place if place < len(args) else None


#: Forms of calls that a Binder knows at a time.
MOST_LIKES = 8

#: Takes an argument and, if it is like the one that it was made from, appends its tensors to a list.
_Check = Callable[[Any, list[Tensor]], bool]


@dataclass(frozen=True)
class _Like:
    """Recognises calls that bind to the same key as one before.

    positional, keywords: how the arguments are given. checks: one for each. order: of the tensors in pytree order, keywords
    sorted, among those in the order given. timestep: its place among the arguments. moved: the device that it is brought to.
    strided: which of the tensors, as ordered, have to be made dense.
    """

    positional: int
    keywords: tuple[str, ...]
    checks: tuple[_Check, ...]
    order: tuple[int, ...] | None
    key: Key
    timestep: int | None
    moved: torch.device | None
    strided: tuple[int, ...]

    @staticmethod
    def of(
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: Key,
        timestep: int | None,
        device: torch.device,
        moved: torch.device | None,
    ) -> _Like | None:
        """None for arguments that only ``bind`` understands."""
        values = [*args, *kwargs.values()]
        checks, ranges = [], []
        found: list[Tensor] = []
        for place, value in enumerate(values):
            check, before = _like(value, device if place == timestep else None), len(found)
            if check is None or not check(value, found):
                return None
            checks.append(check)
            ranges.append(range(before, len(found)))
        names = sorted(range(len(kwargs)), key=list(kwargs).__getitem__)
        places = [*range(len(args)), *(len(args) + place for place in names)]
        order = tuple(position for place in places for position in ranges[place])
        strided = tuple(place for place, position in enumerate(order) if _dense(found[position]) is not found[position])
        ordered = None if order == tuple(range(len(found))) else order
        return _Like(len(args), tuple(kwargs), tuple(checks), ordered, key, timestep, moved, strided)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound | None:
        if len(args) != self.positional or tuple(kwargs) != self.keywords:
            return None
        tensors: list[Tensor] = []
        timestep = there = None
        for place, (value, check) in enumerate(zip((*args, *kwargs.values()), self.checks, strict=True)):
            if place == self.timestep:
                position = len(tensors)
            if not check(value, tensors):
                return None
            if place == self.timestep:
                timestep = value if isinstance(value, Tensor) else tensors[position]
                there = timestep if self.moved is None else timestep.to(self.moved, non_blocking=True)
        if self.order is not None:
            tensors = [tensors[position] for position in self.order]
        given = tuple(tensors)
        if there is timestep and not self.strided:
            return Bound(given, self.key, timestep, given)
        if there is not None:
            tensors = [there if tensor is timestep else tensor for tensor in tensors]
        for place in self.strided:
            tensors[place] = tensors[place].contiguous()
        return Bound(tuple(tensors), self.key, timestep, given)


def _like(value: Any, device: torch.device | None = None) -> _Check | None:
    """A check of what is like ``value``; None where there is no quick one. device: where the value is the timestep, its."""
    if type(value) is Tensor:
        shape, stride, dtype, place = value.shape, value.stride(), value.dtype, value.device

        def tensor(given: Any, found: list[Tensor]) -> bool:
            if type(given) is not Tensor or given.shape != shape or given.dtype is not dtype:
                return False
            if given.device != place or given.stride() != stride:
                return False
            found.append(given)
            return True

        return tensor
    if isinstance(value, Tensor):
        return None
    if device is not None and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _like_timestep(value, device)
    if type(value) in (list, tuple, dict):
        keys = list(value) if isinstance(value, dict) else None
        parts = [_like(part) for part in (value.values() if isinstance(value, dict) else value)]
        if None in parts:
            return None
        kind, checks = type(value), cast(list[_Check], parts)

        def container(given: Any, found: list[Tensor]) -> bool:
            if type(given) is not kind or len(given) != len(checks) or (keys is not None and list(given) != keys):
                return False
            items = given if keys is None else given.values()
            return all(check(item, found) for check, item in zip(checks, items, strict=True))

        return container
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return lambda given, found: given is value or (type(given) is type(value) and given == value)
    return None


def _like_timestep(value: Any, device: torch.device) -> _Check | None:
    """A number for a timestep: any whole one of its type is like it, for ``bind`` makes tensors of them."""
    kind, whole = type(value), isinstance(value, numbers.Integral)
    if not float(value).is_integer():
        return None

    def number(given: Any, found: list[Tensor]) -> bool:
        if type(given) is not kind or not (whole or float(given).is_integer()):
            return False
        found.append(torch.tensor(given, dtype=torch.int64 if whole else torch.float64, device=device))
        return True

    return number


def other_batch(key: Key, known: Key) -> dict[int, int] | None:
    """Which tensors of a call have the batch as their first dimension, with what that is in another call known.

    The tensors are those whose first dimension, and nothing else, tells the calls apart, all by one factor. By their position
    among tensors; None for calls that differ otherwise.
    """
    if len(key.parts) != len(known.parts) or key.parts[0] != known.parts[0]:
        return None
    found: dict[int, tuple[int, int]] = {}
    position = 0
    for ours, theirs in zip(key.parts[1:], known.parts[1:], strict=True):
        tensor = isinstance(ours[0], torch.Size)
        if ours != theirs:
            if not tensor or not isinstance(theirs[0], torch.Size) or (ours[0][1:], ours[1:]) != (theirs[0][1:], theirs[1:]):
                return None
            if not ours[0] or not theirs[0]:
                return None
            found[position] = ours[0][0], theirs[0][0]
        position += tensor
    if not found or 0 in (size for pair in found.values() for size in pair):
        return None
    (here, there), *others = found.values()
    return None if any(a * there != b * here for a, b in others) else {at: size for at, (_, size) in found.items()}


def double_batch(key: Key) -> dict[int, int]:
    """What ``other_batch`` says if the other call had twice the batch.

    The batch is taken to be the first dimension of the first tensor, and that of others that have as many rows, or twice as
    many, as guidance makes them.
    """
    shapes = [part[0] for part in key.parts[1:] if isinstance(part[0], torch.Size)]
    batch = shapes[0][0] if shapes and shapes[0] else 0
    return {at: 2 * shape[0] for at, shape in enumerate(shapes) if batch and shape and shape[0] in (batch, 2 * batch)}


def describe(call: Call) -> str:
    """The tensors of a call in one line, for messages."""
    return ", ".join(f"{str(t.dtype)[6:]}[{', '.join(map(str, t.shape))}] on {t.device}" for t in call.tensors)


#: Hooks of diffusers that move or cast weights, and change no results: they do their work where modules run one by one.
_HARMLESS = ("offload", "casting", "tracker", "lazy", "prefetch", "leaf")


def check_runnable(model: nn.Module) -> None:
    """Raises ValueError for a denoiser in train mode or with caches of its own, naming the module, for one that is optimised
    already, and under autocast."""
    name = type(model).__name__
    if "original" in vars(model) and name == "OptimizedDenoiser":
        raise ValueError("this denoiser is already optimised; pass fast.original.")
    for path, module in model.named_modules():
        place = f"{name}.{path}" if path else name
        # Layers that adapters and fusing add are in train mode by default, which matters to few.
        if module.training and (module is model or _trained(module)):
            raise ValueError(f"{place} is in train mode; call .eval() on the denoiser first.")
        others = [hook for hook in _diffusers_hooks(module) if not any(word in hook for word in _HARMLESS)]
        if others:
            raise ValueError(
                f"{place} has a diffusers hook ({', '.join(others)}); a mask cannot be combined with other caches."
            )
    check_autocast()


def _trained(module: nn.Module) -> bool:
    """Whether a module alone is random, or changes, in train mode. Others do in it what a capture sees."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.RReLU, nn.MultiheadAttention, nn.RNNBase))


def find_hook(model: nn.Module) -> str | None:
    """Where hooks move or cast weights while the denoiser runs, which a captured graph would bypass; None without any."""
    name = type(model).__name__
    for path, module in model.named_modules():
        place = f"{name}.{path}" if path else name
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            return f"{place} has an accelerate hook ({type(hook).__name__})"
        if hooks := _diffusers_hooks(module):
            return f"{place} has a diffusers hook ({', '.join(hooks)})"
    return None


def check_capturable(model: nn.Module) -> None:
    """Raises ValueError where a capture of the denoiser would be wrong from the start, naming the module, and TypeError for
    what is no denoiser."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a denoiser (nn.Module) is needed, of a pipeline its unet or transformer; got {type(model).__name__}.")
    check_runnable(model)
    if (hook := find_hook(model)) is not None:
        raise ValueError(
            f"{hook}, which a captured graph would bypass; remove offloading and layerwise casting "
            "(accelerate.hooks.remove_hook_from_module, recurse=True) and move the denoiser to its device."
        )


def _diffusers_hooks(module: nn.Module) -> list[str]:
    return list(getattr(getattr(module, "_diffusers_hook", None), "hooks", None) or ())


def check_autocast() -> None:
    """Raises ValueError under torch.autocast."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ValueError("autocast is active, which a capture does not see; cast the denoiser with .to(dtype) instead.")


def _dense(tensor: Tensor) -> Tensor:
    """Expanded and otherwise strided inputs as contiguous ones; channels_last stays."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


def _cuda_device(leaves: Sequence[Any]) -> torch.device | None:
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda), None)


def _hashable(leaf: Any, model: nn.Module) -> Any:
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"{type(model).__name__} was called with a {type(leaf).__name__}, which a capture cannot hold; "
            "pass tensors, numbers, strings, None, or lists and dicts of these."
        ) from None
    return leaf
