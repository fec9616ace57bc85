"""One call of a denoiser: its arguments in one canonical form, its timestep, and the key of the capture that fits it."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Parameter names by which denoisers take the timestep, tried in this order.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "sigma", "sigmas", "noise_labels")


@dataclass(frozen=True)
class Call:
    """A call in canonical form.

    args, kwargs: as given, keywords sorted; a timestep given as a whole Python number is a 0-d tensor.
    tensors: the tensor leaves in pytree order. key: equal for calls that one capture serves. timestep: None where the
    denoiser has no such parameter.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: tuple[Tensor, ...]
    key: tuple[Any, ...]
    timestep: Tensor | None


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
        number = value
        dtype = torch.int64 if isinstance(number, numbers.Integral) else torch.float64
        value = torch.tensor(number, dtype=dtype, device=device)
        if float(number).is_integer():
            if timestep in kwargs:
                kwargs[timestep] = value
            else:
                args[list(signature.parameters).index(timestep)] = value
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    described: list[tuple[Any, ...]] = []
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[position] = leaf = _dense(leaf)
            described.append((leaf.shape, leaf.dtype, leaf.device, leaf.is_contiguous()))
        else:
            described.append((type(leaf), _hashable(leaf, model)))
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    return Call(tuple(args), dict(kwargs), tensors, (spec, *described), value if isinstance(value, Tensor) else None)


def describe(call: Call) -> str:
    """The tensors of a call in one line, for messages."""
    return ", ".join(f"{str(t.dtype)[6:]}[{', '.join(map(str, t.shape))}] on {t.device}" for t in call.tensors)


def check_capturable(model: nn.Module) -> None:
    """Raises ValueError where a capture of the denoiser would be wrong from the start, naming the module."""
    name = type(model).__name__
    for path, module in model.named_modules():
        place = f"{name}.{path}" if path else name
        if module.training:
            raise ValueError(f"{place} is in train mode; call .eval() on the denoiser first.")
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            raise ValueError(
                f"{place} has an accelerate hook ({type(hook).__name__}), which a captured graph would bypass; "
                "remove offloading (accelerate.hooks.remove_hook_from_module, recurse=True) and move it to its device."
            )
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and getattr(registry, "hooks", None):
            raise ValueError(
                f"{place} has a diffusers hook ({', '.join(registry.hooks)}), which a captured graph would bypass; "
                "disable caching, layerwise casting or group offloading first."
            )
    check_autocast()


def check_autocast() -> None:
    """Raises ValueError under torch.autocast."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise ValueError("autocast is active, which a capture does not see; cast the denoiser with .to(dtype) instead.")


def _dense(tensor: Tensor) -> Tensor:
    """Expanded and otherwise strided inputs as contiguous ones; channels_last stays."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


def _hashable(leaf: Any, model: nn.Module) -> Any:
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"{type(model).__name__} was called with a {type(leaf).__name__}, which a capture cannot hold; "
            "pass tensors, numbers, strings, None, or lists and dicts of these."
        ) from None
    return leaf
