"""Steps replayed on memory of their own. Without a GPU, what stands for a CUDA graph executes the recorded step again, and
writes its results where the recording had them, so that whatever is overwritten too early shows."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import maskcompile as mc
from maskcompile import replay, runtime
from tests.denoisers import denoiser, tensors_of
from tests.executor import Executor
from tests.maskcompile.test_runtime import BLOCKS, REUSE, TIMESTEPS, log_snr, sample, truth
from tests.toys import Chain


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    """How many steps were recorded, and replayed."""
    counts = {"recorded": 0, "replayed": 0}

    def record(run, recorder):
        counts["recorded"] += 1
        like = _dry(run)
        with torch.inference_mode(False):
            results = [torch.full(tensor.shape, float("nan"), dtype=tensor.dtype) for tensor in like]

        def replayed():
            counts["replayed"] += 1
            for own, made in zip(results, run(), strict=True):
                own.copy_(made)

        return replay.Recorded(replayed, results)

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(runtime, "obstacle", lambda inputs: None)
    return counts


def _dry(run):
    """The results of a step, with everything that it writes to put back: recording executes nothing."""
    memory = next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, replay.Arena)).memory
    before = memory.clone()
    try:
        return run()
    finally:
        memory.copy_(before)


def make(seed=0, backend="eager", density=0.4, timesteps=TIMESTEPS):
    torch.manual_seed(seed)
    model = Chain().eval()
    compute = np.random.default_rng(seed).random((len(timesteps), 3)) < density
    mask = mc.Mask(compute, blocks=BLOCKS, timesteps=timesteps, reuse=REUSE, log_snr=log_snr(len(timesteps)))
    return model, compute, mc.optimize(model, mask, backend=backend, cuda_graphs=True)


def assert_follows(fast, executor, steps, batch=2, seed=0, exact=True):
    for step in steps:
        x, t = sample(seed + step, batch), torch.tensor(TIMESTEPS[step])
        ours, theirs = fast(x, t), executor.step(step, x.clone(), t)
        x.mul_(0)  # the caller's, and not what a later replay reads
        if exact:
            assert torch.equal(ours, theirs), step
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ours.mul_(0)


def test_runs_in_a_row_are_the_executor():
    model, _, fast = make()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(arrays(np.bool_, (5, 3)), st.lists(st.sampled_from([0, 1]), min_size=3, max_size=3))
    def check(compute, order):
        fast.set_mask(fast.mask.replace(compute=compute, reuse=[("hold", "linear")[i] for i in order]))
        for run in range(4):
            executor = Executor(model, BLOCKS, compute, order=order, log_snr=log_snr(5))
            assert_follows(fast, executor, range(5), seed=10 * run)

    check()


def test_runs_of_some_of_the_steps_are_replayed_too(recordings):
    """Steps 0, 2 and 4 of the mask, each of which computes also what the mask computes at the one left out before it."""
    model, compute, fast = make(3)
    rows = [compute[0], compute[1] | compute[2], compute[3] | compute[4]]
    executor = Executor(model, BLOCKS, rows, order=(0, 1, 1), log_snr=log_snr(5)[::2])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this run skips from step 0 of the mask to step 2")
        for run in range(3):
            before = recordings["replayed"]
            for position, t in enumerate(torch.tensor(TIMESTEPS[::2])):
                x = sample(10 * run + position)
                assert torch.equal(fast(x, t), executor.step(position, x, t))
            executor.reset()
    assert recordings["replayed"] == before + 3
    assert_follows(fast, truth(model, compute), range(5))  # and then a whole one, in memory of its own


def test_every_step_is_replayed_in_the_end(recordings):
    model, compute, fast = make(3)
    for _ in range(2):
        assert_follows(fast, truth(model, compute), range(5))
    recorded, replayed = recordings["recorded"], recordings["replayed"]
    assert_follows(fast, truth(model, compute), range(5))
    assert recordings == {"recorded": recorded, "replayed": replayed + 5}
    assert fast.report().recorded == recorded
    assert "CUDA graphs" in str(fast.report())


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_warmup_records_all(recordings, backend):
    model, compute, fast = make(3, backend)
    fast.warmup(sample(0), torch.tensor(TIMESTEPS[0]))
    before = dict(recordings)
    assert_follows(fast, truth(model, compute), range(5), exact=backend == "eager")
    assert recordings == {"recorded": before["recorded"], "replayed": before["replayed"] + 5}


def test_equal_steps_share_a_recording(recordings):
    """Of a mask with every second step in full, however long the run: the first two, the last, and two in turn between."""
    model = Chain().eval()
    timesteps = tuple(range(2000, 0, -50))
    compute = np.repeat((np.arange(len(timesteps)) % 2 == 0)[:, None], 3, 1)
    fast = mc.optimize(
        model, mc.Mask(compute, blocks=BLOCKS, timesteps=timesteps, reuse="linear"), backend="eager", cuda_graphs=True
    )
    executor = Executor(model, BLOCKS, compute, order=1)
    for _ in range(3):
        for step, t in enumerate(timesteps):
            x = sample(step)
            assert torch.equal(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t)))
        executor.reset()
    assert recordings["recorded"] <= 10


def test_interleaved_runs_have_memory_of_their_own():
    """Two trajectories at every timestep, as separate guidance passes make them; each starts over at the second step."""
    model, compute, fast = make(5)
    doubled = np.vstack([compute[:1] | True, compute[1:]])
    doubled[1] = True
    fast.set_mask(fast.mask.replace(compute=doubled))
    for run in range(3):
        executors = truth(model, doubled), truth(model, doubled)
        for step, t in enumerate(TIMESTEPS):
            for which, executor in enumerate(executors):
                x = sample(100 * run + 10 * which + step)
                assert torch.equal(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t))), (run, step, which)
    assert [arena.schedule.plans is fast._arenas[-1].schedule.plans for arena in fast._arenas].count(True) == 2


def test_more_runs_than_arenas(monkeypatch):
    monkeypatch.setattr(runtime, "MOST_ARENAS", 2)
    model, compute, fast = make(5)
    compute = compute.copy()
    compute[1] = True
    fast.set_mask(fast.mask.replace(compute=compute))
    for _ in range(2):
        executors = [truth(model, compute) for _ in range(3)]
        for step, t in enumerate(TIMESTEPS):
            for which, executor in enumerate(executors):
                x = sample(10 * which + step)
                assert torch.equal(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t))), (step, which)
    assert len(fast._arenas) == 2


def test_threads():
    model, compute, fast = make(5)
    failed = []
    own = [copy.deepcopy(model) for _ in range(6)]  # an executor swaps the forwards of its model

    def run(number):
        try:
            for round_ in range(4):
                executor = truth(own[number], compute)
                timesteps = torch.tensor(TIMESTEPS)
                for step, t in enumerate(timesteps):
                    x = sample(100 * number + 10 * round_ + step)
                    with torch.no_grad():
                        if not torch.equal(fast(x, t), executor.step(step, x, t)):
                            failed.append((number, round_, step))
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(fast._arenas) <= replay.MOST_ARENAS


def test_batches_and_weights_change():
    model, compute, fast = make(5)
    for run, batch in enumerate((2, 3, 2, 3)):
        assert_follows(fast, truth(model, compute), range(5), batch=batch, seed=run)
        with torch.no_grad():
            model.a.up.weight.mul_(1.5)
    model.a.up.weight = torch.nn.Parameter(model.a.up.weight * 2)
    assert_follows(fast, truth(model, compute), range(5))
    assert fast.report().recaptures == 1


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_step_that_fails_ends_the_run(step, monkeypatch):
    model, compute, fast = make(5)
    for _ in range(2):
        assert_follows(fast, truth(model, compute), range(5))
    assert_follows(fast, truth(model, compute), range(step))
    arena = fast._arenas[-1]
    bound, recorded = arena.ready[step]

    def broken():
        arena.memory.fill_(255)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setitem(arena.ready, step, (bound, replay.Recorded(broken, recorded.results)))
        with pytest.raises(RuntimeError, match="out of memory"):
            fast(sample(step), torch.tensor(TIMESTEPS[step]))
    assert_follows(fast, truth(model, compute), range(step, 5))
    assert_follows(fast, truth(model, compute), range(5))


@pytest.mark.parametrize("strict", [True, "auto"])
def test_what_cannot_be_recorded_is_executed_and_said(strict, monkeypatch):
    def record(run, recorder):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(replay, "record", record)
    model, compute, _ = make(5)
    fast = mc.optimize(model, make(5)[2].mask, backend="aot_eager", cuda_graphs=strict)
    assert_follows(fast, truth(model, compute), range(1), exact=False)
    if strict is True:
        with pytest.raises(RuntimeError, match=r"recorded as a CUDA graph: operation not.*; pass cuda_graphs=False."):
            fast.warmup(sample(0), torch.tensor(TIMESTEPS[0]))
    else:
        with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph: operation not permitted") as warned:
            fast.warmup(sample(0), torch.tensor(TIMESTEPS[0]))
        for _ in range(3):
            assert_follows(fast, truth(model, compute), range(5), exact=False)
        assert len(warned) == 1
        assert "operation not permitted" in str(fast.report())


@pytest.mark.parametrize("dtypes", [[torch.float32] * 5, [torch.float32, torch.bfloat16, torch.float32, torch.float64]])
def test_coefficients_lie_where_compiled_code_takes_them_as_they_are(dtypes):
    """Inductor clones inputs at addresses that are no multiples of 16."""
    values = [torch.tensor(float(i), dtype=dtype) for i, dtype in enumerate(dtypes)]
    own, parts = replay._packed_like(values)
    for tensor, packed in zip(own, replay._packed(values), strict=True):
        tensor.copy_(packed)
    assert [(part.item(), part.dtype) for part in parts] == [(float(i), dtype) for i, dtype in enumerate(dtypes)]
    assert not any(part.data_ptr() % 16 for part in parts)


@pytest.mark.parametrize("name", ["unet2d", "flux"])
def test_denoisers(name):
    case = denoiser(name)
    args, kwargs = case.inputs(2, case.timesteps[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    compute = np.random.default_rng(1).random((5, len(program.names))) < 0.4
    mask = mc.Mask(compute, blocks=program.names, timesteps=case.timesteps, reuse="linear")
    fast = mc.optimize(case.model, mask, backend="eager", cuda_graphs=True)
    for run in range(3):
        executor = Executor(case.model, program.names, compute, order=1)
        for step, t in enumerate(case.timesteps):
            args, kwargs = case.inputs(2, t, 10 * run + step)
            ours, theirs = tensors_of(fast(*args, **kwargs)), tensors_of(executor.step(step, *args, **kwargs))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), (run, step)
    signature = fast.report().signatures[0]
    # Half a kilobyte is what each tensor may take more than it needs.
    assert signature.peak_cache_bytes <= fast._arenas[0].memory.nbytes
    most = max(len(plan.held) for plan in fast._arenas[0].schedule.plans)
    assert fast._arenas[0].memory.nbytes <= 1.1 * (signature.peak_cache_bytes + 512 * most)


def test_without_a_gpu(monkeypatch):
    monkeypatch.undo()
    model, _, fast = make(5)
    with pytest.raises(ValueError, match="CUDA graphs need all inputs on one CUDA device; these are on cpu"):
        fast(sample(0), torch.tensor(900))
    fast = mc.optimize(model, fast.mask, backend="aot_eager")  # "auto"
    fast(sample(0), torch.tensor(900))
    assert not fast._arenas
    with pytest.raises(ValueError, match="cuda_graphs is True, False or 'auto'; got 'yes'"):
        mc.optimize(model, fast.mask, cuda_graphs="yes")


def run_twice(fast, model, compute):
    for run in range(2):
        assert_follows(fast, truth(model, compute), range(5), seed=10 * run)


def test_weights_moved_away_and_back_are_elsewhere(recordings):
    model, compute, fast = make(5)
    run_twice(fast, model, compute)
    arena = fast._arenas[-1]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # as .to("cpu").to("cuda") does
    run_twice(fast, model, compute)
    assert arena not in fast._arenas


def test_an_arena_made_in_inference_mode_serves_outside():
    model, compute, fast = make(5)
    with torch.inference_mode():
        run_twice(fast, model, compute)
    run_twice(fast, model, compute)
    with torch.inference_mode():
        run_twice(fast, model, compute)


def test_reset_while_another_thread_replays():
    """The run that comes next waits until the arena's step is done."""
    model, compute, fast = make(5)
    for _ in range(2):
        run_twice(fast, model, compute)
    expected = [truth(copy.deepcopy(model), compute).step(0, sample(seed), torch.tensor(900)) for seed in (1, 2)]
    (arena,) = fast._arenas
    bound, recorded = arena.ready[0]
    entered, go_on = threading.Event(), threading.Event()

    def slowly():
        entered.set()
        go_on.wait(30)
        recorded.replay()

    arena.ready[0] = bound, replay.Recorded(slowly, recorded.results)
    results = {}

    def call(number, seed):
        with torch.no_grad():
            results[number] = fast(sample(seed), torch.tensor(900))

    first = threading.Thread(target=call, args=(0, 1))
    first.start()
    assert entered.wait(30)
    arena.ready[0] = bound, recorded
    fast.reset()
    second = threading.Thread(target=call, args=(1, 2))
    second.start()
    second.join(0.2)
    go_on.set()
    first.join(30)
    second.join(30)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


def test_nothing_is_recorded_that_is_not_used_again(recordings):
    """Each batch size in turn for more than there are arenas."""
    model, compute, fast = make(5)
    fast = mc.optimize(model, fast.mask, backend="eager", cuda_graphs=True, max_captures=20)
    for _ in range(2):
        for batch in range(2, 12):
            assert_follows(fast, truth(model, compute), range(5), batch=batch)
    assert recordings["recorded"] == 0
    assert len(fast._arenas) == replay.MOST_ARENAS


def test_threads_that_have_come_to_the_end_leave_their_arenas():
    model, compute, fast = make(5)
    for _ in range(3 * replay.MOST_ARENAS):
        thread = threading.Thread(target=assert_follows, args=(fast, truth(model, compute), range(5)))
        thread.start()
        thread.join()
    assert len(fast._arenas) == 1


def test_dropped_arenas_are_gone_at_once():
    model, compute, fast = make(5)
    assert_follows(fast, truth(model, compute), range(5))
    memory = weakref.ref(fast._arenas[0])
    gc.disable()
    try:
        fast.set_mask(fast.mask)
        assert memory() is None
    finally:
        gc.enable()
