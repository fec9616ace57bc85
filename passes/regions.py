"""Pass 8: regions. The pieces that all specialised graphs of a capture are made of, so that each is compiled once.

A region is a maximal fanout-free cone (Cong and Ding 1994, FlowMap): the operations that one tensor alone is made of, down to
the block outputs, and the tensors that others need too. Whatever a plan reuses, a region is executed as a whole or not at all,
so a specialised graph is a selection of the regions of its capture. Regions that do the same with other weights have the same
``structure``: the layers of a denoiser, and all its plans, share what is compiled of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import getitem
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_arg

from passes.capture import MARK, Capture
from passes.dependencies import result_nodes
from passes.narrow import Ranges, narrow_linear, narrowed
from passes.plan import GraphKey
from passes.sizes import Sizes, is_size, shape_at, symbols_of, value_at
from passes.specialise import extrapolate, scalar_like


@dataclass(frozen=True, eq=False)
class Region:
    """nodes: in an order in which they can be executed. outputs: what others read of them.

    inputs: what it reads of other regions and of the denoiser's inputs. extrapolated: those of them that enter as two versions
    and a coefficient (see ``passes.reuse``). weights: the parameters and buffers that it reads, ``get_attr`` nodes. Sizes are
    not among what it reads: those of the call are known to whoever executes it. narrowed: linear layers of it of which only
    these parts are read (see ``passes.narrow``).
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    weights: tuple[Node, ...]
    outputs: tuple[Node, ...]
    extrapolated: frozenset[Node] = frozenset()
    narrowed: tuple[tuple[Node, Ranges], ...] = ()

    @property
    def content(self) -> Hashable:
        """Equal for regions of a capture that are the same."""
        return self.nodes, self.inputs, self.outputs, self.extrapolated, self.narrowed


@dataclass(frozen=True)
class Partition:
    """The regions of a capture, in an order in which they can be executed.

    producer: the region that computes a tensor. light: those that multiply nothing. reader: the first to read of a region.
    """

    regions: tuple[Region, ...]
    producer: dict[Node, Region]
    light: frozenset[Region]
    reader: dict[Region, Region]


def partition(capture: Capture, blocks: Iterable[str]) -> Partition:
    """The regions of a capture whose ``blocks`` may be reused."""
    chosen = set(blocks)
    roots = {node for slot, node in capture.marks.items() if slot.block in chosen} | set(result_nodes(capture))
    homes = _homes(capture.graph_module.graph, roots)
    members: dict[Node, list[Node]] = {}
    order: dict[Node, int] = {}
    for position, node in enumerate(capture.graph_module.graph.nodes):
        order[node] = position
        for home in homes.get(node, ()):
            members.setdefault(home, []).append(node)
    regions = []
    for home in sorted(members, key=order.__getitem__):
        own = set(members[home])
        outputs = [
            node
            for node in members[home]
            if homes[node] == {home} and (node in roots or any(user in homes and user not in own for user in node.users))
        ]
        regions.append(_region(members[home], outputs))
    producer = {node: region for region in regions for node in region.outputs}
    reader: dict[Region, Region] = {}
    for region in regions:
        for node in region.inputs:
            if node in producer:
                reader.setdefault(producer[node], region)
    light = frozenset(region for region in regions if capture.macs.keys().isdisjoint(region.nodes))
    return Partition(tuple(regions), producer, light, reader)


#: How many light regions are merged with each other. One length only, or masks would need ever other ones compiled.
CHAIN = 4


def select_regions(capture: Capture, parts: Partition, key: GraphKey, narrow: bool = False) -> list[Region]:
    """What a specialised graph is made of, in the order of execution.

    Light regions are merged with what a compiler that saw the whole graph would fuse them with, as far as that takes few
    compilations more, and none of anything that multiplies: extrapolations with the light regions that read them; a light
    region that reads none with the first region that reads it, if that multiplies; and others, like the residual sums of
    reused blocks, with each other, four at a time. narrow: as of ``passes.specialise``.
    """
    twofold = {capture.marks[slot] for slot, versions in key.reads if versions == 2}
    live = _live_regions(capture, parts, key)
    groups: list[list[Region]] = []
    extrapolated: set[Node] = set()
    waiting: dict[Region, list[Region]] = {}
    chain: list[Region] = []

    def extrapolate_for(readers: Iterable[Node]) -> None:
        for node in readers:
            if node in twofold and node not in extrapolated:
                extrapolated.add(node)
                groups.append([Region((), (node,), (), (node,), frozenset({node}))])

    def reads_chain(group: Sequence[Region]) -> bool:
        made = {node for region in chain for node in region.outputs}
        return any(node in made for region in group for node in region.inputs)

    def end_chain() -> None:
        for _, alike in groupby(chain, key=lambda region: bool(region.extrapolated)):
            links = list(alike)
            whole = len(links) - len(links) % CHAIN
            groups.extend(links[start : start + CHAIN] for start in range(0, whole, CHAIN))
            groups.extend([link] for link in links[whole:])
        chain.clear()

    extrapolate_for(result_nodes(capture))
    for region in (region for region in parts.regions if region in live):
        reader = parts.reader.get(region)
        entering = frozenset(twofold.intersection(region.inputs))
        if region not in parts.light or renames(region):
            group = [*waiting.pop(region, ()), region]
            if reads_chain(group):
                end_chain()
            extrapolate_for(region.inputs)
            groups.append(group)
        elif not entering and reader in live and reader not in parts.light:
            waiting.setdefault(reader, []).append(region)
        else:
            if chain and not reads_chain([region]):
                end_chain()
            chain.append(replace(region, extrapolated=entering))
    end_chain()
    results = {*result_nodes(capture), *(capture.marks[slot] for slot in key.stores)}
    merged = [_merged(group, results, groups) for group in groups]
    if not narrow:
        return merged
    less = narrowed({node for region in merged for node in region.nodes}, results)
    return [replace(region, narrowed=tuple((node, less[node]) for node in region.nodes if node in less)) for region in merged]


def renames(region: Region) -> bool:
    """Whether a region only gives another name to a tensor: a block that returns what a block within it returned."""
    return bool(region.nodes) and not region.weights and all(node.target is MARK for node in region.nodes)


def region_graph(region: Region, capture: Capture, fixed: bool = False) -> GraphModule:
    """The graph ``(*inputs, *weights, *sizes) -> outputs`` of a region, which holds no weights itself.

    What is extrapolated enters as its newer version, the one before that, and the coefficient, a scalar. sizes: ``sizes_read``.
    A region with any has a ShapeEnv of its own, in which they are ``capture.sizes`` as an example, and which tells afterwards
    what a compiler took for granted of them; it does not start from their being above 1, as that of torch.export does.
    fixed: for ``capture.sizes`` alone, which are constants then, and no inputs.
    """
    graph = Graph()
    copies: dict[Node, Any] = {}
    symbols = sizes_read(region, capture)
    sizes = {symbol: capture.sizes[symbol] for symbol in symbols}
    fake = _static(capture) if not symbols else _fixed(sizes) if fixed else _symbolic(sizes)

    def enter(like: Any) -> Node:
        node = graph.placeholder(f"input_{len(graph.nodes)}")
        node.meta["val"] = like
        return node

    for node in (*region.inputs, *region.weights):
        value = value_of(node, capture)
        copies[node] = enter(fake(value))
        if node in region.extrapolated:
            copies[node] = extrapolate(graph, (copies[node], enter(fake(value))), enter(fake(scalar_like(value))))
    given = {symbol: sizes[symbol] if fixed else enter(fake(size)) for symbol, size in symbols.items()}
    parts = dict(region.narrowed)
    for node in region.nodes:
        if is_size(node) and node.target is torch.ops.aten.sym_size.int:
            copies[node] = given[node.meta["val"].node.expr]
        elif node in parts:
            copies[node] = narrow_linear(graph, node, copies, parts[node])
        else:
            copies[node] = copies[_marked(node)] if node.target is MARK else graph.node_copy(node, copies.__getitem__)
    outputs = []
    for node in region.outputs:
        value, copy = value_of(node, capture), copies[node]
        if node not in region.inputs and node.meta["val"].stride() != value.stride():
            copy = graph.call_function(torch.ops.aten.clone.default, (copy,))
        copy.meta["example_value"] = fake(value)  # where Inductor looks for the fake mode
        outputs.append(copy)
    graph.output(tuple(outputs))
    return GraphModule(torch.nn.Module(), graph, class_name="Region")


def sizes_read(region: Region, capture: Capture) -> dict[Any, torch.SymInt]:
    """The symbols that a region needs the values of, in one order, with the size that each is."""
    found: set[Any] = set()
    for node in (*region.inputs, *region.nodes):
        if len(found) == len(capture.sizes):
            break
        found |= symbols_of(node.meta.get("val"))
    sizes = [size for node in capture.inputs for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
    plain = {size.node.expr: size for size in sizes if size.node.expr.is_Symbol}
    return {symbol: plain[symbol] for symbol in capture.sizes if symbol in found}


def _static(capture: Capture) -> Callable[[Any], Any]:
    """Makes tensors fake, in the mode of those of the capture."""
    mode = detect_fake_mode([node.meta.get("val") for node in capture.graph_module.graph.nodes])
    return lambda value: value if mode is None else mode.from_tensor(value, static_shapes=True)


def _fixed(sizes: Sizes) -> Callable[[Any], Any]:
    """Makes tensors fake, of these sizes where they have symbols, in a mode of their own."""
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            strides = [value_at(stride, sizes) for stride in value.stride()]
            with mode:
                return torch.empty_strided(shape_at(value, sizes), strides, dtype=value.dtype, device=value.device)
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    return fake


def _symbolic(sizes: Sizes) -> Callable[[Any], Any]:
    """Makes tensors fake, and sizes symbolic, in a mode of their own; symbols have the values that are given."""
    environment = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=environment)
    renamed = {}
    for position, (symbol, size) in enumerate(sizes.items()):
        source = ConstantSource(f"batch{position}")
        renamed[symbol] = environment.create_symbol(size, source, DimDynamic.DYNAMIC)
        torch._check(environment.create_symintnode(renamed[symbol], hint=size, source=source) >= 1)
    hints = {renamed[symbol]: sympy.Integer(size) for symbol, size in sizes.items()}

    def fake(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            expression = value.node.expr.xreplace(renamed)
            return environment.create_symintnode(expression, hint=int(expression.xreplace(hints)))
        if isinstance(value, FakeTensor):  # of the mode that it was captured in
            shape, strides = [fake(size) for size in value.shape], [fake(stride) for stride in value.stride()]
            with mode:
                return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

    return fake


def only_views(graph_module: GraphModule) -> bool:
    """Whether a graph computes nothing."""
    return all(_repeatable(node) for node in graph_module.graph.nodes if node.op == "call_function")


def structure(region: Region, capture: Capture) -> str:
    """The same text for regions that do the same on inputs and weights of the same shapes, strides, dtypes and devices."""
    names: dict[Node, str] = {}
    lines = []
    symbols = {symbol: sympy.Symbol(f"S{position}") for position, symbol in enumerate(sizes_read(region, capture))}
    parts = dict(region.narrowed)

    def sizes(values: Iterable[int | torch.SymInt]) -> list[Any]:
        return [size if isinstance(size, int) else size.node.expr.xreplace(symbols) for size in values]

    for node in (*region.inputs, *region.weights):
        names[node] = f"%i{len(names)}"
        value = value_of(node, capture)
        entering = "extrapolated" if node in region.extrapolated else ""
        lines.append(f"{names[node]} {value.dtype}{sizes(value.shape)}{sizes(value.stride())} {value.device} {entering}")
    for node in region.nodes:
        if node.target is MARK:
            names[node] = names[_marked(node)]
            continue
        if is_size(node) and node.target is torch.ops.aten.sym_size.int:
            names[node] = str(symbols[node.meta["val"].node.expr])
            continue
        names[node] = f"%v{len(names)}"
        lines.append(
            f"{names[node]} = {node.target}{map_arg((node.args, node.kwargs), names.__getitem__)}{parts.get(node, '')}"
        )
    return "\n".join([*lines, f"return {[names[node] for node in region.outputs]}"])


def value_of(node: Node, capture: Capture) -> Tensor:
    """A tensor like that of a node where it leaves or enters a region: a fake one, or the weight itself.

    Dense: a region clones what is a part of a larger tensor, or repeats one, as does whoever stores it.
    """
    if node.op == "get_attr":
        value = _attribute(node, capture)
        assert isinstance(value, Tensor)
        return value
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value if node.op == "placeholder" else torch.empty_like(value)


def divisible(capture: Capture) -> bool:
    """Whether a capture can be divided into regions: nothing but tensors and sizes passes between its operations."""
    for node in capture.graph_module.graph.nodes:
        if node.op in ("call_function", "get_attr") and node.users:  # the others are checks of metadata
            value = _attribute(node, capture) if node.op == "get_attr" else node.meta.get("val")
            parts = value if isinstance(value, (tuple, list)) else [value]
            known = is_size(node) and symbols_of(value) <= set(capture.sizes)  # unlike what is read out of a tensor
            if not known and not all(isinstance(part, Tensor) for part in parts):
                return False
    return True


def _attribute(node: Node, capture: Capture) -> Any:
    value: Any = capture.graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _homes(graph: Graph, roots: set[Node]) -> dict[Node, set[Node]]:
    """The regions, named by their roots, that each operation belongs to: one, or several for what costs nothing to repeat."""
    homes: dict[Node, set[Node]] = {}
    for node in reversed(graph.nodes):
        if node.op != "call_function" or _element_of_operation(node):
            continue
        # The elements of a tuple that an operation computes stay with it: a tuple cannot leave a region.
        elements = [user for user in node.users if _element_of_operation(user)]
        users: set[Node] = set()
        for user in {*node.users, *(user for element in elements for user in element.users)}.difference(elements):
            users |= homes.get(user, set())
        if roots.intersection([node, *elements]) or (len(users) > 1 and not _repeatable(node)):
            users = {node}
        for member in (node, *elements):
            homes[member] = users
    return {node: found for node, found in homes.items() if found}


def _repeatable(node: Node) -> bool:
    """Views: each region that reads one makes its own, so that what leaves a region is a tensor in memory. Likewise sizes."""
    if is_size(node):
        return True
    return node.target is getitem or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view)


def _element_of_operation(node: Node) -> bool:
    return node.target is getitem and not _repeatable(node.all_input_nodes[0])


def _marked(mark: Node) -> Node:
    return mark.all_input_nodes[0]


def _region(nodes: Sequence[Node], outputs: Sequence[Node]) -> Region:
    own = set(nodes)
    read = dict.fromkeys(
        source
        for node in nodes
        if node.target is not torch.ops.aten.sym_size.int
        for source in node.all_input_nodes
        if source not in own
    )
    return Region(
        nodes=tuple(nodes),
        inputs=tuple(node for node in read if node.op != "get_attr"),
        weights=tuple(node for node in read if node.op == "get_attr"),
        outputs=tuple(outputs),
    )


def _merged(group: Sequence[Region], results: set[Node], groups: Sequence[Sequence[Region]]) -> Region:
    """One region for a group of them, with those of their outputs that are results or that other groups read."""
    if len(group) == 1:
        return group[0]
    read = {node for other in groups if other is not group for region in other for node in region.inputs} | results
    nodes = dict.fromkeys(node for region in group for node in region.nodes)
    merged = _region(list(nodes), [node for region in group for node in region.outputs if node in read])
    return replace(merged, extrapolated=frozenset().union(*(region.extrapolated for region in group)))


def _live_regions(capture: Capture, parts: Partition, key: GraphKey) -> set[Region]:
    reused = {capture.marks[slot] for slot, _ in key.reads}
    live: set[Region] = set()
    pending = [*result_nodes(capture), *(capture.marks[slot] for slot in key.stores)]
    while pending:
        node = pending.pop()
        region = None if node in reused else parts.producer.get(node)
        if region is not None and region not in live:
            live.add(region)
            pending.extend(region.inputs)
    return live
