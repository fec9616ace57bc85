"""Delta-DiT's mask against a delta cache of its own: equal in a residual stream, and apart by the gates of adaLN alone."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

import maskcompile as mc
from tests.denoisers import denoiser, tensors_of


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1)))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention, self.mlp = (
            Attention(width),
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    """Pre-norm, without gates: what is outside of the blocks is the residual stream."""

    def __init__(self, layers=4, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.time, self.last = nn.Linear(1, width), nn.Linear(width, width)

    def forward(self, sample, timestep):
        x = sample + self.time(timestep.reshape(-1, 1, 1).float() / 1000)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class DeltaCache:
    """A range of layers is skipped, and what it added when it last ran is added again."""

    def __init__(self, layers):
        self.deltas, self.range = {}, None
        for index, layer in enumerate(layers):
            layer.forward = self.wrap(index, layer.forward)

    def wrap(self, index, forward):
        def layer(x, *args, **kwargs):
            if self.range is None or index not in self.range:
                result = forward(x, *args, **kwargs)
                self.deltas[index] = result - x
                return result
            return x + self.deltas[index]

        return layer


TIMESTEPS = tuple(range(900, 0, -90))


def rows(interval, cached, boundary, layers):
    """Which layers each step skips, from the paper's description."""
    for i in range(len(TIMESTEPS)):
        if i % interval == 0:
            yield None
        else:
            yield range(layers - cached, layers) if i < boundary else range(cached)


@cache
def residual_stream():
    """(transformer, its program, the transformer optimised, for any mask)"""
    model = Transformer().eval()
    program = mc.trace(model, torch.randn(2, 5, 8), torch.full((2,), 900))
    return model, program, mc.optimize(model, mc.Mask.full(program.names, TIMESTEPS), backend="eager")


@pytest.mark.parametrize(("interval", "cached", "boundary"), [(2, 3, 4), (3, 1, 5), (4, 4, 0), (2, 2, 10)])
def test_equal_to_a_delta_cache_in_a_residual_stream(interval, cached, boundary):
    model, program, fast = residual_stream()
    mask = mc.schedules.delta_dit(program, TIMESTEPS, interval, cached, boundary)
    cachedly = copy.deepcopy(model)
    deltas = DeltaCache(cachedly.layers)
    fast.set_mask(mask)
    for i, (t, skipped) in enumerate(zip(TIMESTEPS, rows(interval, cached, boundary, 4), strict=True)):
        deltas.range = skipped
        sample, time = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i)), torch.full((2,), t)
        with torch.no_grad():
            theirs = cachedly(sample, time)
        torch.testing.assert_close(fast(sample, time), theirs, rtol=1e-5, atol=1e-6)
        wanted = [skipped is None or j not in skipped for j in range(4)]
        assert mask.compute[i].tolist() == [runs for runs in wanted for _ in range(2)]


@pytest.mark.parametrize("gates", ["constant", "by timestep"])
def test_the_gates_of_dit_are_what_differs(gates):
    case = denoiser("dit")
    model = copy.deepcopy(case.model)
    if gates == "constant":  # adaLN sees the class alone
        with torch.no_grad():
            for block in model.transformer_blocks:
                block.norm1.emb.timestep_embedder.linear_2.weight.zero_()
    args, kwargs = case.inputs(2, 900, 0)
    mask = mc.schedules.delta_dit(mc.trace(model, *args, **kwargs), TIMESTEPS, 2, 1, 5)
    cachedly = copy.deepcopy(model)
    deltas = DeltaCache(cachedly.transformer_blocks)
    fast = mc.optimize(model, mask, backend="eager")
    differs = 0.0
    for i, (t, skipped) in enumerate(zip(TIMESTEPS, rows(2, 1, 5, 2), strict=True)):
        deltas.range = skipped
        args, kwargs = case.inputs(2, t, i)
        with torch.no_grad():
            theirs = tensors_of(cachedly(*args, **kwargs))[0]
        differs = max(differs, (tensors_of(fast(*args, **kwargs))[0] - theirs).abs().max().item() / theirs.std().item())
    assert differs < 1e-5 if gates == "constant" else differs > 1e-4


def test_layers_go_from_one_self_attention_to_the_next():
    case = denoiser("pixart")
    args, kwargs = case.inputs(2, 900, 0)
    mask = mc.schedules.delta_dit(mc.trace(case.model, *args, **kwargs), [4, 3, 2, 1], 2, 1, 2)
    assert mask.compute.astype(int).tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 6, [0, 0, 0, 1, 1, 1]]


def test_what_delta_dit_cannot_do():
    case = denoiser("unet2d")
    args, kwargs = case.inputs(2, 900, 0)
    with pytest.raises(mc.MaskError, match="UNet2DModel is no plain transformer"):
        mc.schedules.delta_dit(mc.trace(case.model, *args, **kwargs), [2, 1], 2, 1, 1)
    program = residual_stream()[1]
    with pytest.raises(mc.MaskError, match="cached must be 1 to 4 layers"):
        mc.schedules.delta_dit(program, [2, 1], 2, 5, 1)
    with pytest.raises(mc.MaskError, match="boundary must be 0 to 2 steps"):
        mc.schedules.delta_dit(program, [2, 1], 2, 1, 3)
