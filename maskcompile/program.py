"""``trace``: a captured denoiser with its blocks and their dependencies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
from torch import nn
from torch.fx import GraphModule

from maskcompile.captures import capture_once
from maskcompile.mask import hash_blocks
from maskcompile.signature import bind, check_capturable
from passes.blocks import Block, BlockSelection, default_blocks, describe_blocks, select_modules
from passes.capture import Capture, CaptureError
from passes.dependencies import Slots, block_dependencies, slot_dependencies


@dataclass(frozen=True)
class Program:
    """A denoiser captured at one input signature. ``print(program)`` shows it readably.

    denoiser: class name. blocks: what may be reused, in call order. block_hash: see ``maskcompile.mask.hash_blocks``.
    """

    denoiser: str
    blocks: tuple[Block, ...]
    block_hash: str
    capture: Capture

    @property
    def graph_module(self) -> GraphModule:
        """The captured fx graph (functional aten operations), sharing its weights with the denoiser."""
        return self.capture.graph_module

    @cached_property
    def dependencies(self) -> nx.DiGraph:
        """Who consumes whose output: see ``passes.dependencies.block_dependencies``."""
        return block_dependencies(self.capture, self.blocks)

    @cached_property
    def slots(self) -> Slots:
        """The dependencies tensor by tensor, which rectification and planning work on."""
        return slot_dependencies(self.capture, self.names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one full step (convolutions, matrix products, both products of attention)."""
        return self.slots.total_macs

    def __str__(self) -> str:
        width = max((len(block.name) for block in self.blocks), default=0)
        lines = [
            f"{block.name:<{width}}  {block.kind:<12} {block.macs / 1e6:>10.2f}  {100 * block.macs / max(1, self.macs):>6.2f}  "
            + ", ".join("x".join(map(str, output.shape)) for output in block.outputs)
            for block in self.blocks
        ]
        floor = self.slots.macs_of(self.slots.reach(frozenset(self.slots.size), frozenset())[0])
        shapes = ", ".join(
            f"{name} {'x'.join(map(str, node.meta['val'].shape)) or 'scalar'}"
            for name, node in zip(self.capture.names, self.capture.inputs, strict=True)
        )
        return "\n".join(
            [
                f"{self.denoiser}({shapes}): {len(self.blocks)} blocks, {self.macs / 1e9:.3f} GMACs a step, "
                f"{100 * floor / max(1, self.macs):.1f}% of them needed even when every block is reused",
                f"{'block':<{width}}  {'kind':<12} {'MMACs':>10}  {'%':>6}  outputs",
                *lines,
            ]
        )


def trace(model: nn.Module, *args: Any, blocks: BlockSelection | None = None, **kwargs: Any) -> Program:
    """Capture ``model(*args, **kwargs)`` and find its blocks and their dependency graph.

    blocks: what may be reused: a sequence of module-path patterns ("transformer_blocks.*.attn*") or module types, or a
    callable (path, module) -> bool; None finds them by the default rule of ``passes.blocks``.

    Nothing is computed when the model and the inputs are on the meta device. Raises CaptureError for a denoiser that cannot be
    captured and ValueError for one in train mode or for a selection that takes nothing.
    """
    check_capturable(model)
    call = bind(model, args, kwargs)
    chosen = select_modules(model, blocks)
    try:
        found = capture_once(model, call, chosen).capture
    except CaptureError as error:
        raise CaptureError(f"{error} A mask for it can be made of the names in maskcompile.block_names(model).") from error
    names = default_blocks(found, model) if blocks is None else chosen
    described = describe_blocks(found, names)
    return Program(type(model).__name__, described, hash_blocks(model, [b.name for b in described]), found)
