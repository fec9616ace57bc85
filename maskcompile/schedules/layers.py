"""Blocks by what they do and in which layer they are, from the captured graph and never from a module's name."""

from __future__ import annotations

from collections.abc import Iterable

from maskcompile.mask import MaskError
from maskcompile.program import Program
from passes.attention import KINDS, attention_kinds, attention_modules


def layer_types(program: Program) -> tuple[str, ...]:
    """For each block "spatial", "temporal" or "cross" where attention of one kind alone happens in it, else its ``kind``."""
    attends = attention_kinds(program.capture, program.names)
    single = {name: next(iter(kinds)) for name, kinds in attends.items() if len(kinds) == 1}
    return tuple(single.get(block.name, block.kind) for block in program.blocks)


def attention_blocks(program: Program, wanted: Iterable[str]) -> dict[str, str]:
    """The blocks with attention of one kind alone, each with its kind. Raises MaskError where a wanted kind has no block."""
    found = {name: kind for name, kind in zip(program.names, layer_types(program), strict=True) if kind in KINDS}
    for kind in wanted:
        if kind not in KINDS:
            raise MaskError(f"the kinds of attention are {', '.join(KINDS)}; got {kind!r}.")
        if kind in found.values():
            continue
        inner = [path for path, kinds in attention_modules(program.capture).items() if kinds == {kind}]
        if not inner:
            raise MaskError(f"{program.denoiser} has no {kind} attention.")
        raise MaskError(
            f"no block of this program is {kind} attention alone; trace {program.denoiser} with blocks= that take its "
            f"attention modules, such as {inner[0]!r}."
        )
    return found


def transformer_layers(program: Program) -> list[list[int]]:
    """Positions of the blocks of each layer of a transformer, in call order: from one self-attention to before the next.

    Raises MaskError for a denoiser with convolutions among its blocks, or without attention.
    """
    types = layer_types(program)
    if "convolution" in types or not {"spatial", "temporal", "attention"} & set(types):
        raise MaskError(f"{program.denoiser} is no plain transformer: its blocks are {', '.join(sorted(set(types)))}.")
    layers: list[list[int]] = []
    for position, kind in enumerate(types):
        if kind in ("spatial", "temporal", "attention") or not layers:
            layers.append([])
        layers[-1].append(position)
    return layers
