"""Pass 3: who consumes whose output, as ``networkx`` graphs.

Two graphs. The slot graph is what the later passes work on: one node for each output tensor of each block call, an edge where
computing one needs the other, through glue (the operations outside every block). The block graph is what people look at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch.fx import Node

from passes.blocks import Block, tensor_info, value_inputs
from passes.capture import BlockCall, Capture, Slot

#: The node of the slot graph and the block graph that stands for the denoiser's result.
OUTPUT = "output"

_CONCATENATIONS = (torch.ops.aten.cat, torch.ops.aten.concat, torch.ops.aten.concatenate)


@dataclass(frozen=True)
class Slots:
    """The slot graph of some blocks of a capture.

    needs: the slots (reused or computed) that computing a slot, or OUTPUT, reads directly.
    work: the nodes with MACs between a slot, or OUTPUT, and the slots that it reads.
    size: bytes of each slot.
    dtype: of each slot.
    calls: the calls of these blocks in the order in which they returned, enclosing calls restricted to these blocks.
    """

    needs: dict[Slot | str, frozenset[Slot]]
    work: dict[Slot | str, frozenset[Node]]
    size: dict[Slot, int]
    dtype: dict[Slot, torch.dtype]
    calls: tuple[BlockCall, ...]
    macs: dict[Node, int]

    @property
    def total_macs(self) -> int:
        """MACs of one step that computes everything its result depends on."""
        return self.macs_of(self.reach(frozenset(), frozenset())[0])

    def macs_of(self, computed: Iterable[Slot | str]) -> int:
        """MACs of computing the given slots (and OUTPUT) with shared work counted once."""
        nodes: set[Node] = set()
        for slot in computed:
            nodes |= self.work[slot]
        return sum(self.macs[node] for node in nodes)

    def numel(self, slot: Slot) -> int:
        """How many numbers a slot holds."""
        return self.size[slot] // self.dtype[slot].itemsize

    def reach(self, reused: frozenset[Slot], stored: frozenset[Slot]) -> tuple[set[Slot | str], set[Slot]]:
        """(what must be computed, which of ``reused`` are read) for one step that returns its result and ``stored``."""
        computed: set[Slot | str] = {OUTPUT, *stored}
        read: set[Slot] = set()
        pending = list(computed)
        while pending:
            for slot in self.needs[pending.pop()]:
                if slot in reused:
                    read.add(slot)
                elif slot not in computed:
                    computed.add(slot)
                    pending.append(slot)
        return computed, read


def slot_dependencies(capture: Capture, blocks: Iterable[str]) -> Slots:
    """Build the slot graph of ``blocks``; marks of other modules count as glue."""
    chosen = set(blocks)
    cuts = {node: slot for slot, node in capture.marks.items() if slot.block in chosen}
    needs: dict[Slot | str, frozenset[Slot]] = {}
    work: dict[Slot | str, frozenset[Node]] = {}
    roots: dict[Slot | str, list[Node]] = {slot: [node] for node, slot in cuts.items()} | {OUTPUT: result_nodes(capture)}
    for slot in roots:
        needs[slot], work[slot] = _cone(roots[slot], cuts, capture, slot)
    calls = tuple(
        BlockCall(c.block, c.call, c.slots, tuple(outer for outer in c.enclosing if outer[0] in chosen))
        for c in capture.calls
        if c.block in chosen and c.slots
    )
    outputs = {slot: tensor_info(node, capture.sizes) for node, slot in cuts.items()}
    size = {slot: output.bytes for slot, output in outputs.items()}
    dtype = {slot: output.dtype for slot, output in outputs.items()}
    return Slots(needs, work, size, dtype, calls, dict(capture.macs))


def result_nodes(capture: Capture) -> list[Node]:
    """The nodes among the leaves of the denoiser's result."""
    return [leaf for leaf in capture.outputs if isinstance(leaf, Node)]


def _cone(
    roots: Sequence[Node], cuts: dict[Node, Slot], capture: Capture, slot: Slot | str
) -> tuple[frozenset[Slot], frozenset[Node]]:
    """Walk back from ``roots`` to the nearest cuts: (slots met, nodes with MACs passed)."""
    met: set[Slot] = set()
    passed: set[Node] = set()
    seen: set[Node] = set()
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in cuts and cuts[node] != slot:
            met.add(cuts[node])
            continue
        if node in capture.macs:
            passed.add(node)
        pending.extend(node.all_input_nodes)
    return frozenset(met), frozenset(passed)


def block_dependencies(capture: Capture, blocks: Sequence[Block]) -> nx.DiGraph:
    """The graph of blocks: an edge a -> b where b, or glue on the way to it, reads an output of a.

    Nodes: block names with ``kind`` (see Block), ``macs`` and ``bytes`` (of the outputs); ``input:<name>`` for each tensor
    input of the denoiser that reaches a block or the result; ``output``. Input and output nodes have the kinds "input" and
    "output". What flows within an outer block to a block nested in it shows as an edge too.
    """
    names = {block.name for block in blocks}
    graph = nx.DiGraph()
    for block in blocks:
        graph.add_node(block.name, kind=block.kind, macs=block.macs, bytes=sum(o.bytes for o in block.outputs))
    graph.add_node(OUTPUT, kind="output", macs=0, bytes=sum(tensor_info(n, capture.sizes).bytes for n in result_nodes(capture)))
    origin = _origins(capture, names)
    marked = {mark: slot.block for slot, mark in capture.marks.items() if slot.block in names}
    for node, name in marked.items():
        _connect(graph, _sources(node, origin) - {name}, name)
    for node in result_nodes(capture):
        _connect(graph, origin[node], OUTPUT)
    return graph


def _origins(capture: Capture, names: Collection[str]) -> dict[Node, frozenset[str]]:
    """The block outputs and inputs (``input:<name>``) that each node's value is made of by glue."""
    origin: dict[Node, frozenset[str]] = {}
    own = {mark: frozenset({slot.block}) for slot, mark in capture.marks.items() if slot.block in names}
    own |= {node: frozenset({f"input:{name}"}) for node, name in zip(capture.inputs, capture.names, strict=True)}
    for node in capture.graph_module.graph.nodes:
        origin[node] = own[node] if node in own else _sources(node, origin)
    return origin


def _sources(node: Node, origin: Mapping[Node, frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*(origin[source] for source in value_inputs(node)))


def residual_blocks(capture: Capture, graph: nx.DiGraph, source: str) -> set[str]:
    """Blocks whose output is added to what they read, so that they could be left out: residual branches.

    Whoever reads such a block reads all that it reads too, since both are in one sum. A skip connection around the innermost
    block of a U-shape looks the same, but joins by concatenation. graph: of ``block_dependencies``. source: the node in it
    from which what counts as read comes, the noisy sample; conditions reach blocks past any branch.
    """
    reached = nx.descendants(graph, source) | {source}
    reads = {name: reached.intersection(graph.predecessors(name)) for name in reached - {source, OUTPUT}}
    found = {b for b, read in reads.items() if all(graph.has_edge(a, c) for a in read for c in graph.successors(b))}
    if not found:
        return found
    origin = _origins(capture, reads)
    for node in capture.graph_module.graph.nodes:
        if getattr(node.target, "overloadpacket", None) in _CONCATENATIONS:
            parts = [origin[part] for part in node.all_input_nodes]
            found -= {b for b in found for one in parts for other in parts if b in one - other and reads[b] & other}
    return found


def _connect(graph: nx.DiGraph, sources: Iterable[str], target: str) -> None:
    for source in sorted(sources):
        if source not in graph:
            graph.add_node(source, kind="input", macs=0, bytes=0)
        graph.add_edge(source, target)
