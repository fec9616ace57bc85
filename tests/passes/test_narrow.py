"""Linear layers of which a part is read: that part alone is computed, and everything comes out as without."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import maskcompile as mc
from maskcompile import compile as compiling
from passes.plan import plan_run
from passes.reuse import Rules
from passes.specialise import specialise
from tests.denoisers import denoiser, tensors_of
from tests.executor import Executor


def graphs(program, compute):
    """(as it is, narrowed) for every step."""
    for plan in plan_run(program.slots, program.names, compute, Rules(["hold"] * len(program.names))):
        yield tuple(specialise(program.capture, plan.key, narrow) for narrow in (False, True))


def run(graph, seed=0):
    """(the outputs on random inputs, MACs)"""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for node in graph.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        if like.is_floating_point():
            inputs.append(torch.randn(like.shape, generator=generator, dtype=like.dtype))
        else:
            inputs.append(torch.ones(like.shape, dtype=like.dtype))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        return graph(*inputs), counter.get_total_flops() // 2


def rows(program, reused):
    """Everything, then everything but the blocks that ``reused`` says."""
    return np.array([[True] * len(program.names), [not reused(name) for name in program.names]])


@pytest.mark.parametrize(
    ("reused", "share"),
    [(lambda name: True, 2 / 6), (lambda name: "attn" in name, 4 / 6), (lambda name: ".ff" in name, 4 / 6)],
    ids=["all", "attention", "feed-forward"],
)
def test_the_modulation_of_a_dit(reused, share):
    """Of six shifts, scales and gates: the two gates, and what the block that is computed takes, two more."""
    case = denoiser("dit")
    args, kwargs = case.inputs(2, 901, 0)
    program = mc.trace(case.model, *args, **kwargs)
    (whole, narrow_whole), (some, narrow_some) = graphs(program, rows(program, reused))
    assert run(whole)[1] == run(narrow_whole)[1] == program.macs
    width, layers, batch = 16, 2, 2
    (plain, macs), (fewer, less) = run(some), run(narrow_some)
    assert macs - less == round((1 - share) * layers * batch * width * 6 * width)
    for a, b in zip(plain, fewer, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "unet2d_condition", "timm_dit"])
def test_any_mask_gives_the_same(name):
    case = denoiser(name)
    args, kwargs = case.inputs(2, 901, 0)
    program = mc.trace(case.model, *args, **kwargs)
    less = 0
    for seed in range(4):
        compute = np.random.default_rng(seed).random((3, len(program.names))) < 0.4
        for plain, narrow in graphs(program, compute):
            (expected, macs), (found, fewer) = run(plain, seed), run(narrow, seed)
            less += macs - fewer
            for a, b in zip(expected, found, strict=True):
                torch.testing.assert_close(a, b)
    if name != "flux":  # which reuses whole layers, but for the first; these masks happen to compute its attention
        assert (less > 0) == (name in ("dit", "sd3", "timm_dit"))


class Reader(nn.Module):
    """Reads parts of a linear layer, as ``read`` says."""

    def __init__(self, read, bias=True):
        super().__init__()
        self.modulation, self.body, self.read = nn.Linear(4, 12, bias=bias), nn.Sequential(nn.Linear(4, 4)), read

    def forward(self, sample, timestep):
        return self.read(self.modulation(torch.sin(timestep * sample[:, 0])), self.body(sample))


def macs_of_modulation(read, bias=True):
    """Columns of the modulation that are computed where the body is not, with the same result as without this pass."""
    program = mc.trace(Reader(read, bias).eval(), torch.randn(2, 3, 4), torch.tensor(5.0), blocks=["body"])
    _, (plain, narrow) = graphs(program, rows(program, lambda name: True))
    (expected, _), (found, macs) = run(plain), run(narrow)
    torch.testing.assert_close(expected[0], found[0])
    return macs / (2 * 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("read", "columns"),
    [
        (lambda m, x: x * m[:, None, 2:6], 4),
        (lambda m, x: x * m[:, None, -4:], 4),
        (lambda m, x: x * m[:, None, -6:-2] + m[:, None, 4:8], 6),
        (lambda m, x: x * m.unsqueeze(1)[..., :4] + m.unsqueeze(1)[..., 8:], 8),
        (lambda m, x: x * m.split([2, 4, 6], dim=1)[1][:, None], 4),
        (lambda m, x: x * m.chunk(3, dim=-1)[0].chunk(2, dim=-1)[1].repeat(1, 2)[:, None], 2),
        (lambda m, x: x * m.chunk(3, dim=-1)[2][:, None] * m.mean(), 12),
        (lambda m, x: x * m.chunk(2, dim=0)[0][:, None, :4], 12),
        (lambda m, x: x * m[:, None, ::3], 12),
        (lambda m, x: x * m[:, None, 1:5] + m[:, None, 5:9], 8),
        (lambda m, x: x * m[:, None, 1:5] + m[:, 1:11].sum(), 12),  # nearly all of it
        (lambda m, x: (x * m[:, None, :4], m)[0], 4),
    ],
)
def test_what_is_read(read, columns, bias):
    assert macs_of_modulation(read, bias) == columns


def test_what_leaves_the_graph_is_whole():
    """A modulation that is a result, or stored for the next step, is computed as a whole."""
    program = mc.trace(
        Reader(lambda m, x: (x * m[:, None, :4], m)).eval(), torch.randn(2, 3, 4), torch.tensor(5.0), blocks=["body"]
    )
    for plain, narrow in graphs(program, rows(program, lambda name: True)):
        for a, b in zip(run(plain)[0], run(narrow)[0], strict=True):
            torch.testing.assert_close(a, b)
    program = mc.trace(
        Reader(lambda m, x: x * m[:, None, :4]).eval(), torch.randn(2, 3, 4), torch.tensor(5.0), blocks=["body", "modulation"]
    )
    compute = np.array([[True, True], [False, False]])
    (plain, narrow), _ = graphs(program, compute)
    assert any(output.shape == (2, 12) for output in run(narrow)[0])
    for a, b in zip(run(plain)[0], run(narrow)[0], strict=True):
        torch.testing.assert_close(a, b)


class Odd(nn.Module):
    """Linear layers of unusual weights, parts of which are read."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4))
        self.vector, self.weight = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(12, 4))
        self.one = nn.Parameter(torch.randn(1))

    def forward(self, sample, timestep):
        rows = nn.functional.linear(sample * timestep, self.vector)  # [2, 12]
        wide = nn.functional.linear(sample[:, 0] * timestep, self.weight, self.one)
        plain = nn.functional.linear(sample[0, 0], self.weight)
        computed = nn.functional.linear(sample[:, 0], self.weight * 2)
        parts = rows[:, 2:6] + wide[:, :4] + plain[:4] + computed[:, :4] + wide[:, 3:3].sum()
        return self.body(sample) * parts[:, None]


def test_unusual_layers_stay_as_they_are():
    program = mc.trace(Odd().eval(), torch.randn(2, 12, 4), torch.tensor(0.5), blocks=["body"])
    for plain, narrow in graphs(program, rows(program, lambda name: True)):
        (expected, macs), (found, same) = run(plain), run(narrow)
        torch.testing.assert_close(expected[0], found[0])
        assert same == macs


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regions_narrow_too(batch, dtype, monkeypatch):
    """Of what is compiled, region by region, for any batch: the MACs that are really computed."""
    monkeypatch.setattr(compiling, "_compiled", {})
    torch._dynamo.reset()
    case = copy.deepcopy(denoiser("dit"))
    case.model.to(dtype)
    calls = []
    for step, timestep in enumerate((901, 701)):
        args, kwargs = case.inputs(batch, timestep, step)
        calls.append(([x.to(dtype) for x in args], kwargs))
    args, kwargs = calls[0]
    program = mc.trace(case.model, *args, **kwargs)
    mask = mc.Mask([[True] * 4, [False] * 4], blocks=program.names, timesteps=(901, 701))
    macs = []

    def backend(graph_module, inputs):
        def counted(*tensors):
            with FlopCounterMode(display=False) as counter:
                outputs = graph_module(*tensors)
            macs.append(counter.get_total_flops() // 2)
            return outputs

        return counted

    fast = mc.optimize(case.model, mask, backend=backend, dynamic=True)
    executor = Executor(case.model, mask.blocks, mask.compute)
    for step, (args, kwargs) in enumerate(calls):
        macs.clear()
        ours = fast(*args, **kwargs)
        for a, b in zip(tensors_of(ours), tensors_of(executor.step(step, *args, **kwargs)), strict=True):
            torch.testing.assert_close(a, b)
    assert fast.report().signatures[0].regions
    plan = plan_run(program.slots, program.names, mask.compute, Rules(["hold"] * 4))[1]
    width, layers = 16, 2
    assert plan.macs - sum(macs) == 4 * layers * batch * width * width
