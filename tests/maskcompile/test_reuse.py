"""The linear rule from end to end: against the executor, diffusers' TaylorSeer hook, and what it is for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor import metrics

import maskcompile as mc
from benchmarks.rivals import BLOCKS as HOOKED
from benchmarks.rivals import taylorseer_computes, taylorseer_hook
from benchmarks.sampling import noise, psnr, sample, task
from tests.denoisers import denoiser, tensors_of
from tests.executor import Executor
from tests.toys import Chain

BLOCKS = ["a", "b", "c"]
TIMESTEPS = tuple(range(1000, 0, -80))


def latents(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def every_third(**changes):
    compute = np.repeat((np.arange(len(TIMESTEPS)) % 3 == 0)[:, None], 3, 1)
    compute[:, 0] = True
    return mc.Mask(compute, blocks=BLOCKS, timesteps=TIMESTEPS, **{"reuse": "linear"} | changes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("log_snr", [None, tuple(0.1 * i * i - 5 for i in range(len(TIMESTEPS)))])
def test_every_dtype_is_the_executor(dtype, log_snr):
    model = Chain().eval().to(dtype)
    mask = every_third(log_snr=log_snr)
    fast = mc.optimize(model, mask, backend="eager")
    executor, held = (Executor(model, BLOCKS, mask.compute, order, log_snr) for order in (1, 0))
    differ = 0
    for step, t in enumerate(TIMESTEPS):
        x, t = latents(step).to(dtype), torch.tensor(t).to(dtype)
        expected = executor.step(step, x, t)
        assert torch.equal(fast(x, t), expected)
        differ += not torch.equal(expected, held.step(step, x, t))
    assert differ >= 6


@pytest.mark.parametrize("interval", [2, 3])
def test_it_is_taylorseers_hook(interval):
    """Order 1 of diffusers' implementation: the same blocks, the same steps, the step index alone.

    At larger intervals the hook reaches further after its three first steps than they are apart, where ours stops.
    """
    case = denoiser("dit")
    args, kwargs = case.inputs(2, 1, 0)
    program = mc.trace(case.model, *args, **kwargs)
    timesteps = tuple(range(960, 0, -60))
    full = [taylorseer_computes(step, interval) for step in range(len(timesteps))]
    compute = np.repeat(np.array(full)[:, None], len(program.names), 1)
    fast = mc.optimize(case.model, mc.Mask(compute, blocks=program.names, timesteps=timesteps, reuse="linear"), backend="eager")
    hooked = copy.deepcopy(case.model)
    with taylorseer_hook(hooked, HOOKED["dit"], interval, order=1):
        for step, t in enumerate(timesteps):
            args, kwargs = case.inputs(2, t, step)
            with torch.no_grad():
                theirs = tensors_of(hooked(*args, **kwargs))
            for a, b in zip(tensors_of(fast(*args, **kwargs)), theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert fast.report().reusing_calls == full.count(False)


def test_what_it_reaches_is_bounded():
    """Two steps computed, all others extrapolated: no further than one more distance of the two, ever."""
    model = Chain().eval()
    compute = np.zeros((len(TIMESTEPS), 3), dtype=bool)
    compute[:2] = True
    fast = mc.optimize(model, every_third().replace(compute), backend="eager")
    outputs = [fast(latents(0), torch.tensor(t)) for t in TIMESTEPS]
    for output in outputs[2:]:
        assert torch.equal(output, outputs[1] + 1.0 * (outputs[1] - outputs[0]))


def test_whole_numbers_are_held():
    class Ranked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, time):
            values = self.layer(x + time)
            return values, values.argsort(-1), values > 0

    class Sorting(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = Ranked()

        def forward(self, sample, timestep):
            values, order, positive = self.b(sample, timestep / 1000)
            return values.gather(-1, order) * positive

    model = Sorting().eval()
    compute = every_third().compute[:, 1:2]
    mask = mc.Mask(compute, blocks=["b"], timesteps=TIMESTEPS, reuse="linear")
    fast, executor = mc.optimize(model, mask, backend="eager"), Executor(model, ["b"], compute, 1)
    for step, t in enumerate(TIMESTEPS):
        assert torch.equal(fast(latents(step), torch.tensor(t)), executor.step(step, latents(step), torch.tensor(t)))


class Single(nn.Module):
    """One block, whatever it returns; a result that depends on all of it."""

    def __init__(self, block):
        super().__init__()
        self.b = block

    def forward(self, sample, timestep):
        return self.b(sample, timestep)


class Waves(nn.Module):
    def forward(self, x, time):
        return torch.polar(x.exp(), x * time / 300)


class Masking(nn.Module):
    """As masks of attention do, it returns infinities, at the same places in every step."""

    def forward(self, x, time):
        return (x * time).masked_fill(torch.arange(4) > 2, -torch.inf)


class Growing(nn.Module):
    def forward(self, x, time):
        return (torch.ones_like(x) * ((1060.0 - time) * 75)).clamp(max=60000)


class Scalar(nn.Module):
    def forward(self, x, time):
        return (x * time).mean(), x.double() * time


@pytest.mark.parametrize(
    ("block", "dtype"), [(Waves, torch.float32), (Masking, torch.float32), (Growing, torch.float16), (Scalar, torch.float32)]
)
def test_unusual_outputs(block, dtype):
    """Complex ones are extrapolated; where the result is not finite the last output is held; dtypes stay, of scalars too."""
    model = Single(nn.Sequential(block())).eval()
    model.b.forward = lambda x, time: model.b[0](x, time)
    compute = every_third().compute[:, 1:2]
    mask = mc.Mask(compute, blocks=["b"], timesteps=TIMESTEPS, reuse="linear")
    fast, executor = mc.optimize(model, mask, backend="eager"), Executor(model, ["b"], compute, 1)
    for step, t in enumerate(TIMESTEPS):
        x = latents(step).to(dtype)
        ours, theirs = fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t))
        for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
            assert not a.isnan().any()
            assert block is not Growing or a.isfinite().all()


def test_names_of_arguments_do_not_matter():
    class Named(Chain):
        def forward(self, sample, timestep, coefficients, cached_0_0):
            return super().forward(sample + coefficients, timestep) * cached_0_0

    model = Named().eval()
    for reuse, order in (("hold", 0), ("linear", 1)):
        mask = every_third(reuse=reuse)
        fast, executor = mc.optimize(model, mask, backend="eager"), Executor(model, BLOCKS, mask.compute, order)
        for step, t in enumerate(TIMESTEPS):
            args = (latents(step), torch.tensor(t), latents(step + 50), latents(step + 70))
            assert torch.equal(fast(*args), executor.step(step, *args))


def test_a_block_that_returns_a_weight():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

        def forward(self, x, time):
            return self.weight, self.layer(x) * time

    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = Constant()

        def forward(self, sample, timestep):
            weight, x = self.b(sample, timestep)
            return weight + x

    model = Adding().eval()
    compute = every_third().compute[:, 1:2]
    fast = mc.optimize(model, mc.Mask(compute, blocks=["b"], timesteps=TIMESTEPS, reuse="linear"), backend="aot_eager")
    fast.warmup(latents(0), torch.tensor(TIMESTEPS[0]))
    executor = Executor(model, ["b"], compute, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, t in enumerate(TIMESTEPS):
            ours = fast(latents(step), torch.tensor(t))
            torch.testing.assert_close(ours, executor.step(step, latents(step), torch.tensor(t)))
            cached = [c.untyped_storage().data_ptr() for r in fast._threads.own.runs.trajectories for c in r.cache]
            assert model.b.weight.untyped_storage().data_ptr() not in cached


def test_many_masks_leave_nothing_behind():
    model = Chain().eval()
    fast = mc.optimize(model, every_third(), backend="eager")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        fast.set_mask(every_third(log_snr=tuple(np.cumsum(rng.random(len(TIMESTEPS)) + 0.01).tolist())))
        for t in TIMESTEPS:
            fast(latents(0), torch.tensor(t))
    (schedule,) = fast._schedules.values()
    assert 0 < len(schedule.coefficients) <= len(TIMESTEPS)


def test_equal_structure_shares_a_compiled_graph():
    """The coefficients are an input: steps one and two after a computation run one graph, on any clock, with any timesteps."""
    model = Chain().eval()
    fast = mc.optimize(model, every_third(), backend="aot_eager")
    fast.warmup(latents(0), torch.tensor(1000))
    compiled = fast.report().signatures[0].compile_seconds
    assert fast.report().signatures[0].graphs == len(compiled) == 3  # computes, holds (one computation so far), extrapolates
    with torch._dynamo.config.patch(error_on_recompile=True):
        for log_snr in (None, tuple(0.3 * i for i in range(len(TIMESTEPS)))):
            mask = every_third(log_snr=log_snr)
            fast.set_mask(mask)
            executor = Executor(model, BLOCKS, mask.compute, 1, log_snr)
            for step, t in enumerate(TIMESTEPS):
                ours, theirs = fast(latents(step), torch.tensor(t)), executor.step(step, latents(step), torch.tensor(t))
                torch.testing.assert_close(ours, theirs)
    assert fast.report().signatures[0].compile_seconds == compiled


@pytest.mark.parametrize(("name", "added"), [("dit", 0), ("unet2d", 1)])
def test_inductor_fuses_it(name, added):
    """Into what reads the result; the UNet's two readers (a group norm's statistics, and what it norms) get one kernel."""
    case = denoiser(name)
    args, kwargs = case.inputs(2, case.timesteps[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    kernels = {}
    for reuse in ("hold", "linear"):
        torch._dynamo.reset()
        mask = mc.schedules.uniform(program, case.timesteps, 2, reuse=reuse)
        fast = mc.optimize(case.model, mask, regions=False)
        counts = []
        with torch._inductor.config.patch(force_disable_caches=True):
            for step, t in enumerate(case.timesteps[:4]):
                metrics.reset()
                args, kwargs = case.inputs(2, t, step)
                fast(*args, **kwargs)
                counts.append(metrics.generated_kernel_count)
        kernels[reuse] = counts
    # Steps 0 and 1 compute and hold under both rules, step 3 is the first that extrapolates.
    assert kernels["hold"][:2] == kernels["linear"][:2]
    assert kernels["hold"][3] == 0
    assert 0 < kernels["linear"][3] <= kernels["linear"][1] + added


def test_the_report_says_what_it_costs():
    model = Chain().eval()
    reports = {}
    for reuse in ("hold", "linear"):
        fast = mc.optimize(model, every_third(reuse=reuse), backend="eager")
        fast(latents(0), torch.tensor(TIMESTEPS[0]))
        reports[reuse] = fast.report()
    hold, linear = (reports[reuse].signatures[0] for reuse in ("hold", "linear"))
    # c is reused and hides b: two versions of a [2, 4] float tensor instead of one.
    assert (hold.peak_cache_bytes, hold.held_cache_bytes, hold.extrapolated) == (32, 32, 0)
    assert (linear.peak_cache_bytes, linear.held_cache_bytes) == (64, 32)
    reused_after_two = sum(step % 3 > 0 for step in range(4, len(TIMESTEPS)))
    assert linear.extrapolated == 8 * reused_after_two
    assert "extrapolate" in str(reports["linear"])
    assert "extrapolate" not in str(reports["hold"])
    assert linear.macs == hold.macs


def test_it_does_what_it_is_for():
    """On the bundled UNet at 20 steps, half of the blocks' work: closer to the unmasked pictures by far, and the clock helps."""
    t = task("unet", 20)
    args, kwargs = t.inputs(2)
    program = mc.trace(t.denoiser, *args, **kwargs, return_dict=False)
    start = noise(2, seed=77)
    original = sample(t, t.denoiser, start)

    def quality(**reuse):
        mask = mc.schedules.uniform(program, t.timesteps, 2, warmup=4, **reuse)
        return psnr(sample(t, mc.optimize(t.denoiser, mask, backend="eager"), start), original).mean()

    held, by_index = quality(), quality(reuse="linear")
    linear = quality(reuse="linear", log_snr=mc.log_snr(t.scheduler))
    assert linear > held + 4
    assert linear > by_index > held
