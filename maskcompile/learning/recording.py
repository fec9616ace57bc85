"""Record sampling passes: what the denoiser is called with at each step, and what comes out in the end.

All that is known of a sampler is that ``sample(seed)`` calls the denoiser. During a pass the denoiser's ``forward`` is another
function, and afterwards what it was.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maskcompile.learning.trajectories import rehearse
from maskcompile.runs import Runs
from maskcompile.signature import Call, bind, check_autocast
from passes.capture import first_parameter

#: One sampling pass that calls the denoiser; what it returns is compared where there are tensors, arrays or pictures in it.
Sample = Callable[[int], Any]
_ABSENT = object()
#: Calls back to look for a tensor that is given again: more than guidance or a 2nd-order solver makes in a step.
MOST_ALIKE = 8


@dataclass(frozen=True)
class RecordedCall:
    """A call of the denoiser, with copies of its inputs, and the tensors that it returned.

    begun: the step at which its trajectory began, see ``trajectories``.
    """

    call: Call
    results: tuple[Tensor, ...]
    begun: int = 0


@dataclass(frozen=True)
class Recording:
    """One sampling pass. steps: the calls at each timestep, in sampling order. outcome: see ``outcome``."""

    seed: int
    timesteps: tuple[float, ...]
    steps: tuple[tuple[RecordedCall, ...], ...]
    outcome: Tensor

    @property
    def begun(self) -> tuple[tuple[int, ...], ...]:
        """For each call of each step, the step at which its trajectory began."""
        return tuple(tuple(recorded.begun for recorded in calls) for calls in self.steps)


@contextmanager
def replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``model(...)`` calls ``forward`` instead of the model's own within; its signature still looks like the model's."""
    own = instance_forward(model)
    _set_forward(model, functools.wraps(model.forward)(lambda *args, **kwargs: forward(*args, **kwargs)))
    try:
        yield
    finally:
        _set_forward(model, own)


@contextmanager
def restored_forward(model: nn.Module, own: object) -> Iterator[None]:
    """Within ``replaced_forward``, the model as it was outside: ``own`` is what ``instance_forward`` said there."""
    replaced = instance_forward(model)
    _set_forward(model, own)
    try:
        yield
    finally:
        _set_forward(model, replaced)


def instance_forward(model: nn.Module) -> object:
    """The ``forward`` that somebody put on the instance itself, or a mark that nobody did."""
    return vars(model).get("forward", _ABSENT)


def _set_forward(model: nn.Module, forward: object) -> None:
    if forward is _ABSENT:
        vars(model).pop("forward", None)
    else:
        vars(model)["forward"] = forward


def record(model: nn.Module, sample: Sample, seed: int, timestep: str | None = None) -> Recording:
    """Run ``sample(seed)`` and record the calls of ``model``.

    Raises ValueError for a pass that never calls the denoiser, or whose timesteps do not rise or fall throughout, and
    FloatingPointError where the denoiser or the outcome is not finite; whatever ``sample`` raises is raised as it is.
    """
    calls: list[RecordedCall] = []
    values: list[float] = []
    runs = Runs()
    forward, signature = model.forward, inspect.signature(model.forward)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        check_autocast()
        call = bind(model, args, kwargs, signature, timestep)
        if call.timestep is None:
            raise ValueError(
                f"{type(model).__name__}.forward has no timestep among its arguments; pass learn(..., timestep='its name')."
            )
        if (value := _value(call.timestep)) not in values[-1:]:
            values.append(value)
        runs, begun = rehearse(runs, model, call, len(values) - 1)
        with torch.inference_mode(False):  # copies that a gradient may flow through later
            copied = _copy(call, [t for c in calls[-MOST_ALIKE:] for t in c.call.tensors])
        with torch.no_grad():
            result = forward(*args, **kwargs)
            with torch.inference_mode(False):
                calls.append(RecordedCall(copied, _tensors(result), begun))
        return result

    with replaced_forward(model, recorded):
        returned = sample(seed)
    if not calls:
        raise ValueError(
            f"sample({seed}) never called the denoiser; it must call the very {type(model).__name__} that learn is given."
        )
    timesteps, steps = _by_timestep(calls)
    for step, group in enumerate(steps):
        if not all(t.isfinite().all() for c in group for t in c.results):
            raise FloatingPointError(
                f"the denoiser's output is not finite at step {step} (timestep {timesteps[step]:g}) of sample({seed}), "
                "without any mask."
            )
    came_to = outcome(model, returned, calls[-1])
    if not came_to.isfinite().all():
        raise FloatingPointError(
            f"what sample({seed}) returned is not finite, although the denoiser's outputs are; is a decoder in half precision?"
        )
    return Recording(seed, timesteps, steps, came_to)


def outcome_of(
    model: nn.Module,
    sample: Sample,
    seed: int,
    forward: Callable[..., Any],
    timestep: str | None = None,
    first: Sequence[Call] = (),
) -> Tensor:
    """What ``sample(seed)`` comes to where ``forward`` stands for the denoiser's: see ``outcome``.

    first: the first calls of the recorded pass; raises ValueError where one of them is another this time.
    """
    last: list[RecordedCall] = []
    expected = iter(first)

    def watched(*args: Any, **kwargs: Any) -> Any:
        call = _copy(bind(model, args, kwargs, signature, timestep), [])  # before the sampler changes its tensors in place
        if (known := next(expected, None)) is not None and not _alike(call, known):
            raise ValueError(
                f"sample({seed}) called the denoiser with other values when it was run again; it must do the same for the same "
                "seed, so let all noise come from a generator with that seed."
            )
        result = forward(*args, **kwargs)
        last[:] = [RecordedCall(call, _tensors(result))]
        return result

    signature = inspect.signature(model.forward)
    with replaced_forward(model, watched):
        returned = sample(seed)
    if not last:
        raise ValueError(f"sample({seed}) did not call the denoiser when it was run again; it must at every call.")
    return outcome(model, returned, last[0])


def _alike(call: Call, other: Call) -> bool:
    """Whether two calls are given the same values, but for what kernels round otherwise from run to run."""
    if len(call.tensors) != len(other.tensors):
        return False
    return all(
        a.shape == b.shape and (a.float() - b.float()).norm() <= 0.01 * b.float().norm()
        for a, b in zip(call.tensors, other.tensors, strict=True)
    )


def outcome(model: nn.Module, returned: Any, last: RecordedCall) -> Tensor:
    """float32 [elements, numbers]: what a pass came to, as far as it can be compared.

    The floating-point tensors, arrays and pictures that ``sample`` returned, apart by their first dimension; where it returned
    none, the denoiser's last input and output, which the sampler makes the final sample of.
    """
    found = [t for t in map(_comparable, _leaves(returned)) if t is not None and t.numel()]
    if not found:  # the inputs' batch may hold two copies of the sample, for guidance
        noisy = last.call.tensors[first_parameter(model, last.call.args, last.call.kwargs)]
        found = [t for t in (noisy, *last.results) if t.is_floating_point()]
    size = {len(t) if t.dim() > 1 else 1 for t in found}
    together = len(size) == 1
    rows = [t.detach().float().cpu().reshape(len(t) if together and t.dim() > 1 else 1, -1) for t in found]
    return torch.cat(rows, dim=1)


def _leaves(returned: Any) -> list[Any]:
    """The leaves of a result; outputs of diffusers' pipelines are dictionaries, and lists of pictures one array."""
    leaves: list[Any] = []
    for leaf in pytree.tree_leaves(returned, is_leaf=lambda x: isinstance(x, list) and x != [] and hasattr(x[0], "getbands")):
        if isinstance(leaf, list):
            leaves.append(np.stack([np.asarray(picture, dtype=np.float32) for picture in leaf]))
        elif hasattr(leaf, "getbands"):
            leaves.append(np.asarray(leaf, dtype=np.float32)[None])
        elif hasattr(leaf, "to_tuple"):
            leaves.extend(_leaves(leaf.to_tuple()))
        else:
            leaves.append(leaf)
    return leaves


def _comparable(leaf: Any) -> Tensor | None:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fu":
        leaf = torch.from_numpy(leaf.astype(np.float32))
    return leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else None


def _copy(call: Call, known: Sequence[Tensor]) -> Call:
    """The call with tensors of its own; those that are given again and again (text embeddings, say) are shared."""

    def own(tensor: Tensor) -> Tensor:
        for other in known:
            if other.shape == tensor.shape and other.dtype == tensor.dtype and torch.equal(other, tensor):
                return other
        return tensor.detach().clone()

    kept = [own(t) for t in call.tensors]
    position = {id(t): i for i, t in enumerate(call.tensors)}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: kept[position[id(t)]], (call.args, call.kwargs))
    timestep = None if call.timestep is None else call.timestep.detach().clone()
    return Call(args, kwargs, tuple(kept), call.key, timestep, tuple(kept))


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(leaf.detach().clone() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def _value(timestep: Tensor) -> float:
    values = timestep.reshape(-1)
    if not values.numel() or not bool((values == values[0]).all()):
        raise ValueError("the denoiser was called with different timesteps in one batch; a mask has one row a timestep.")
    return float(values[0])


def _by_timestep(calls: Sequence[RecordedCall]) -> tuple[tuple[float, ...], tuple[tuple[RecordedCall, ...], ...]]:
    timesteps: list[float] = []
    steps: list[list[RecordedCall]] = []
    for recorded in calls:
        assert recorded.call.timestep is not None
        value = _value(recorded.call.timestep)
        if not timesteps or value != timesteps[-1]:
            timesteps.append(value)
            steps.append([])
        steps[-1].append(recorded)
    rises = np.diff(timesteps) > 0
    if rises.any() and not rises.all():
        at = int(np.flatnonzero(rises != rises[0])[0])
        raise ValueError(
            f"a sampling pass must go through its timesteps in one direction; this one went {timesteps[at]:g}, "
            f"{timesteps[at + 1]:g}, {timesteps[at + 2]:g}. Let sample(seed) run one pass."
        )
    return tuple(timesteps), tuple(map(tuple, steps))
