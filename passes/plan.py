"""Pass 6: plans. What each step of a run does after rectification, and which plans can share one graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from passes.capture import Slot
from passes.dependencies import Slots
from passes.rectify import Compute, Version, liveness, simulate, versions
from passes.reuse import Rules


@dataclass(frozen=True)
class GraphKey:
    """What tells one specialised graph from another: what enters it and what it returns.

    reads: reused slots, each with the number of its versions that enter: 1 is held, 2 are extrapolated. stores: slots that it
    returns. macs: multiply-accumulates that follow from these.
    """

    reads: tuple[tuple[Slot, int], ...]
    stores: tuple[Slot, ...]
    macs: int = field(compare=False)


@dataclass(frozen=True)
class Plan:
    """What one step does.

    computed: blocks of which something is computed. slots: what is computed of them, with OUTPUT. key: of the graph that does
    it. inputs: versions taken from the cache, for each of ``key.reads`` the newest first. coefficients: the c of each read of
    two versions, see ``passes.reuse``. held: versions in the cache after the step (those that a later step reads). held_bytes:
    size of the cache after the step.
    """

    computed: tuple[str, ...]
    slots: frozenset[Slot | str]
    key: GraphKey
    inputs: tuple[Version, ...]
    coefficients: tuple[float, ...]
    held: frozenset[Version]
    held_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the step."""
        return self.key.macs

    @property
    def reused(self) -> tuple[str, ...]:
        """Blocks of which the step reads a stored output."""
        return tuple(dict.fromkeys(slot.block for slot, _ in self.key.reads))


def plan_run(
    slots: Slots,
    blocks: Sequence[str],
    compute: Compute,
    rules: Rules,
    also: Sequence[frozenset[Slot | str]] | None = None,
) -> list[Plan]:
    """One plan a step, for a run that starts with nothing stored.

    compute: bool [steps, len(blocks)]. rules: of reuse, for these blocks and steps.
    also: slots to compute at each step in any case, see ``passes.rectify.liveness``.
    """
    plans = []
    for live in liveness(slots, simulate(slots, blocks, compute, rules), also):
        inputs = {slot: versions(slot, made) for slot, made in live.read.items()}
        reads = tuple((slot, len(entering)) for slot, entering in inputs.items())
        plans.append(
            Plan(
                computed=tuple(dict.fromkeys(c.block for c in slots.calls if not live.computed.isdisjoint(c.slots))),
                slots=live.computed,
                key=GraphKey(reads, tuple(sorted(live.stored)), slots.macs_of(live.computed)),
                inputs=tuple(version for entering in inputs.values() for version in entering),
                coefficients=tuple(made.c for made in live.read.values() if made.before is not None),
                held=live.held,
                held_bytes=sum(slots.size[version.slot] for version in live.held),
            )
        )
    return plans


def share_graphs(plans: Iterable[Plan], known: Mapping[GraphKey, GraphKey]) -> dict[GraphKey, GraphKey]:
    """The graph to run for the key of each plan, as few as possible without computing anything more; those in ``known`` stay.

    A plan that stores less than another one, and else does the same work, runs the other's graph and lets go of the surplus.
    """
    graphs = dict(known)
    new = {plan.key for plan in plans} - set(known)
    for key in sorted(new, key=lambda key: (-len(key.stores), key.reads, key.stores)):
        fitting = (
            graph
            for own, graph in graphs.items()
            if graph.reads == key.reads and own.macs == key.macs and set(graph.stores) >= set(key.stores)
        )
        graphs[key] = next(fitting, key)
    return graphs
