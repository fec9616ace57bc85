"""Compile specialised graphs, whole or region by region."""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch._inductor import config, list_mode_options, standalone_compile
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.standalone_compile import CompiledArtifact
from torch.compiler import config as compiler_config
from torch.fx import GraphModule

from maskcompile._version import __version__
from maskcompile.artefacts import load_artefact, to_bytes
from passes.capture import Capture
from passes.regions import Region, only_views, region_graph, sizes_read, structure
from passes.sizes import code_of, code_of_values, guards_in, holds, is_size

#: (*tensor inputs, *cached reads) -> (*tensor results, *stores), or (*inputs, *weights, *sizes) -> outputs of a region
Executable = Callable[..., Sequence[Tensor]]

#: [*inputs, *weights, *sizes] -> outputs of a region, which may empty the list, to let go of inputs that only it still holds
Boxed = Callable[[list[Any]], Sequence[Tensor]]

Backend = str | Callable[..., Any]


@dataclass(eq=False)
class CompiledRegion:
    """A region, executable on the weights of any layer of the same structure, without gradients.

    artefact: what the compiler returned. guards: what it takes for granted of its sizes, as code, see ``passes.sizes``. name:
    among saved ones; empty where there is nothing to save, as of what takes no kernel (``x * 1.0``). run: executes it; the
    region itself until its first call, then what that found, see ``_inner``.
    """

    artefact: Executable
    guards: str
    name: str
    run: Boxed = field(init=False)

    def __post_init__(self) -> None:
        self.run = self

    def __call__(self, inputs: list[Any]) -> Sequence[Tensor]:
        if self.run is not self:  # another plan was the first
            return self.run(inputs)
        outputs, inner = _inner(self.artefact, inputs)
        self.run = inner
        return outputs


#: What was compiled of regions in this process, by structure, backend and options: other masks, captures and denoisers with
#: equal layers need not compile them again. Several for sizes that one cannot serve.
_compiled: dict[str, list[CompiledRegion]] = {}

#: Held while Inductor's code is watched.
_watching = threading.RLock()

#: Where Inductor says what it cannot save; whoever asks for a file is told by ``saved_regions``.
_saving = logging.getLogger("torch._inductor.standalone_compile")

#: Ends the name of the guards of what was saved under the rest of it.
GUARDS = ".guards"

#: What ``load_regions`` was given, by name.
_loadable: dict[str, bytes] = {}


#: Modes of torch.compile with which Inductor records CUDA graphs of its own, and what they are without these.
WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_graph(graph_module: GraphModule, backend: Backend, options: Mapping[str, Any]) -> Executable:
    """``torch.compile(graph_module, fullgraph=True)``, or the graph as it is for the backend "eager".

    options: keyword arguments of torch.compile. Shapes are static, but for those that are symbols in the graph.
    """
    if backend == "eager":
        return graph_module
    symbolic = _with_sizes_of_tensors(graph_module)
    compiled: Executable = torch.compile(graph_module, backend=backend, **{"fullgraph": True, "dynamic": False, **options})
    if any(symbolic):
        compiled = _marking(compiled, symbolic)
    return _cloning(compiled) if records(backend, options) else compiled


def records(backend: Backend, options: Mapping[str, Any]) -> bool:
    """Whether torch records CUDA graphs of its own: the next replay of any overwrites what one returned."""
    asked = (options.get("options") or {}).get("triton.cudagraphs")
    return bool(options.get("mode") in WITHOUT_CUDA_GRAPHS or asked or backend == "cudagraphs")


def _cloning(recorded: Executable) -> Executable:
    return lambda *arguments: tuple(tensor.clone() for tensor in recorded(*arguments))


def _with_sizes_of_tensors(graph_module: GraphModule) -> list[list[int]]:
    """The symbolic dimensions of each input. An input that is a size, as Dynamo takes none, becomes a tensor of that length."""
    symbolic = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        symbolic.append([0] if is_size(node) else [i for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt)])
        if is_size(node):
            with graph_module.graph.inserting_after(node):
                size = graph_module.graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
            node.replace_all_uses_with(size, delete_user_cb=lambda user, size=size: user is not size)
    graph_module.recompile()
    return symbolic


def _marking(compiled: Executable, symbolic: Sequence[Sequence[int]]) -> Executable:
    """Tells Dynamo of symbolic dimensions, when it compiles. A size of 1 is never one for it: another call has to tell it."""
    told = False
    of_length = functools.cache(lambda length: torch.empty(length, 0))

    def run(*arguments: Any) -> Sequence[Tensor]:
        nonlocal told
        tensors = [of_length(argument) if isinstance(argument, int) else argument for argument in arguments]
        if not told:
            tensors = [tensor.detach() if dims else tensor for tensor, dims in zip(tensors, symbolic, strict=True)]
            for tensor, dims in zip(tensors, symbolic, strict=True):
                maybe_mark_dynamic(tensor, dims)
            told = all(tensor.shape[dim] > 1 for tensor, dims in zip(tensors, symbolic, strict=True) for dim in dims)
        return compiled(*tensors)

    return run


def compile_region(region: Region, capture: Capture, backend: Backend, options: Mapping[str, Any]) -> CompiledRegion:
    """A region, compiled once in this process.

    What was compiled for other ``capture.sizes`` serves, where what the compiler took for granted then still holds.

    Inductor is called without Dynamo, whose guards would be checked at every call and take longer than all else that one does.
    """
    described = f"{__version__}\n{structure(region, capture)}\n{backend!r}\n{sorted(options.items())!r}\n{_settings()}"
    key = sha256(described.encode()).hexdigest()
    values = [capture.sizes[symbol] for symbol in sizes_read(region, capture)]
    known = _compiled.setdefault(key, [])
    for compiled in known:
        if holds(compiled.guards, values):
            return compiled
    graph_module = region_graph(region, capture)
    if only_views(graph_module):
        known.append(CompiledRegion(graph_module, "", key))
    elif backend != "inductor" or not set(options) <= {"mode", "options"}:
        known.append(CompiledRegion(compile_graph(graph_module, backend, options), "", key))
    elif (loaded := _loaded(key, values)) is not None:
        known.append(loaded)
    else:
        try:
            run, guards = _standalone(graph_module, options)
        except Exception:
            if not values:
                raise
            # Inductor has faults of its own where sizes are symbols; the same with numbers may do.
            fixed, _ = _standalone(region_graph(region, capture, fixed=True), options)
            known.append(CompiledRegion(_without_last(fixed, len(values)), code_of_values(values), key))
        else:
            name = f"{key}.{sha256(guards.encode()).hexdigest()[:8]}" if values else key
            nothing = getattr(run, "_artifacts", ()) is None and not config.force_disable_caches
            known.append(CompiledRegion(run, guards, "" if nothing else name))
    return known[-1]


def _inner(artefact: Executable, inputs: list[Any]) -> tuple[Sequence[Tensor], Boxed]:
    """(the outputs of a first call, what executes the later ones)

    Of what Inductor compiled that is the code it generated, without what AOTAutograd puts around it and without a record in a
    profile, where all that did was to hand on: one call of the code, with these very inputs, whose results are the outputs.
    What else the wrappers may do is nothing to a region, which is a functional graph: mark inputs as changed, and switch
    gradients off, as they are here. They hold on to the inputs, and are several Python functions for each region.
    """
    run = _boxed(artefact)
    if not isinstance(artefact, CompiledArtifact):
        return run(inputs), run
    with _watched() as calls:
        outputs = artefact(*inputs)
    if len(calls) == 1:
        graph, given, made = calls[0]
        if graph.current_callable is not None and _same(given, inputs) and _same(made, outputs):
            run = cast(Boxed, graph.current_callable)
    inputs.clear()
    return outputs, run


def _boxed(executable: Executable) -> Boxed:
    def run(inputs: list[Any]) -> Sequence[Tensor]:
        arguments = tuple(inputs)
        inputs.clear()
        return executable(*arguments)

    return run


@contextmanager
def _watched() -> Iterator[list[tuple[CompiledFxGraph, list[Any], Sequence[Tensor]]]]:
    """This thread's calls of what Inductor compiled: (the graph, its inputs, its outputs)."""
    calls: list[tuple[CompiledFxGraph, list[Any], Sequence[Tensor]]] = []
    thread = threading.get_ident()
    with _watching:
        original = CompiledFxGraph.__call__

        def watched(graph: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
            given = list(inputs)
            made = original(graph, inputs)
            if threading.get_ident() == thread:
                calls.append((graph, given, made))
            return made

        try:
            CompiledFxGraph.__call__ = watched  # type: ignore[method-assign, assignment]
            yield calls
        finally:
            CompiledFxGraph.__call__ = original  # type: ignore[method-assign]


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Whether they are the same objects, in the same order."""
    return len(these) == len(those) and all(one is other for one, other in zip(these, those, strict=True))


def _standalone(graph_module: GraphModule, options: Mapping[str, Any]) -> tuple[Executable, str]:
    """A graph compiled by Inductor, and what that takes for granted of its sizes."""
    likes = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    symbols = [like.node.expr for like in likes if isinstance(like, torch.SymInt)]
    # Some versions of torch (2.11) name what they save by the graph alone, and of several of one name take any, whatever sizes
    # they serve.
    tag = f"{compiler_config.cache_key_tag}{[like.node.hint for like in likes if isinstance(like, torch.SymInt)] or ''}"
    level = _saving.level
    if config.force_disable_caches:  # or it says of every region that it cannot be saved
        _saving.setLevel(logging.ERROR)
    try:
        with compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            run = standalone_compile(
                graph_module, likes, dynamic_shapes="from_graph", options={"config_patches": _inductor_options(options)}
            )
    finally:
        _saving.setLevel(level)
    return run, code_of(guards_in(likes[-1].node.shape_env, symbols, least=1), symbols) if symbols else ""


def _without_last(run: Executable, number: int) -> Executable:
    return lambda *arguments: run(*arguments[:-number])


def _settings() -> tuple[Any, ...]:
    """What else compiled code depends on, in torch's settings."""
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        config.get_hash().hex(),
    )


def _loaded(key: str, values: Sequence[int] = ()) -> CompiledRegion | None:
    """A region of a file that serves sizes of these values, None where there is none, or it is damaged."""
    for name in [name for name in _loadable if name.partition(".")[0] == key and not name.endswith(GUARDS)]:
        try:
            guards = _loadable.get(name + GUARDS, b"").decode()
            if holds(guards, values):
                return CompiledRegion(load_artefact(_loadable[name]), guards, name)
        except Exception as error:  # of torch, which documents none
            del _loadable[name]
            warnings.warn(f"a region in a file of save_compiled is damaged, and compiled afresh: {error}.", stacklevel=2)
    return None


def saved_regions(regions: Collection[CompiledRegion]) -> dict[str, bytes]:
    """Those of the ``regions`` that Inductor compiled, as torch's artefacts, by name."""
    artefacts = {}
    for compiled in (compiled for several in _compiled.values() for compiled in several):
        if compiled in regions and compiled.name and isinstance(compiled.artefact, CompiledArtifact):
            artefacts[compiled.name] = _loadable.get(compiled.name) or to_bytes(compiled.artefact)
            if compiled.guards:
                artefacts[compiled.name + GUARDS] = compiled.guards.encode()
    return artefacts


def load_regions(artefacts: Mapping[str, bytes]) -> None:
    """Take regions from what ``saved_regions`` returned from now on, where they are in it."""
    _loadable.update(artefacts)


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What torch.compile makes of its mode and options, but for CUDA graphs, which would overwrite other regions' results."""
    mode = list_mode_options(options["mode"] if options.get("mode") else "default")
    return {**mode, **(options.get("options") or {}), "triton.cudagraphs": False}
