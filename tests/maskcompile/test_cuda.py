"""What only a GPU can show: graphs that replay, memory, and steps that wait for nothing."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import maskcompile as mc
from maskcompile import replay
from tests.denoisers import denoiser, tensors_of
from tests.executor import Executor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact():
    """Convolutions in float32 itself, as products are by default: kernels differ in how they round TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def moved(value):
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), value)


def make(name="unet2d", **options):
    """(model on the GPU, boolean rows, the optimised denoiser, inputs of a step for a seed)."""
    case = denoiser(name)
    model = copy.deepcopy(case.model).to(DEVICE)
    args, kwargs = case.inputs(2, case.timesteps[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    compute = np.random.default_rng(1).random((len(case.timesteps), len(program.names))) < 0.4
    mask = mc.Mask(compute, blocks=program.names, timesteps=case.timesteps, reuse="linear")
    timesteps = torch.tensor(case.timesteps, device=DEVICE)

    def inputs(step: int, seed: int):
        args, kwargs = moved(case.inputs(2, case.timesteps[step], seed))
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments["timestep"]
        batch = given.numel() if isinstance(given, torch.Tensor) and given.dim() else None
        bound.arguments["timestep"] = timesteps[step] if batch is None else timesteps[step].expand(batch)
        return bound.args, bound.kwargs

    return model, compute, mc.optimize(model, mask, **options), inputs


def truth(model, fast):
    return Executor(model, fast.mask.blocks, fast.mask.compute, order=1)


def assert_follows(fast, executor, inputs, steps=5, seed=0, tolerance=1e-3):
    for step in range(steps):
        args, kwargs = inputs(step, seed + step)
        ours, theirs = tensors_of(fast(*args, **kwargs)), tensors_of(executor.step(step, *args, **kwargs))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("name", ["unet2d", "unet2d_condition", "dit", "sd3", "flux"])
def test_replayed_runs_are_the_executor(name, backend, regions):
    model, _, fast, inputs = make(name, backend=backend, regions=regions and backend != "eager", cuda_graphs=True)
    for run in range(4):
        assert_follows(fast, truth(model, fast), inputs, seed=10 * run)
    assert fast.report().recorded


def test_the_last_recorded_run_waits_for_nothing():
    model, _, fast, inputs = make("unet2d", cuda_graphs=True)
    args, kwargs = inputs(0, 0)
    fast.warmup(*args, **kwargs)
    for run in range(2):
        assert_follows(fast, truth(model, fast), inputs, seed=10 * run)
    steps = [inputs(step, 50 + step) for step in range(5)]
    torch.cuda.synchronize()
    fast(*steps[0][0], **steps[0][1])  # a run's first call reads the scheduler's timesteps
    torch.cuda.set_sync_debug_mode("error")
    try:
        for args, kwargs in steps[1:]:
            fast(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_runs_interleaved_and_weights_updated_in_place():
    model, _, fast, inputs = make("dit", cuda_graphs=True)
    for run in range(3):
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
        executors = truth(model, fast), truth(model, fast)
        for step in range(5):
            for which, executor in enumerate(executors):
                if step == 1 and which == 0:
                    for each in executors:  # two calls at the first step: both start over at the second
                        each.reset()
                args, kwargs = inputs(step, 100 * run + 10 * which + step)
                ours, theirs = tensors_of(fast(*args, **kwargs)), tensors_of(executor.step(step, *args, **kwargs))
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_steps_on_another_stream():
    model, _, fast, inputs = make("unet2d", cuda_graphs=True)
    for run in range(3):
        assert_follows(fast, truth(model, fast), inputs, seed=run)
    executor = truth(model, fast)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for step in range(5):
        args, kwargs = inputs(step, step)
        theirs = executor.step(step, *args, **kwargs)
        stream = streams[step % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ours = fast(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(tensors_of(ours), tensors_of(theirs), rtol=1e-3, atol=1e-3)


def test_steady_state_allocates_nothing_that_stays():
    model, _, fast, inputs = make("unet2d", cuda_graphs=True)
    for run in range(3):
        assert_follows(fast, truth(model, fast), inputs, seed=run)
    steps = [inputs(step, step) for step in range(5)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for args, kwargs in steps:
        result = fast(*args, **kwargs)
        assert torch.cuda.memory_allocated() - before <= sum(t.nbytes for t in tensors_of(result)) + 1024
        del result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, _, fast, inputs = make("dit", cuda_graphs=True)
    fast.to(dtype)

    def halved(step, seed):
        args, kwargs = inputs(step, seed)
        return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args), kwargs

    for run in range(3):
        executor = truth(model, fast)
        for step in range(5):
            args, kwargs = halved(step, run + step)
            ours, theirs = tensors_of(fast(*args, **kwargs)), tensors_of(executor.step(step, *args, **kwargs))
            for a, b in zip(ours, theirs, strict=True):
                assert (a.double() - b.double()).norm() < 0.02 * b.double().norm()


def test_weights_moved_away_and_back():
    model, _, fast, inputs = make("unet2d", cuda_graphs=True)
    for run in range(3):
        assert_follows(fast, truth(model, fast), inputs, seed=run)
        fast.to("cpu")
        kept = torch.empty(64 * 2**20, dtype=torch.uint8, device=DEVICE)  # so that they come back elsewhere
        fast.to(DEVICE)
    assert_follows(fast, truth(model, fast), inputs, seed=9)
    del kept


def test_a_step_that_cannot_be_recorded_leaves_the_device_usable():
    """What waits for the device ends a capture, and must not end anything else."""
    recorder = replay.Recorder(DEVICE)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="captur"):
            replay.record(lambda: [torch.ones(1, device=DEVICE).sum().item()], recorder)
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
        torch.randn(3, device=DEVICE)
    other, x = replay.Recorder(DEVICE), torch.ones(3, device=DEVICE)
    recorded = replay.record(lambda: [x * 2], other)
    x.fill_(4)
    recorded.replay()
    assert recorded.results[0].tolist() == [8.0] * 3


def test_two_threads_that_take_turns():
    model, _, fast, inputs = make("dit", cuda_graphs=True)
    for run in range(2):
        for _ in range(2):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(assert_follows, fast, truth(model, fast), inputs, seed=run).result()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for run in range(4):
            for pool in (one, other):
                pool.submit(assert_follows, fast, truth(model, fast), inputs, seed=run).result()
    assert fast.report().recorded


@pytest.mark.parametrize("kind", ["cpu tensor", "number"])
def test_timesteps_on_the_cpu(kind):
    """As DDIM's and DDPM's pipelines have them."""
    model, _, fast, inputs = make("unet2d", cuda_graphs=True)
    timesteps = [901, 701, 501, 301, 101]
    for run in range(3):
        executor, scheduled = truth(model, fast), torch.tensor(timesteps)
        for step, t in enumerate(timesteps):
            (x, _), _ = inputs(step, 10 * run + step)
            given = t if kind == "number" else scheduled[step]
            torch.testing.assert_close(fast(x, given).sample, executor.step(step, x, given).sample, rtol=1e-3, atol=1e-3)
    assert fast.report().recorded
