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


class Norm(nn.Module):
    """A block without a multiplication that counts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.LayerNorm(width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.norm(x) + time


class Sharing(nn.Module):
    """Calls a module that others call too."""

    def __init__(self, width: int, shared: Block) -> None:
        super().__init__()
        self.own = nn.Sequential(nn.Linear(width, width))
        self.call = [shared]  # not a submodule of this one

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.own(self.call[0](x, time))


class Chain(nn.Module):
    """x -> a -> b -> c -> result, with a skip from a around b: c(b(a) + a)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(width), Block(width), Block(width)
        self.gain = 1.0
        self.settings = {"b": {"scale": 1.0}}

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = (timestep.float().reshape(-1, 1) / 1000).to(sample.dtype)
        a = self.a(sample, time)
        return self.c(self.b(a, time) * self.settings["b"]["scale"] + a, time) * self.gain


class Processor:
    def __init__(self) -> None:
        self.scale = 1.0


class Processed(Chain):
    """Its settings are in an object that is no module, as those of diffusers' attention processors."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample, timestep) * self.processor.scale


class RandomDag(nn.Module):
    """Blocks that read random earlier outputs: plain, without MACs, tuple-valued with a nested one, and one that is called
    several times, by itself and from within others."""

    def __init__(self, seed: int, blocks: int = 6, width: int = 4) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.shared = Block(width)
        kinds = (Block, Block, Pair, Pair, Norm, lambda width: Sharing(width, self.shared))
        self.blocks = nn.ModuleList(draw.choice(kinds)(width) for _ in range(blocks))
        self.sources = [sorted(draw.sample(range(2 * i + 1), k=draw.randint(1, min(3, 2 * i + 1)))) for i in range(blocks)]
        self.twice = (draw.randrange(blocks), draw.randrange(blocks))
        self.last = sorted(draw.sample(range(2 * blocks + 1), k=draw.randint(1, 3)))

    def names(self) -> list[str]:
        return [name for name, module in self.named_modules() if isinstance(module, (Block, Pair, Norm, Sharing))]

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
