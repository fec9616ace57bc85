"""What a denoiser and a mask cost: multiply-accumulates and cache memory, counted without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from maskcompile.mask import Mask, MaskError, check_blocks
from maskcompile.program import Program
from maskcompile.signature import bind
from passes.dependencies import Slots, slot_dependencies
from passes.knowledge import KNOWLEDGE, apply_knowledge
from passes.plan import Plan, plan_run, share_graphs
from passes.rectify import Compute
from passes.rectify import rectify as _rectify
from passes.state import kept_state


def count_macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of one call, by ``FlopCounterMode`` under fake tensors: nothing is computed or allocated.

    Convolutions, matrix products and both products of attention count; two FLOPs are one multiply-accumulate.
    """
    call = bind(model, args, kwargs)
    with kept_state(model), FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

        state = {name: fake(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        args, kwargs = pytree.tree_map(fake, (call.args, call.kwargs))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, state, args, kwargs)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Cost:
    """What a run under a mask costs, batch of the traced inputs.

    full_macs: one run without a mask. macs: with it. step_macs: each step. cache_bytes: held after each step.
    graphs: distinct specialised graphs.
    """

    full_macs: int
    macs: int
    step_macs: tuple[int, ...]
    cache_bytes: tuple[int, ...]
    graphs: int

    @property
    def share(self) -> float:
        """MACs of the run under the mask as a share of the run without it."""
        return self.macs / self.full_macs if self.full_macs else 1.0

    @property
    def peak_cache_bytes(self) -> int:
        """Bytes of the fullest cache, after whichever step that is."""
        return max(self.cache_bytes)


def slots_of(program: Program, mask: Mask) -> Slots:
    """The slot graph for the blocks of ``mask``. Raises MaskError when the program has no record of one of them."""
    check_blocks(program.capture, mask)
    known = {call.block for call in program.capture.calls}
    if missing := [block for block in mask.blocks if block not in known]:
        raise MaskError(
            f"the program has no block {missing[0]!r}; trace the denoiser with blocks= that include it, "
            "or check the mask's names."
        )
    return slot_dependencies(program.capture, mask.blocks)


def plans_of(program: Program, mask: Mask) -> tuple[Slots, list[Plan]]:
    """The plans of a whole run under the mask."""
    slots = slots_of(program, mask)
    return slots, plan_run(slots, mask.blocks, mask.compute, mask.rules)


def cost(program: Program, mask: Mask) -> Cost:
    """MACs, cache memory and distinct graphs of a whole run under ``mask``, at the batch that ``program`` was traced with.

    Raises MaskError when the mask has a block that the program has no record of.
    """
    slots, plans = plans_of(program, mask)
    return Cost(
        full_macs=slots.total_macs * mask.steps,
        macs=sum(plan.macs for plan in plans),
        step_macs=tuple(plan.macs for plan in plans),
        cache_bytes=tuple(plan.held_bytes for plan in plans),
        graphs=len(set(share_graphs(plans, {}).values())),
    )


def rectify(mask: Mask, program: Program, rules: Sequence[str] = ()) -> Mask:
    """The cheapest mask that gives bit-identical results, True only where a block has to run; cheaper still by ``rules``.

    Liveness on the denoiser unrolled over steps is lossless (see ``passes.rectify``). ``optimize`` applies it by itself, so
    that rectifying first changes no result and no speed, only what the mask says. rules: names of knowledge-guided rules,
    which change results a little ("reused_inputs", "reused_consumers"; see ``passes.knowledge``), applied before.

    Raises MaskError for a rule that does not exist, or a block that the program has no record of.
    """
    if unknown := [rule for rule in rules if rule not in KNOWLEDGE]:
        raise MaskError(f"a rule of rectification is one of {', '.join(map(repr, KNOWLEDGE))}; got {unknown[0]!r}.")
    compute = by_knowledge(program, mask.blocks, mask.compute, rules)
    slots = slots_of(program, mask)
    cheapest, own = (_rectify(slots, mask.blocks, rows, mask.rules) for rows in (compute, mask.compute))
    reach = mask.reach if (cheapest == own).all() else None
    return mask.replace(cheapest, reach=reach, rectified=[*rules, "liveness"])


def by_knowledge(program: Program, blocks: Sequence[str], compute: Compute, rules: Sequence[str]) -> Compute:
    """``passes.knowledge.apply_knowledge`` for a program."""
    return apply_knowledge(program.dependencies, f"input:{program.capture.sample.name}", blocks, compute, rules)
