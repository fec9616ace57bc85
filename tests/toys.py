"""Small hand-made denoisers in which every dependency is known."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x + time)))


class Pair(nn.Module):
    """Returns a tuple; its second output is cheap given the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Block(width)
        self.side = nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        first = self.inner(x, time)
        return x + first, self.side(first)


class Chain(nn.Module):
    """x -> a -> b -> c -> result, with a skip from a around b: c(b(a) + a)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(width), Block(width), Block(width)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.float().reshape(-1, 1) / 1000
        a = self.a(sample, time)
        return self.c(self.b(a, time) + a, time)


class RandomDag(nn.Module):
    """Blocks that read random earlier outputs: plain, tuple-valued with a nested one, and one that is called twice."""

    def __init__(self, seed: int, blocks: int = 6, width: int = 4) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Pair(width) if draw.random() < 0.4 else Block(width) for _ in range(blocks))
        self.shared = Block(width)
        self.sources = [sorted(draw.sample(range(2 * i + 1), k=draw.randint(1, min(3, 2 * i + 1)))) for i in range(blocks)]
        self.twice = (draw.randrange(blocks), draw.randrange(blocks))
        self.last = sorted(draw.sample(range(2 * blocks + 1), k=draw.randint(1, 3)))

    def names(self) -> list[str]:
        return [name for name, module in self.named_modules() if isinstance(module, (Block, Pair))]

    def forward(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        time = timestep.float().reshape(-1, 1) / 1000
        values = [sample]
        for index, block in enumerate(self.blocks):
            inputs = torch.stack([values[i] for i in self.sources[index]]).sum(0)
            if index in self.twice:
                inputs = self.shared(inputs, time)
            output = block(inputs, time)
            values += [output, output.sin()] if isinstance(output, Tensor) else list(output)
        return {"sample": torch.stack([values[i] for i in self.last]).sum(0), "first": values[1]}
