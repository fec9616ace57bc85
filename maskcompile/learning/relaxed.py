"""Steps of a denoiser with scores in the place of decisions, differentiable in the scores alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from maskcompile.captures import capture_once
from maskcompile.learning.recording import RecordedCall
from maskcompile.signature import Call, Key
from passes.capture import Capture, Slot
from passes.plan import GraphKey
from passes.relax import blendable, relax
from passes.reuse import Rules
from passes.specialise import specialise

#: What the blocks returned at a step, for each call of the step.
Features = list[dict[Slot, Tensor]]

#: What stands for it at a step, for each call; None where a call starts over and computes everything.
Recalled = list[dict[Slot, Tensor] | None]


@dataclass(frozen=True)
class _Graphs:
    capture: Capture
    slots: tuple[Slot, ...]
    observed: GraphModule
    relaxed: GraphModule
    results: int


class RelaxedDenoiser:
    """The graphs of a denoiser that learning needs, made once for each input signature. Weights get no gradients."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.model, self.blocks = model, tuple(blocks)
        self.graphs: dict[Key, _Graphs] = {}

    def observe(self, calls: Sequence[RecordedCall]) -> Features:
        """What the blocks of the denoiser itself return at a step."""
        features: Features = []
        with torch.no_grad():
            for recorded in calls:
                graphs = self._of(recorded.call)
                outputs = graphs.observed(*recorded.call.tensors)
                features.append(dict(zip(graphs.slots, outputs[graphs.results :], strict=True)))
        return features

    def error(self, calls: Sequence[RecordedCall], cached: Recalled, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(error, its gradient in ``scores``) of one step: one forward and one backward of the denoiser for each call.

        error: squared difference of the denoiser's outputs from the recorded ones, as a share of their power. scores: float32
        [blocks], 1 computes, 0 takes what ``cached`` has: the backward skips such blocks. Both results are detached.
        """
        through = [score != 0 for score in scores.tolist()]
        total, gradient = torch.zeros((), device=scores.device), torch.zeros_like(scores)
        for recorded, stored in zip(calls, cached, strict=True):
            if stored is None:
                continue
            graphs = self._of(recorded.call)
            own = scores.detach().clone().requires_grad_()
            weights = {name: p.detach() for name, p in graphs.relaxed.named_parameters()}
            with torch.enable_grad():
                inputs = (*recorded.call.tensors, *(stored[slot] for slot in graphs.slots), own, through)
                outputs = torch.func.functional_call(graphs.relaxed, weights, inputs)[: graphs.results]
                parts = [
                    (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-20)
                    for ours, theirs in zip(outputs, recorded.results, strict=True)
                    if theirs.is_floating_point()
                ]
                error = torch.stack(parts).mean() / len(calls)
                # Scaled: the gradient of a mean over many numbers would vanish in half precision.
                scale = float(sum(theirs.numel() for theirs in recorded.results))
                (slope,) = torch.autograd.grad(error * scale, own, allow_unused=True)
            total += error.detach()
            gradient += torch.zeros_like(gradient) if slope is None else slope / scale
        return total, gradient

    def _of(self, call: Call) -> _Graphs:
        graphs = self.graphs.get(call.key)
        if graphs is None:
            found = capture_once(self.model, call, self.blocks).capture
            slots = blendable(found, self.blocks)
            observed = specialise(found, GraphKey((), slots, 0))
            results = sum(isinstance(leaf, torch.fx.Node) for leaf in found.outputs)
            graphs = _Graphs(found, slots, observed, relax(found, self.blocks), results)
            self.graphs[call.key] = graphs
        return graphs


def recalled(
    blocks: Sequence[str],
    kept: Mapping[int, Features],
    ran: Sequence[Sequence[int]],
    step: int,
    begun: Sequence[int],
    rules: Rules,
) -> Recalled:
    """What stands for the outputs of the blocks at each of the calls of ``step``.

    kept: what the blocks returned at earlier steps. ran: for each block, the steps at which it counts as computed,
    rising. begun: the step at which the trajectory of each call began, where every block runs. rules: of reuse, for these
    blocks.
    """
    column = {block: index for index, block in enumerate(blocks)}
    features: Recalled = []
    for position, start in enumerate(begun):
        if start == step:
            features.append(None)
            continue
        cached: dict[Slot, Tensor] = {}
        for slot in kept[max(kept)][position]:
            index = column[slot.block]
            made = rules.recall(index, since(start, ran[index]), step)
            last = kept[made.last][position][slot]
            value = last if made.before is None else last + made.c * (last - kept[made.before][position][slot])
            cached[slot] = torch.where(value.isfinite(), value, last)
        features.append(cached)
    return features


def since(start: int, ran: Sequence[int]) -> list[int]:
    """The steps at which a block runs in a trajectory that began at ``start``."""
    return [start, *(at for at in ran if at > start)]
