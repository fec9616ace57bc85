"""Compile a specialised graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

#: (*tensor inputs, *cached reads) -> (*tensor results, *stores)
Executable = Callable[..., tuple[Tensor, ...]]


def compile_graph(graph_module: GraphModule, backend: str | Callable[..., Any], options: Mapping[str, Any]) -> Executable:
    """``torch.compile(graph_module, fullgraph=True)``, or the graph as it is for the backend "eager".

    options: keyword arguments of torch.compile. Shapes are static unless they say otherwise: a capture serves one shape.
    """
    if backend == "eager":
        return graph_module
    compiled: Executable = torch.compile(graph_module, backend=backend, **{"fullgraph": True, "dynamic": False, **options})
    return compiled
