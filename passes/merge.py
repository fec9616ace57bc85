"""Fewer graphs, between passes 6 and 7: rows of a mask merged upwards, until all plans of a run share a given number of graphs.

A merged row computes what any of its rows computes, never less; reused outputs are the fresher for it. Rows are merged two at a
time, each time the two that add the fewest multiply-accumulates over the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from passes.capture import Slot
from passes.dependencies import Slots
from passes.plan import GraphKey, Plan, plan_run
from passes.rectify import Compute, rectify
from passes.reuse import Rules

Row = tuple[bool, ...]


def merge_rows(
    slots: Slots,
    blocks: Sequence[str],
    compute: Compute,
    rules: Rules,
    most: int,
) -> Compute:
    """A mask of at most ``most`` different rows, bool [steps, len(blocks)], for a run that starts with nothing stored.

    compute, rules: as in ``plan_run``. The result is rectified, and True wherever a rectified ``compute`` is.
    """
    if most < 1:
        raise ValueError(f"a run needs at least one graph; got max_graphs={most}.")
    compute = rectify(slots, blocks, compute, rules)
    while True:
        merged = _merge(slots, compute, plan_run(slots, blocks, compute, rules), most)
        # What a merged row computes may read a block that has not run before its step: that runs too.
        compute = merged.copy()
        for row, plan in zip(compute, _plan(slots, blocks, merged, rules), strict=True):
            for call in slots.calls:
                if not plan.slots.isdisjoint(call.slots):
                    row[[blocks.index(block) for block, _ in [(call.block, call.call), *call.enclosing]]] = True
        if np.array_equal(compute, merged):
            return merged


def plan_merged(slots: Slots, blocks: Sequence[str], compute: Compute, rules: Rules, most: int) -> list[Plan]:
    """As ``plan_run``, but with at most ``most`` graphs, for a mask made by ``merge_rows`` with the same number.

    Where more would be needed, all steps of equal rows share one: if one of them has less to do than another, it does what the
    other does all the same.
    """
    plans = plan_run(slots, blocks, compute, rules)
    if len({plan.key for plan in plans}) <= most:
        return plans
    rows = [tuple(row) for row in compute.tolist()]
    plans = _plan(slots, blocks, compute, rules)
    keys: dict[Row, GraphKey] = {}
    for row, plan in zip(rows, plans, strict=True):
        keys[row] = _union(keys[row], plan.key) if row in keys else plan.key
    return [_with_key(plan, keys[row]) for row, plan in zip(rows, plans, strict=True)]


def _merge(slots: Slots, compute: Compute, plans: Sequence[Plan], most: int) -> Compute:
    """Rows merged two at a time."""
    rows: list[Row] = [tuple(row) for row in compute.tolist()]
    counts = Counter(rows)
    computed: dict[Row, frozenset[Slot | str]] = {}
    for row, plan in zip(rows, plans, strict=True):
        computed[row] = computed.get(row, frozenset()) | plan.slots
    macs = {row: slots.macs_of(needed) for row, needed in computed.items()}
    added: dict[tuple[Row, Row], int] = {}
    became = {row: row for row in counts}
    while len(counts) > most:
        for pair in combinations(sorted(counts), 2):
            if pair not in added:
                together = slots.macs_of(computed[pair[0]] | computed[pair[1]])
                added[pair] = sum(counts[row] * (together - macs[row]) for row in pair)
        first, second = min(added, key=lambda pair: (added[pair], pair))
        union = tuple(a or b for a, b in zip(first, second, strict=True))
        gone = {first, second, union}
        needed = computed[first] | computed[second] | computed.get(union, frozenset())
        count = sum(counts.pop(row, 0) for row in gone)
        counts[union], computed[union], macs[union] = count, needed, slots.macs_of(needed)
        became = {row: union if now in gone else now for row, now in became.items()}
        added = {pair: cost for pair, cost in added.items() if gone.isdisjoint(pair)}
    return np.array([became[row] for row in rows])


def _plan(slots: Slots, blocks: Sequence[str], compute: Compute, rules: Rules) -> list[Plan]:
    """Plans in which steps of equal rows compute the same, as far as their calls run."""
    rows: list[Row] = [tuple(row) for row in compute.tolist()]
    needed: dict[Row, frozenset[Slot | str]] = dict.fromkeys(rows, frozenset())
    while True:
        plans = plan_run(slots, blocks, compute, rules, [needed[row] for row in rows])
        before = dict(needed)
        for row, plan in zip(rows, plans, strict=True):
            needed[row] |= plan.slots
        if needed == before:
            return plans


def _union(one: GraphKey, other: GraphKey) -> GraphKey:
    """What both return, from as many versions of the same reads as either takes."""
    assert one.macs == other.macs
    reads = tuple((slot, max(a, b)) for (slot, a), (_, b) in zip(one.reads, other.reads, strict=True))
    return GraphKey(reads, tuple(sorted({*one.stores, *other.stores})), one.macs)


def _with_key(plan: Plan, key: GraphKey) -> Plan:
    """The plan, for a graph that takes more versions than it has: where one was held, it enters twice with a c of 0."""
    inputs, coefficients = iter(plan.inputs), iter(plan.coefficients)
    given, factors = [], []
    for (_, has), (_, takes) in zip(plan.key.reads, key.reads, strict=True):
        versions = [next(inputs) for _ in range(has)]
        given += versions + versions[-1:] * (takes - has)
        if takes == 2:
            factors.append(next(coefficients) if has == 2 else 0.0)
    return replace(plan, key=key, inputs=tuple(given), coefficients=tuple(factors))
