"""Masks on denoisers that torch.export cannot capture, or whose weights hooks move about while they run (offloading): blocks
are skipped module by module, in eager PyTorch.

During a call the ``forward`` of every block is another function, which returns what the reuse rule makes of the block's last
outputs where the mask reuses it, and keeps them where a later step does. Afterwards the modules are as they were. Results are
those of the specialised graphs; what is missing is all that needs a graph: compilation, and leaving out what only reused
blocks read.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maskcompile.mask import MaskError
from maskcompile.signature import Call, describe
from passes.reuse import Recall, Rules

#: The n-th call of a block within a step.
BlockCall = tuple[str, int]


class Outputs(NamedTuple):
    """What a call of a block returned at its last computations, the newest first, one or two.

    steps: at which it was computed, rising, the last two. leaves: of each output, in pytree order. inner: how often other
    blocks are called within one computation, which happens no more when it is reused.
    """

    steps: tuple[int, ...]
    leaves: tuple[tuple[Any, ...], ...]
    spec: pytree.TreeSpec
    inner: Mapping[str, int]


#: What a run holds after a step.
Cache = Mapping[BlockCall, Outputs]


@dataclass(frozen=True)
class Uncaptured:
    """A denoiser at one input signature of which there is no graph.

    leaves, spec: of (args, kwargs) in canonical form, TENSOR for the tensors. reason: what the capture said. hooked: whether
    only because of hooks that move weights about. of_mask: whether only because of blocks that the mask names.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    described: str
    reason: str
    hooked: bool
    of_mask: bool

    @staticmethod
    def of(call: Call, reason: str, hooked: bool, of_mask: bool) -> Uncaptured:
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        kept = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return Uncaptured(kept, spec, describe(call), reason, hooked, of_mask)

    def arguments(self, tensors: Sequence[Tensor]) -> Any:
        """(args, kwargs) with these tensors."""
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if leaf is TENSOR else leaf for leaf in self.leaves], self.spec)


#: Stands for a tensor among arguments.
TENSOR = object()


@dataclass(frozen=True)
class _Results:
    """Stands where ``maskcompile.steps.Graph`` does: all outputs of a step are the denoiser's results."""

    called: bool = True
    results: int | None = None


@dataclass(frozen=True)
class ModuleStep:
    """A step that can be executed; see ``maskcompile.steps.Step``. position: in the run."""

    run: ModuleRun
    position: int
    reuses: bool
    graph: _Results = field(default_factory=_Results)

    def __call__(self, inputs: Sequence[Tensor], cache: tuple[Any, ...]) -> tuple[Sequence[Any], tuple[Any, ...]]:
        before: Cache = cache[0] if cache else {}
        result, after = self.run.execute(inputs, before, self.position)
        return (result,), (after,) if after else ()


@dataclass
class ModuleRun:
    """The steps of a run under a mask; stands where ``maskcompile.steps.Schedule`` does.

    compute: bool [steps, blocks]. steps: stays empty, so that whoever executes one holds the denoiser's lock: forwards are
    replaced in the model itself.
    """

    model: nn.Module
    like: Uncaptured
    blocks: tuple[str, ...]
    compute: NDArray[np.bool_]
    rules: Rules
    steps: dict[int, ModuleStep] = field(default_factory=dict)

    def step(self, position: int) -> ModuleStep:
        return ModuleStep(self, position, bool(position) and not self.compute[position].all())

    @staticmethod
    def assemble(outputs: Sequence[Any]) -> Any:
        (result,) = outputs
        return result

    def execute(self, tensors: Sequence[Tensor], before: Cache, position: int) -> tuple[Any, Cache]:
        """(the denoiser's result, what the run holds afterwards). tensors: of the call, in pytree order."""
        stored = dict(before)
        args, kwargs = self.like.arguments(tensors)
        with _replaced_forwards(self, stored, position):
            result = self.model(*args, **kwargs)
        later = {block for column, block in enumerate(self.blocks) if not self.compute[position + 1 :, column].all()}
        return result, {call: outputs for call, outputs in stored.items() if call[0] in later}


@contextmanager
def _replaced_forwards(run: ModuleRun, stored: dict[BlockCall, Outputs], position: int) -> Iterator[None]:
    """Within, the blocks do what the mask says for the step at ``position``, if called by this thread."""
    modules = [run.model.get_submodule(block) for block in run.blocks]
    own = [vars(module).get("forward") for module in modules]
    row = [bool(computes) for computes in run.compute[position]]
    called: Counter[str] = Counter()
    thread = threading.get_ident()

    def replacement(column: int, computes: bool, forward: Callable[..., Any]) -> Callable[..., Any]:
        block, extrapolates = run.blocks[column], run.rules.of_block[column] == "linear"

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return forward(*args, **kwargs)
            call = block, called[block]
            called[block] += 1
            known = stored.get(call)
            if known is not None and not computes:
                called.update(known.inner)
                return _remade(known, run.rules.recall(column, known.steps, position))
            outside = called.copy()
            output = forward(*args, **kwargs)
            stored[call] = _stored(block, output, position, known if extrapolates else None, called - outside)
            return output

        return replaced

    try:
        for column, (module, computes) in enumerate(zip(modules, row, strict=True)):
            vars(module)["forward"] = replacement(column, computes, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def _stored(block: str, output: Any, position: int, known: Outputs | None, inner: Mapping[str, int]) -> Outputs:
    """Copies, for the denoiser may change its tensors in place."""
    leaves, spec = pytree.tree_flatten(output)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise MaskError(
            f"block {block!r} returns no tensor that torch's pytree can see, so nothing of it can be reused; "
            "use the blocks within it, or register its return type with torch.utils._pytree."
        )
    newest = tuple(leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    if known is None or not _alike(newest, known.leaves[0]):
        return Outputs((position,), (newest,), spec, dict(inner))
    return Outputs((known.steps[-1], position), (newest, known.leaves[0]), spec, dict(inner))


def _alike(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two outputs can be extrapolated: not where a denoiser sends on what the values tell it to."""
    shapes = [[leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves] for leaves in (ours, theirs)]
    return shapes[0] == shapes[1]


def _remade(known: Outputs, how: Recall) -> Any:
    """What stands for an output that is reused, in tensors of its own."""
    newest = known.leaves[0]
    if how.before is None:
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in newest]
    else:
        leaves = [_extrapolated(last, before, how.c) for last, before in zip(*known.leaves, strict=True)]
    return pytree.tree_unflatten(leaves, known.spec)


def _extrapolated(last: Any, before: Any, c: float) -> Any:
    """``last + c (last - before)`` as ``passes.specialise.extrapolate`` has it in a graph."""
    if not isinstance(last, Tensor):
        return last
    if not (last.is_floating_point() or last.is_complex()):
        return last.clone()
    wide = torch.promote_types(last.dtype, torch.float32)
    factor = torch.tensor(c, dtype=torch.float64 if wide in (torch.float64, torch.complex128) else torch.float32)
    value = (last.to(wide) + (last.to(wide) - before.to(wide)) * factor.to(last.device)).to(last.dtype)
    return torch.where(value.isfinite(), value, last)


def block_names(model: nn.Module) -> list[str]:
    """Names for a mask of a denoiser that ``trace`` cannot capture, from its module tree alone.

    The parts with at least two weight matrices of the elements of its outermost module lists: attention and feed-forward
    of a transformer's layers. An element without several such parts is a block itself. ``trace(model, ...).names`` is better
    wherever it works: it sees which modules depend on the noisy sample.
    """
    return [name for path, module in model.named_children() for name in _parts(path, module, within=False)]


def _parts(path: str, module: nn.Module, within: bool) -> list[str]:
    """within: whether the module belongs to an element of a list."""
    children = [(f"{path}.{name}", child) for name, child in module.named_children()]
    if isinstance(module, nn.ModuleList):
        return [name for at, child in children for name in _parts(at, child, within=True)]
    if not within:
        return [name for at, child in children for name in _parts(at, child, within=False)]
    heavy = [(at, child) for at, child in children if _matrices(child) >= 2]
    if not heavy:
        return [path] if _matrices(module) >= 2 else []
    lists = [(at, child) for at, child in heavy if isinstance(child, nn.ModuleList)]
    if lists or (len(heavy) == 1 and 2 * _matrices(heavy[0][1]) >= _matrices(module)):
        return [name for at, child in lists or heavy for name in _parts(at, child, within=True)]
    return [at for at, _ in heavy]


def _matrices(module: nn.Module) -> int:
    return sum(parameter.dim() >= 2 for parameter in module.parameters())
