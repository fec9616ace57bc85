"""Several processes, one mask: ``accelerate launch`` or torchrun start them, torch.distributed lets them exchange results.

Work is split into pieces whose results do not depend on who does them, and every process has all results before it decides
anything: so all decide alike, and as one process alone would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The processes that learn one mask together. rank: this one's number. count: of all."""

    rank: int = 0
    count: int = 1

    def mine(self, pieces: Sequence[Key]) -> list[Key]:
        """The pieces of work that are this process's."""
        return list(pieces[self.rank :: self.count])

    def stretch(self, pieces: Sequence[Key]) -> Sequence[Key]:
        """The same where neighbours help each other: a stretch of them."""
        cut = [round(len(pieces) * i / self.count) for i in range(self.count + 1)]
        return pieces[cut[self.rank] : cut[self.rank + 1]]

    def first(self, value: Value) -> Value:
        """The first process's value, in each."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=_group())
        return values[0]

    def gather(self, results: Mapping[Key, Value]) -> dict[Key, Value]:
        """The results of all processes, in each. Where one has failed, its launcher ends the others."""
        if self.count == 1:
            return dict(results)
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, dict(results), group=_group())
        return {key: value for results in everyone for key, value in results.items()}


_GROUP: list[Any] = []

#: How long processes wait for each other: one may have hours of sampling left when another is done.
PATIENCE = timedelta(days=7)


def _group() -> Any:
    """A group for Python objects in main memory: NCCL, which GPUs use, has none."""
    if not _GROUP:
        _GROUP.append(dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_backend() != "gloo" else dist.group.WORLD)
    return _GROUP[0]


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that a launcher started, alone where there was none; connects them where nobody did."""
    connected = False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        connected = True
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Processes()
    finally:
        if connected:
            _GROUP.clear()
            dist.destroy_process_group()
