"""Knowledge-guided rectification: rules that change results a little, and cost less (arXiv 2603.19939).

Each rule is a function over the block graph (``passes.dependencies.block_dependencies``) that turns decisions to compute into
decisions to reuse, never the reverse. They know what reads what, over blocks (space) and steps (time), and not how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import networkx as nx

from passes.dependencies import OUTPUT
from passes.rectify import Compute

#: (block graph, name of the sample's node in it, blocks, compute) -> compute, bool [steps, len(blocks)]
Rule = Callable[[nx.DiGraph, str, Sequence[str], Compute], Compute]


def reused_inputs(graph: nx.DiGraph, sample: str, blocks: Sequence[str], compute: Compute) -> Compute:
    """Reuse a block all of whose block inputs are reused, each from no later than the block's own last computation.

    It has seen these inputs, or newer ones, when it was last computed, and would see only a new time embedding. A block that
    reads the sample itself is left, since the sample changes at every step.
    """
    result = compute.copy()
    sources = {b: [p for p in graph.predecessors(b) if p in set(blocks)] if b in graph else [] for b in blocks}
    column = {block: index for index, block in enumerate(blocks)}
    eligible = [b for b in _in_order(graph, blocks) if sources[b] and sample not in graph.predecessors(b)]
    last = dict.fromkeys(blocks, -1)
    for step, row in enumerate(result):
        for block in eligible:
            if row[column[block]] and last[block] >= 0:
                row[column[block]] = any(row[column[p]] or last[p] > last[block] for p in sources[block])
        last |= {block: step for block in blocks if row[column[block]]}
    return result


def reused_consumers(graph: nx.DiGraph, sample: str, blocks: Sequence[str], compute: Compute) -> Compute:
    """Reuse a block at a step at which every block that reads it is reused, and the result does not read it.

    Nothing of this step depends on it; it was computed only for a later reuse.
    """
    result = compute.copy()
    column = {block: index for index, block in enumerate(blocks)}
    known = [b for b in reversed(_in_order(graph, blocks)) if OUTPUT not in graph.successors(b)]
    readers = {b: [column[s] for s in graph.successors(b) if s in column] for b in known}
    for row in result[1:]:  # the first step computes whatever is read
        for block in known:
            row[column[block]] &= bool(row[readers[block]].any())
    return result


#: By name, in the order in which they are applied.
KNOWLEDGE: dict[str, Rule] = {"reused_inputs": reused_inputs, "reused_consumers": reused_consumers}


def apply_knowledge(graph: nx.DiGraph, sample: str, blocks: Sequence[str], compute: Compute, rules: Sequence[str]) -> Compute:
    """Apply rules of ``KNOWLEDGE`` until none changes anything: bool [steps, len(blocks)].

    Raises KeyError for a rule that does not exist.
    """
    wanted = [rule for name, rule in KNOWLEDGE.items() if name in {*rules}]
    if unknown := set(rules) - set(KNOWLEDGE):
        raise KeyError(sorted(unknown)[0])
    while True:
        before = compute
        for rule in wanted:
            compute = rule(graph, sample, blocks, compute)
        if (compute == before).all():
            return compute


def _in_order(graph: nx.DiGraph, blocks: Sequence[str]) -> list[str]:
    """The blocks in an order of the graph, where it has one: a block called several times a step may make a cycle."""
    if not nx.is_directed_acyclic_graph(graph):
        return [b for b in blocks if b in graph]
    wanted = set(blocks)
    return [b for b in nx.topological_sort(graph) if b in wanted]
