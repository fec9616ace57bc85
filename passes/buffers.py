"""Pass 9: buffers. Where in one piece of memory each version of a run's cache lies, for graphs that are bound to addresses.

A CUDA graph reads and writes the addresses that it was captured with. So what a run stores gets a place of its own for as long
as a later step reads it, and places are shared by versions whose lifetimes do not overlap. This is dynamic storage allocation;
larger versions are placed first, each as low as it fits (Pisarchyk and Lee 2020, arXiv 2001.03288, "greedy by size").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from passes.capture import Slot
from passes.plan import Plan
from passes.rectify import Version

#: Bytes that every place is a multiple of, as CUDA's allocator has it for vectorised loads.
ALIGNMENT = 512


@dataclass(frozen=True)
class Buffers:
    """offset: of each version, in bytes. size: bytes of all of them together."""

    offset: Mapping[Version, int]
    size: int


def share_buffers(plans: Sequence[Plan], size: Mapping[Slot, int]) -> Buffers:
    """A place for every version that the ``plans`` of a run hold. size: bytes of each slot.

    A version takes its place at the end of the step that computes it, when that step has read all that it reads, and leaves it
    with the last step that reads it.
    """
    last = {version: position for position, plan in enumerate(plans) for version in plan.held}
    versions = sorted(last, key=lambda version: (-size[version.slot], version.step, version.slot))
    starts = np.array([version.step for version in versions], dtype=np.int64)
    ends = np.array([last[version] + 1 for version in versions], dtype=np.int64)
    sizes = np.array([-(-size[version.slot] // ALIGNMENT) * ALIGNMENT for version in versions], dtype=np.int64)
    offsets = np.zeros(len(versions), dtype=np.int64)
    for i in range(len(versions)):
        beside = np.flatnonzero((starts[:i] < ends[i]) & (starts[i] < ends[:i]))
        beside = beside[np.argsort(offsets[beside], kind="stable")]
        low = np.maximum.accumulate(np.concatenate([[0], offsets[beside] + sizes[beside]]))  # free from here on
        gaps = np.append(offsets[beside], np.iinfo(np.int64).max) - low
        offsets[i] = low[np.argmax(gaps >= sizes[i])]
    total = int((offsets + sizes).max()) if versions else 0
    return Buffers({version: int(offset) for version, offset in zip(versions, offsets, strict=True)}, total)
