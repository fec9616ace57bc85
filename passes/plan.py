"""Pass 5: plans. What each step of a run does after rectification, and which plans can share one graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from passes.capture import Slot
from passes.dependencies import Slots
from passes.rectify import Compute, liveness, running_calls


@dataclass(frozen=True)
class Plan:
    """What one step does.

    computed: blocks of which something is computed. reads: slots taken from the cache. stores: slots put into it.
    held: slots in the cache after the step (those that a later step reads). macs: multiply-accumulates of the step.
    held_bytes: size of the cache after the step.
    """

    computed: tuple[str, ...]
    reads: tuple[Slot, ...]
    stores: tuple[Slot, ...]
    held: frozenset[Slot]
    macs: int
    held_bytes: int

    @property
    def reused(self) -> tuple[str, ...]:
        """Blocks of which the step reads a stored output."""
        return tuple(dict.fromkeys(slot.block for slot in self.reads))


@dataclass(frozen=True)
class GraphKey:
    """What tells one specialised graph from another: the slots that enter it and those that it returns."""

    reads: tuple[Slot, ...]
    stores: tuple[Slot, ...]


def plan_run(slots: Slots, blocks: Sequence[str], compute: Compute) -> list[Plan]:
    """One plan a step, for a run that starts with nothing stored. compute: bool [steps, len(blocks)]."""
    plans = []
    for live in liveness(slots, running_calls(slots, blocks, compute)):
        plans.append(
            Plan(
                computed=tuple(dict.fromkeys(c.block for c in slots.calls if not live.computed.isdisjoint(c.slots))),
                reads=tuple(sorted(live.read)),
                stores=tuple(sorted(live.stored)),
                held=live.held,
                macs=slots.macs_of(live.computed),
                held_bytes=sum(slots.size[slot] for slot in live.held),
            )
        )
    return plans


def share_graphs(plans: Iterable[Plan], known: Mapping[Plan, GraphKey]) -> dict[Plan, GraphKey]:
    """The graph of each plan, as few as possible without computing anything more; plans in ``known`` keep theirs.

    A plan that stores less than another one, and else does the same work, runs the other's graph and lets go of the surplus.
    """
    graphs = dict(known)
    for plan in sorted(set(plans) - set(known), key=lambda plan: (-len(plan.stores), plan.reads, plan.stores)):
        fitting = (
            key
            for other, key in graphs.items()
            if key.reads == plan.reads and other.macs == plan.macs and set(key.stores) >= set(plan.stores)
        )
        graphs[plan] = next(fitting, None) or GraphKey(plan.reads, plan.stores)
    return graphs
