"""Compile specialised graphs, whole or region by region."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config, list_mode_options, standalone_compile
from torch._inductor.standalone_compile import CompiledArtifact
from torch.fx import GraphModule

from maskcompile.artefacts import load_artefact, load_artefacts, save_artefacts, to_bytes
from passes.capture import Capture
from passes.regions import Region, only_views, region_graph, structure

#: (*tensor inputs, *cached reads) -> (*tensor results, *stores), or (*inputs, *weights) -> outputs of a region
Executable = Callable[..., Sequence[Tensor]]

Backend = str | Callable[..., Any]

#: What was compiled of regions in this process, by structure, backend and options: other masks, captures and denoisers with
#: equal layers need not compile them again.
_compiled: dict[str, Executable] = {}

#: What ``load_compiled`` found in files.
_loadable: dict[str, bytes] = {}


def compile_graph(graph_module: GraphModule, backend: Backend, options: Mapping[str, Any]) -> Executable:
    """``torch.compile(graph_module, fullgraph=True)``, or the graph as it is for the backend "eager".

    options: keyword arguments of torch.compile. Shapes are static unless they say otherwise: a capture serves one shape.
    """
    if backend == "eager":
        return graph_module
    compiled: Executable = torch.compile(graph_module, backend=backend, **{"fullgraph": True, "dynamic": False, **options})
    return compiled


def compile_region(region: Region, capture: Capture, backend: Backend, options: Mapping[str, Any]) -> Executable:
    """A region, executable on the weights of any layer of the same structure; compiled once in this process.

    Inductor is called without Dynamo, whose guards would be checked at every call and take longer than all else that one does.
    """
    described = f"{structure(region, capture)}\n{backend!r}\n{sorted(options.items())!r}\n{_settings()}"
    key = sha256(described.encode()).hexdigest()
    if key not in _compiled:
        graph_module = region_graph(region, capture)
        if only_views(graph_module):
            _compiled[key] = graph_module
        elif backend != "inductor" or not set(options) <= {"mode", "options"}:
            _compiled[key] = compile_graph(graph_module, backend, options)
        elif (loaded := _loaded(key)) is not None:
            _compiled[key] = loaded
        else:
            _compiled[key] = standalone_compile(
                graph_module,
                [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")],
                dynamic_shapes="from_graph",
                options={"config_patches": _inductor_options(options)},
            )
    return _compiled[key]


def _settings() -> tuple[Any, ...]:
    """What else compiled code depends on, in torch's settings."""
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        config.get_hash().hex(),
    )


def _loaded(key: str) -> Executable | None:
    """A region of a file, None where there is none, or it is damaged."""
    if key not in _loadable:
        return None
    try:
        return load_artefact(_loadable[key])
    except Exception as error:  # of torch, which documents none
        del _loadable[key]
        warnings.warn(f"a region in a file of save_compiled is damaged, and compiled afresh: {error}.", stacklevel=2)
        return None


def save_compiled(path: str | os.PathLike[str], regions: Collection[Executable]) -> None:
    """Write those of the ``regions`` that Inductor compiled to a file."""
    chosen = {key: run for key, run in _compiled.items() if run in regions and isinstance(run, CompiledArtifact)}
    save_artefacts(path, {key: _loadable.get(key) or to_bytes(run) for key, run in chosen.items()})


def load_compiled(path: str | os.PathLike[str]) -> None:
    """Take regions from a file of ``save_compiled`` from now on, where they are in it."""
    _loadable.update(load_artefacts(path))


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What torch.compile makes of its mode and options."""
    return {**list_mode_options(options["mode"] if options.get("mode") else "default"), **(options.get("options") or {})}
