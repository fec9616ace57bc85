"""The graphs of a denoiser captured at one input signature, each made when it is first needed, of regions or as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from maskcompile.compile import Backend, CompiledRegion, Executable, compile_graph, compile_region
from maskcompile.link import link
from maskcompile.signature import Call, Key, describe
from maskcompile.steps import Graph
from passes.capture import Capture, Slot
from passes.dependencies import result_nodes
from passes.plan import GraphKey
from passes.regions import Partition, Region, partition, select_regions, value_of
from passes.sizes import Sizes, shape_at, value_at
from passes.specialise import coefficients_like, specialise


@dataclass
class SignatureGraphs:
    """A denoiser captured at one input signature, with the graphs made of it so far.

    One captured for any batch is one of these for each batch, see ``at_sizes``. origin: the signature that it was captured at.
    backend, options: see ``optimize``. divided: whether graphs are made of regions. alone: why it is not for any batch, if that
    was tried. given_up: not to be tried for other batches either. partitions: into regions, for the blocks of a mask. whole:
    graphs not made of regions. compiled: the regions that the graphs consist of, by content.
    """

    capture: Capture
    origin: Key
    described: str
    seconds: float
    backend: Backend
    options: Mapping[str, Any]
    divided: bool
    alone: str | None = None
    given_up: bool = False
    graphs: dict[GraphKey, Graph] = field(default_factory=dict)
    partitions: dict[tuple[str, ...], Partition] = field(default_factory=dict)
    whole: dict[GraphKey, Executable] = field(default_factory=dict)
    compiled: dict[Hashable, CompiledRegion] = field(default_factory=dict)

    def graph(self, key: GraphKey, blocks: tuple[str, ...]) -> Graph:
        """The graph of a plan for a mask of these blocks, made where it is needed for the first time."""
        graph = self.graphs.get(key)
        if graph is None:
            start = time.perf_counter()
            graph = self.graphs[key] = Graph(
                run=self._link(key, blocks) if self.divided else self._whole(key),
                weights=(*self.capture.graph_module.parameters(), *self.capture.graph_module.buffers()),
                coefficients=coefficients_like(self.capture, key, apart=self.divided),
                results=len(result_nodes(self.capture)),
                seconds=time.perf_counter() - start,
            )
        return graph

    def _whole(self, key: GraphKey) -> Executable:
        if key not in self.whole:
            graph_module = specialise(self.capture, key, narrow=self._narrow)
            self.whole[key] = compile_graph(graph_module, self.backend, self.options)
        return self.whole[key]

    def _link(self, key: GraphKey, blocks: tuple[str, ...]) -> Executable:
        """Put together from regions; those not seen before are compiled."""
        if blocks not in self.partitions:
            self.partitions[blocks] = partition(self.capture, blocks)
        regions = select_regions(self.capture, self.partitions[blocks], key, narrow=self._narrow)

        def compiled(region: Region) -> CompiledRegion:
            known = self.compiled.get(region.content)
            if known is None:
                known = self.compiled[region.content] = compile_region(region, self.capture, self.backend, self.options)
            return known

        return link(self.capture, key, regions, compiled)

    @property
    def _narrow(self) -> bool:
        """Not in eager PyTorch, where every graph gives the bits of the original."""
        return self.backend != "eager"

    def like(self, slot: Slot) -> Tensor:
        """A tensor without values like the versions of a slot."""
        value, sizes = value_of(self.capture.marks[slot], self.capture), self.capture.sizes
        strides = [value_at(stride, sizes) for stride in value.stride()]
        return torch.empty_strided(shape_at(value, sizes), strides, dtype=value.dtype, device="meta")

    def at_sizes(self, sizes: Sizes, call: Call) -> SignatureGraphs:
        """A capture for any batch, for the calls of one: nothing of it is captured or compiled again.

        Graphs are looked at and counted for each batch, for what of their outputs shares memory may differ where a size is 1.
        """
        capture = replace(self.capture, sizes=sizes)
        return replace(self, capture=capture, described=describe(call), graphs={}, compiled={})

    def assembler(self) -> Callable[[Sequence[Tensor]], Any]:
        """Puts the result tensors into the structure that the original returns."""
        leaves, spec = self.capture.outputs, self.capture.out_spec
        if spec == pytree.tree_structure(tuple(leaves)) and all(isinstance(leaf, torch.fx.Node) for leaf in leaves):
            return tuple

        def assemble(tensors: Sequence[Tensor]) -> Any:
            remaining = iter(tensors)
            filled = [next(remaining) if isinstance(leaf, torch.fx.Node) else leaf for leaf in leaves]
            return pytree.tree_unflatten(filled, spec)

        return assemble

    def forget(self) -> None:
        """Let go of the graphs; they are made again when they are needed."""
        self.graphs.clear()
        self.whole.clear()
        self.compiled.clear()
