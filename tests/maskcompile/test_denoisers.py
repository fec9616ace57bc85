"""Masks on the denoisers of diffusers, one capture each: all layouts give what the executor gives, bit for bit on CPU.

The seven of ``tests.denoisers`` have more masks in ``test_exactness``.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import maskcompile as mc
from tests.architectures import ROWS, UNCAPTURABLE, architecture
from tests.denoisers import denoiser
from tests.executor import Executor

LOG_SNR = (-6.0, -2.0, 0.0, 1.0, 5.0)
REACH = (1.0, 1.0, 0.5, 4.0, 0.0)


def tensors_of(output):
    """Of whatever structure: ZImage returns a list in a tuple."""
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    assert found
    return found


def check(case, fast, mask, calls):
    """A run of ``fast`` under ``mask`` is one of the executor; returns the executor's results."""
    fast.set_mask(mask)
    order = [("hold", "linear").index(r) for r in mask.reuse]
    executor = Executor(case.model, mask.blocks, mask.compute, order, mask.log_snr, mask.reach)
    results = []
    for step, (args, kwargs) in enumerate(calls):
        results.append(tensors_of(executor.step(step, *args, **kwargs)))
        with torch.no_grad():
            ours = tensors_of(fast(*args, **kwargs))
        assert len(ours) == len(results[-1])
        for a, b in zip(ours, results[-1], strict=True):
            assert torch.equal(a, b), f"step {step} of {mask.reuse[0]}"
    assert fast.cache_bytes == 0
    return results


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", [name for name in ROWS if name not in UNCAPTURABLE])
def test_any_layout_is_the_executor(name):
    case = architecture(name)
    calls = [case.inputs(2, timestep, step) for step, timestep in enumerate(case.timesteps)]
    full = mc.Mask.full(mc.block_names(case.model), case.timesteps)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="In CPU autocast")
        fast = mc.optimize(case.model, full, backend="eager")
        plain = check(case, fast, full, calls)
    compute = np.random.default_rng(0).random(full.compute.shape) < 0.4
    compute[:2], compute[-1] = True, False
    held = check(case, fast, full.replace(compute), calls)
    extrapolated = check(case, fast, full.replace(compute, reuse="linear", log_snr=LOG_SNR, reach=REACH), calls)
    divided = mc.optimize(case.model, full, backend="eager", regions=True)
    for a, b in zip(check(case, divided, full.replace(compute), calls)[-1], held[-1], strict=True):
        assert torch.equal(a, b)
    # The blocks must matter, or the comparisons above would pass whatever a mask does.
    assert not torch.equal(held[-1][0], plain[-1][0])
    assert not torch.equal(held[-1][0], extrapolated[-1][0])
    assert not fast.report().uncaptured
    assert fast.report().reusing_calls > 0


@pytest.mark.parametrize("name", UNCAPTURABLE)
def test_what_cannot_be_captured_is_skipped_module_by_module(name):
    case = architecture(name)
    calls = [case.inputs(2, timestep, step) for step, timestep in enumerate(case.timesteps)]
    full = mc.Mask.full(mc.block_names(case.model), case.timesteps)
    with pytest.raises(mc.CaptureError, match=r"cannot be captured.*maskcompile\.block_names\(model\)"):
        mc.trace(case.model, *calls[0][0], **calls[0][1])
    fast = mc.optimize(case.model, full)  # whatever the backend
    before = dict(vars(case.model.get_submodule(full.blocks[0])))
    with pytest.warns(UserWarning, match="cannot be captured.*module by module, in eager PyTorch: nothing is compiled"):
        plain = check(case, fast, full, calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            compute = np.random.default_rng(seed).random(full.compute.shape) < 0.4
            held = check(case, fast, full.replace(compute), calls)
            mixed = [("hold", "linear")[i % 2] for i in range(len(full.blocks))]
            check(case, fast, full.replace(compute, reuse=mixed), calls)
            extrapolated = check(case, fast, full.replace(compute, reuse="linear", log_snr=LOG_SNR, reach=REACH), calls)
    assert not torch.equal(held[-1][0], plain[-1][0])
    assert not torch.equal(held[-1][0], extrapolated[-1][0])
    assert vars(case.model.get_submodule(full.blocks[0])) == before
    report = fast.report()
    assert report.reusing_calls == 4
    assert "NOT COMPILED blocks are skipped module by module, in eager PyTorch: " + type(case.model).__name__ in str(report)


def uncapturable():
    """A denoiser with nested blocks, one of them called twice, in which torch.export stops at Python's view of a value."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return {"out": self.inner(x), "twice": self.inner(2 * x)}

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.outer, self.last = Outer(), Inner()

        def forward(self, sample, timestep):
            if sample.sum().item() == 12345.0:
                raise RuntimeError("never")
            out = self.outer(sample + timestep / 1000)
            out["out"].mul_(1.5)  # in place, on what a cache may hold
            return self.last(self.outer.inner(out["out"]) + out["twice"])

    torch.manual_seed(0)
    return Denoiser().eval()


def test_module_by_module_runs_keep_to_themselves():
    """Nested and repeated blocks, results changed in place; runs broken off, late, and beside each other; unknown timesteps."""
    model, timesteps, blocks = uncapturable(), (900, 700, 500, 300), ["outer", "outer.inner", "last"]
    for seed in range(12):
        compute = np.random.default_rng(seed).random((4, 3)) < 0.5
        mask = mc.Mask(compute, blocks=blocks, timesteps=timesteps, reuse=["linear", "hold", "linear"] if seed % 2 else "hold")
        order = [("hold", "linear").index(rule) for rule in mask.reuse]
        executor, other = (Executor(model, blocks, compute, order) for _ in range(2))
        draw = torch.Generator().manual_seed(seed)
        fast = mc.optimize(model, mask, backend="eager")
        with pytest.warns(UserWarning, match="cannot be captured"):
            fast.warmup(torch.randn(2, 4, generator=draw), torch.tensor(900))

        def follows(executor, step, fast=fast, draw=draw):
            x, t = torch.randn(2, 4, generator=draw), torch.tensor(timesteps[step])
            result = fast(x, t)
            assert torch.equal(result, executor.step(step, x, t))
            result.zero_()

        for steps in (range(3), range(4), range(1, 4), range(4)):
            executor.reset()
            for step in steps:
                follows(executor, step)
        executor.reset()
        for step in range(4):  # two trajectories, which start over once: the second call might as well be another run
            if step == 1:
                executor.reset(), other.reset()
            follows(executor, step)
            follows(other, step)
        assert fast.cache_bytes == 0
        executor.reset()
        for step in (0, 1, None, 2, 3):
            if step is not None:
                follows(executor, step)
                continue
            x, t = torch.randn(2, 4, generator=draw), torch.tensor(600)
            with pytest.warns(UserWarning, match="does not know timestep 600"):
                result = fast(x, t)
            assert torch.equal(result, executor.full(2, x, t))


def test_a_module_by_module_step_that_fails_leaves_the_run_as_it_was():
    model = uncapturable()
    mask = mc.Mask([[True], [False], [False]], blocks=["outer.inner"], timesteps=(900, 700, 500))
    fast = mc.optimize(model, mask, backend="eager")
    executor = Executor(model, mask.blocks, mask.compute)
    for step, t in enumerate(mask.timesteps):
        x, t = torch.randn(2, 4, generator=torch.Generator().manual_seed(step)), torch.tensor(t)
        if step == 1:
            with pytest.raises(RuntimeError, match="never"):
                fast(torch.full((2, 4), 12345.0 / 8), t)
        if step == 0:
            with pytest.warns(UserWarning, match="cannot be captured"):
                result = fast(x, t)
        else:
            result = fast(x, t)
        assert torch.equal(result, executor.step(step, x, t))
    assert "forward" not in vars(model.outer.inner)


def test_wrong_inputs_are_no_reason_to_skip_module_by_module():
    case = denoiser("unet2d")
    fast = mc.optimize(case.model, mc.Mask.full(["mid_block.resnets.0"], [999]), backend="eager")
    with pytest.raises(RuntimeError, match=r"UNet2DModel \(weights float32 on cpu\) does not run on these inputs"):
        fast(torch.randn(1, 5, 16, 16), 999)
    assert not fast.report().uncaptured
