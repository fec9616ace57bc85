"""Compile specialised graphs, whole or region by region."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options, standalone_compile
from torch.fx import GraphModule

from passes.capture import Capture
from passes.regions import Region, only_views, region_graph, structure

#: (*tensor inputs, *cached reads) -> (*tensor results, *stores), or (*inputs, *weights) -> outputs of a region
Executable = Callable[..., Sequence[Tensor]]

Backend = str | Callable[..., Any]

#: What was compiled of regions in this process, by structure, backend and options: other masks, captures and denoisers with
#: equal layers need not compile them again.
_compiled: dict[tuple[Any, ...], Executable] = {}


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
    key = (structure(region, capture), backend, repr(sorted(options.items())))
    if key not in _compiled:
        graph_module = region_graph(region, capture)
        if backend == "inductor" and set(options) <= {"mode", "options"} and not only_views(graph_module):
            placeholders = graph_module.graph.find_nodes(op="placeholder")
            _compiled[key] = standalone_compile(
                graph_module,
                [node.meta["val"] for node in placeholders],
                dynamic_shapes="from_graph",
                options={"config_patches": _inductor_options(options)},
            )
        else:
            _compiled[key] = compile_graph(graph_module, "eager" if only_views(graph_module) else backend, options)
    return _compiled[key]


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What torch.compile makes of its mode and options."""
    return {**list_mode_options(options["mode"] if options.get("mode") else "default"), **(options.get("options") or {})}
