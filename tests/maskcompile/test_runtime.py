"""Which call belongs to which run, and what the optimised denoiser looks like from outside."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import maskcompile as mc
from maskcompile import runtime
from maskcompile import steps as executing
from passes.dependencies import slot_dependencies
from passes.merge import merge_rows
from passes.rectify import rectify
from passes.reuse import Rules
from tests.denoisers import denoiser, tensors_of
from tests.executor import Executor
from tests.toys import Chain

BLOCKS = ["a", "b", "c"]
TIMESTEPS = (900, 700, 500, 300, 100)
REUSE = ("hold", "linear", "linear")


def make(seed: int = 0, timesteps=TIMESTEPS, density: float = 0.4):
    torch.manual_seed(seed)
    model = Chain().eval()
    compute = np.random.default_rng(seed).random((len(timesteps), 3)) < density
    mask = mc.Mask(compute, blocks=BLOCKS, timesteps=timesteps, reuse=REUSE, log_snr=log_snr(len(timesteps)))
    return model, compute, mc.optimize(model, mask, backend="eager")


def log_snr(steps):
    """Slow at first and fast at the end, so that either clock may be the nearer one."""
    return tuple(20 * (step / steps) ** 2 - 8 for step in range(steps))


def truth(model, compute):
    return Executor(model, BLOCKS, compute, order=(0, 1, 1), log_snr=log_snr(len(compute)))


def sample(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def assert_follows(fast, executor, steps, batch=2, seed=0, timesteps=TIMESTEPS, scheduler=None):
    for step in steps:
        x, t = sample(seed + step, batch), torch.tensor(timesteps[step]) if scheduler is None else scheduler[step]
        assert torch.equal(fast(x, t), executor.step(step, x, t)), step


@pytest.mark.parametrize("seed", range(5))
def test_two_runs_in_a_row_share_nothing(seed):
    model, compute, fast = make(seed)
    for run in range(2):
        assert_follows(fast, truth(model, compute), range(5), seed=10 * run)
    assert fast.cache_bytes == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_stops_early_leaves_nothing_to_the_next(seed):
    model, compute, fast = make(seed)
    assert_follows(fast, truth(model, compute), range(3))
    assert_follows(fast, truth(model, compute), range(5), seed=50)
    fast(sample(0), torch.tensor(900))
    fast.reset()
    assert fast.cache_bytes == 0
    assert_follows(fast, truth(model, compute), range(1, 5), seed=70)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [1, 3])
def test_a_run_that_starts_in_the_middle(seed, start):
    model, compute, fast = make(seed)
    assert_follows(fast, truth(model, compute), range(start, 5))
    assert_follows(fast, truth(model, compute), range(5))


@pytest.mark.parametrize("seed", range(5))
def test_skipping_ahead_starts_over_and_says_so(seed):
    """Nobody can tell a skip from another run that starts late, so nothing is carried over."""
    model, compute, fast = make(seed)
    assert_follows(fast, truth(model, compute), range(2))
    with pytest.warns(UserWarning, match="skips from step 1 of the mask to step 3"):
        assert_follows(fast, truth(model, compute), range(3, 5))
    assert fast.report().skips == 1


@functools.cache
def optimised(max_graphs):
    """One capture for many masks."""
    torch.manual_seed(0)
    return mc.optimize(Chain().eval(), mc.Mask.full(BLOCKS, [0.0]), backend="eager", max_graphs=max_graphs)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    taken=st.sets(st.integers(0, 11), min_size=2),
    dtype=st.sampled_from([torch.int64, torch.float32]),
    rising=st.booleans(),
    twice=st.booleans(),
)
def test_a_scheduler_that_takes_some_of_the_masks_steps(seed, taken, dtype, rising, twice):
    """A step computes also what the mask computes at the steps left out before it, and reaches as if nothing were fitted.

    twice: a tensor that names all but its first timestep twice, as for Heun, whose second calls this sampler leaves out.
    """
    steps, fast = sorted(taken), optimised(None)
    compute = np.random.default_rng(seed).random((12, 3)) < 0.3
    timesteps = range(100, 1300, 100) if rising else range(1200, 0, -100)
    described = {"reuse": REUSE, "log_snr": log_snr(12), "reach": [0.5] * 12}
    mask = mc.Mask(compute, blocks=BLOCKS, timesteps=timesteps, **described)
    fast.set_mask(mask)
    skips = sum(after > before + 1 for before, after in pairwise(steps))
    own = [log_snr(12)[step] for step in steps]
    # Where nothing is left out and the run begins with the mask, it is one of the mask's own.
    reach = [0.5] * len(steps) if not skips and not steps[0] else None
    expected = Executor(fast.original, BLOCKS, united(compute, steps), (0, 1, 1), own, reach)
    named = [at for at, step in enumerate(steps) for _ in range(2 if twice and at else 1)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        for run in range(2):
            scheduler = torch.tensor([mask.timesteps[steps[at]] for at in named], dtype=dtype)
            expected.reset()
            for position in range(len(steps)):
                x, t = sample(100 * run + position), scheduler[named.index(position)]
                assert torch.equal(fast(x, t), expected.step(position, x, t))
    report = fast.report()
    assert (report.skips, len(said)) == (2 * skips, bool(skips))
    if skips:
        wanted = r"skips from step \d+ of the mask to step \d+; .* computes all that the mask computes between"
        assert re.search(wanted, str(said[0].message))
    assert report.reusing_calls == 2 * sum(not all(row) for row in united(compute, steps)[1:])


def united(compute, steps):
    """The rows of a run of these steps, by hand."""
    return [
        [any(compute[at, block] for at in range(before + 1, step + 1)) for block in range(compute.shape[1])]
        for before, step in zip([steps[0] - 1, *steps], steps, strict=False)
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [1, 2, 12])
def test_some_of_the_steps_with_few_graphs(seed, most):
    """Nothing is older than without merging, and no more graphs are made than may be."""
    torch.manual_seed(0)
    model, steps = Chain().eval(), [0, 2, 3, 7, 8, 10]
    compute = np.random.default_rng(seed).random((12, 3)) < 0.3
    described = {"reuse": REUSE, "log_snr": log_snr(12)}
    mask = mc.Mask(compute, blocks=BLOCKS, timesteps=range(1200, 0, -100), **described)
    fast = mc.optimize(model, mask, backend="eager", max_graphs=most)
    rows, own = np.array(united(compute, steps)), [log_snr(12)[step] for step in steps]
    slots = slot_dependencies(captured_chain(model), BLOCKS)
    merged = merge_rows(slots, BLOCKS, rows, Rules(REUSE, own), most)
    assert (merged >= rectify(slots, BLOCKS, rows, Rules(REUSE, own))).all()
    executor, scheduler = (
        Executor(model, BLOCKS, merged, (0, 1, 1), own),
        torch.tensor([mask.timesteps[step] for step in steps]),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this run skips from step 0 of the mask to step 2")
        for position, t in enumerate(scheduler):
            assert torch.equal(fast(sample(position), t), executor.step(position, sample(position), t))
    (captured,) = fast._captures.values()
    assert len(captured.graphs) <= most


def captured_chain(model):
    return mc.trace(model, sample(0), torch.tensor(900), blocks=BLOCKS).capture


def test_some_of_the_steps_without_a_graph():
    class Branching(Chain):
        def forward(self, x, timestep):
            return super().forward(x, timestep) if x.sum() > -1e9 else x

    torch.manual_seed(0)
    model, steps = Branching().eval(), [0, 2, 3, 4]
    compute = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]], dtype=bool)
    fast = mc.optimize(model, mc.Mask(compute, blocks=BLOCKS, timesteps=TIMESTEPS, reuse="linear"), backend="eager")
    executor = Executor(model, BLOCKS, united(compute, steps), order=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for position, t in enumerate(torch.tensor([TIMESTEPS[step] for step in steps])):
            assert torch.equal(fast(sample(position), t), executor.step(position, sample(position), t))
    for what in ("skipped module by module", "skips from step 0 of the mask to step 2"):
        assert sum(what in str(w.message) for w in said) == 1
    assert fast.report().uncaptured


def test_a_planned_run_goes_on_with_its_own_scheduler_alone():
    """A tensor of timesteps names steps 0, 2 and 4; a call with a fresh tensor for step 2 is another run."""
    model, compute, fast = make(0)
    scheduler = torch.tensor(TIMESTEPS[::2])
    fast(sample(0), scheduler[0])
    with pytest.warns(
        UserWarning, match="skips from step 0 of the mask to step 2; a step after a skip computes all that it needs"
    ):
        assert_follows(fast, truth(model, compute), range(2, 5))


def test_a_scheduler_that_ends_early_takes_the_graphs_of_the_whole_run():
    model, compute, fast = make(0)
    fast.warmup(sample(0), torch.tensor(900))
    (captured,) = fast._captures.values()
    before = set(captured.graphs)
    assert_follows(fast, truth(model, compute), range(3), scheduler=torch.tensor(TIMESTEPS[:3]))
    assert set(captured.graphs) == before


def test_plans_of_runs_long_past_are_let_go(monkeypatch):
    """Runs that start anywhere, as in pictures from pictures at any strength."""
    monkeypatch.setattr(runtime, "MOST_SCHEDULES", 3)
    model, compute, fast = make(0)
    for _ in range(2):
        for start in range(5):
            assert_follows(fast, truth(model, compute), range(start, 5))
            assert len(fast._schedules) <= 3


def test_tensors_that_are_no_schedulers_say_nothing_of_the_steps_to_come():
    """Timesteps taken from a longer tensor, from one the other way round, and not all of those of a scheduler."""
    model, compute, fast = make(0)
    every = torch.arange(1000)
    backwards = torch.tensor(TIMESTEPS[::-1])
    for timesteps in ([every[t] for t in TIMESTEPS], [backwards[4 - i] for i in range(5)]):
        executor = truth(model, compute)
        for step, t in enumerate(timesteps):
            assert torch.equal(fast(sample(step), t), executor.step(step, sample(step), t))
    assert fast.report().skips == 0
    scheduler = torch.tensor(TIMESTEPS)
    assert_follows(fast, truth(model, compute), [0], scheduler=scheduler)
    with pytest.warns(
        UserWarning, match="skips from step 0 of the mask to step 2; a step after a skip computes all that it needs"
    ):
        assert_follows(fast, truth(model, compute), range(2, 5), scheduler=scheduler)


@pytest.mark.parametrize("calls", [7, 8, 9, 10, 17])
def test_many_calls_at_a_timestep_never_leak(calls):
    model, _, fast = make(0, density=0.0)
    for step, t in enumerate(TIMESTEPS[:2]):
        for call in range(calls):
            x, value = sample(100 * step + call), torch.tensor(t)
            assert torch.equal(fast(x, value), model(x, value))


@pytest.mark.parametrize("seed", range(5))
def test_batch_changes_between_and_within_runs(seed):
    model, compute, fast = make(seed)
    for batch in (2, 3, 2):
        assert_follows(fast, truth(model, compute), range(5), batch=batch)
    assert_follows(fast, truth(model, compute), range(3), batch=4)
    assert_follows(fast, truth(model, compute), range(3, 5), batch=2)


@pytest.mark.parametrize("seed", range(5))
def test_separate_guidance_passes_have_caches_of_their_own(seed):
    model, compute, fast = make(seed)
    conditional, unconditional = truth(model, compute), truth(model, compute)
    for step in range(5):
        if step == 1:  # two calls at the first step might also be two runs, so both start over once
            conditional.reset(), unconditional.reset()
        if step < 4:  # guidance is off at the last step
            assert_follows(fast, conditional, [step], seed=0)
        assert_follows(fast, unconditional if step < 4 else conditional, [step], seed=20)


@pytest.mark.parametrize("seed", range(5))
def test_second_order_solvers_call_twice_at_one_timestep(seed):
    """Heun: t0, t1, t1, t2, t2, ... The second calls are a trajectory that starts at t1."""
    model, compute, fast = make(seed)
    first, second = truth(model, compute), truth(model, compute)
    assert_follows(fast, first, [0])
    for step in range(1, 5):
        if step == 2:  # one call at t0, two at t1: the second might be another run
            first.reset(), second.reset()
        assert_follows(fast, first, [step], seed=0)
        assert_follows(fast, second, [step], seed=30)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_calls_at_the_first_timestep_before_a_run_are_no_part_of_it(seed, calls, start):
    """Somebody warms up, or a run stops after its first step; then a run begins at that same timestep."""
    model, compute, fast = make(seed, density=0.2)
    for call in range(calls):
        fast(sample(100 + call), torch.tensor(TIMESTEPS[start]))
    executor = truth(model, compute)
    assert_follows(fast, executor, [start])
    executor.reset()
    assert_follows(fast, executor, range(start + 1, 5))


@pytest.mark.parametrize("seed", range(5))
def test_a_new_scheduler_tensor_is_a_new_run(seed):
    """A run is interrupted after step 1; another one, image-to-image say, starts at step 2."""
    model, compute, fast = make(seed, density=0.2)
    for first, steps in ((0, [0, 1]), (50, [2, 3, 4])):
        timesteps, executor = torch.tensor(TIMESTEPS), truth(model, compute)
        for step in steps:
            x, t = sample(first + step), timesteps[step].expand(2)
            assert torch.equal(fast(x, t), executor.step(step, x, t))


@pytest.mark.parametrize("seed", range(5))
def test_an_unknown_timestep_computes_everything_and_says_so_once(seed):
    model, compute, fast = make(seed)
    executor = truth(model, compute)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t, step in ((900, 0), (700, 1), (600, None), (500, 2), (400, None), (300, 3), (100, 4), (50, None)):
            x = sample(t)
            value = torch.tensor(t)
            following = sum(known > t for known in TIMESTEPS)
            expected = executor.full(following, x, value) if step is None else executor.step(step, x, value)
            assert torch.equal(fast(x, torch.tensor(t)), expected)
    (said,) = (w for w in caught if "the mask" in str(w.message))
    assert "does not know timestep 600" in str(said.message)
    assert said.filename == __file__
    assert fast.report().unknown_timesteps == 3
    assert "NOT IN THE MASK" in str(fast.report())


def test_mixed_timesteps_in_a_batch_compute_everything():
    model, _, fast = make()
    x, t = sample(0), torch.tensor([900, 100])
    with pytest.warns(UserWarning, match="a batch with different timesteps"):
        assert torch.equal(fast(x, t), model(x, t))


def test_timing_one_step_in_a_loop_does_not_pile_up_caches():
    _, _, fast = make()
    held = []
    for _ in range(40):
        fast(sample(0), torch.tensor(900))
        held.append(fast.cache_bytes)
    assert max(held) <= 8 * held[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_timesteps_match_in_the_dtype_of_the_call(dtype):
    timesteps = (999, 873, 501, 250, 3)
    model, compute, fast = make(1, timesteps)
    executor = truth(model, compute)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the mask|this run")
        for step, t in enumerate(timesteps):
            value = torch.full((2,), t).to(dtype)
            assert torch.equal(fast(sample(step), value), executor.step(step, sample(step), value))


@pytest.mark.parametrize("passes", [1, 2])
def test_steps_that_rounding_makes_equal_are_computed(passes):
    """999 and 998 are 1000 in bfloat16, so a second call there may be the next step or another trajectory: nothing is reused."""
    timesteps = (999, 998, 997, 996)
    model, _, fast = make(2, timesteps, density=0.0)
    for t in timesteps:
        for guidance in range(passes):
            x, value = sample(t + 1000 * guidance), torch.tensor(t).to(torch.bfloat16)
            assert torch.equal(fast(x, value), model(x, value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_that_pipelines_scale_and_cast(dtype):
    """Flux and its kin: the scheduler's timestep is cast first and divided by 1000 then."""
    timesteps = tuple(t / 1000 for t in range(1000, 0, -20))
    model, compute, fast = make(1, timesteps)
    executor = truth(model, compute)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the mask|this run")
        for step, t in enumerate(timesteps):
            value = torch.tensor(1000 * t).to(dtype).expand(2) / 1000
            assert torch.equal(fast(sample(step), value), executor.step(step, sample(step), value))


def test_rising_timesteps():
    timesteps = (0.0, 0.25, 0.5, 0.75)
    model, compute, fast = make(3, timesteps)
    for run in range(2):
        assert_follows(fast, truth(model, compute), range(4), seed=run, timesteps=timesteps)


@pytest.mark.parametrize("kind", [int, float, lambda t: torch.tensor([t]), lambda t: torch.tensor(float(t))])
def test_timesteps_of_any_kind(kind):
    case = denoiser("unet2d")
    (x, _), _ = case.inputs(2, 0, 0)
    program = mc.trace(case.model, x, 901)
    fast = mc.optimize(case.model, mc.Mask.full(program.names, case.timesteps), backend="eager")
    for t in case.timesteps[:3]:
        assert torch.equal(fast(x, kind(t)).sample, case.model(x, kind(t)).sample)
    assert len(fast.report().signatures) == 1
    assert torch.equal(fast(x, np.int64(901)).sample, case.model(x, 901).sample)


def test_a_fractional_timestep_is_what_the_model_makes_of_it():
    """UNet2DModel truncates a Python float."""
    case = denoiser("unet2d")
    (x, _), _ = case.inputs(2, 0, 0)
    fast = mc.optimize(case.model, mc.Mask.full(["mid_block.resnets.0"], [901.5, 1.5]), backend="eager")
    for t in (901.5, 1.5):
        assert torch.equal(fast(x, t).sample, case.model(x, t).sample)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_changing_results_and_inputs_in_place_does_not_reach_the_cache(backend):
    model, compute, fast = make(4, density=0.0)
    fast = mc.optimize(model, fast.mask, backend=backend)
    executor = truth(model, compute)
    for step, t in enumerate(TIMESTEPS):
        x = sample(step)
        ours, theirs = fast(x, torch.tensor(t)), executor.step(step, x.clone(), torch.tensor(t))
        torch.testing.assert_close(ours, theirs, rtol=0 if backend == "eager" else 1e-5, atol=0 if backend == "eager" else 1e-6)
        ours.mul_(0), x.mul_(0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_cached_tensors_are_not_the_callers(backend):
    """A block that returns its input, one whose output is the result, and views: what is cached has memory of its own."""

    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrap = nn.Sequential(nn.Identity())
            self.work = nn.Sequential(nn.Linear(4, 4))

        def forward(self, sample, timestep):
            return self.work(self.wrap(sample)).view(2, 2, 2)

    model = Identity().eval()
    compute = np.array([[True, True], [True, False], [False, True], [False, False]])
    fast = mc.optimize(model, mc.Mask(compute, blocks=["wrap", "work"], timesteps=TIMESTEPS[:4]), backend=backend)
    executor = Executor(model, ["wrap", "work"], compute)
    for step, t in enumerate(TIMESTEPS[:4]):
        x = sample(step)
        ours, theirs = fast(x, torch.tensor(t)), executor.step(step, x.clone(), torch.tensor(t))
        torch.testing.assert_close(ours, theirs)
        cached = [c.untyped_storage().data_ptr() for r in fast._threads.own.runs.trajectories for c in r.cache]
        assert {x.untyped_storage().data_ptr(), ours.untyped_storage().data_ptr()}.isdisjoint(cached)
        assert len(set(cached)) == len(cached)
        ours.mul_(0), x.mul_(0)


def test_cache_bytes_are_those_reported():
    case = denoiser("unet2d")
    (x, _), _ = case.inputs(2, 0, 0)
    program = mc.trace(case.model, x, 901)
    mask = mc.Mask(
        np.random.default_rng(0).random((5, len(program.names))) < 0.5, blocks=program.names, timesteps=case.timesteps
    )
    fast = mc.optimize(case.model, mask, backend="eager")
    expected = mc.cost(program, mask)
    for step, t in enumerate(case.timesteps):
        fast(x, t)
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for r in fast._threads.own.runs.trajectories
            for t in r.cache
        }
        assert sum(storages.values()) == fast.cache_bytes == expected.cache_bytes[step]
    assert max(expected.cache_bytes) > 0
    assert fast.cache_bytes == 0
    assert fast.report().signatures[0].peak_cache_bytes == expected.peak_cache_bytes


# ---- looking like the original ------------------------------------------------------------------------------------------


def test_it_looks_like_the_original():
    case = denoiser("unet2d")
    fast = mc.optimize(case.model, mc.Mask.full(["mid_block.resnets.0"], [900, 100]), backend="eager")
    assert fast.original is case.model
    assert inspect.signature(fast.forward) == inspect.signature(case.model.forward)
    assert fast.config is case.model.config
    assert (fast.dtype, fast.device) == (case.model.dtype, case.model.device)
    assert list(fast.state_dict()) == list(case.model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), case.model.parameters(), strict=True))
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in case.model.named_modules()]
    assert fast.mid_block is case.model.mid_block
    with pytest.raises(AttributeError, match="no_such_thing"):
        fast.no_such_thing  # noqa: B018


def test_copies_and_pickles_are_whole():
    model, compute, fast = make(5)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.original is not model
        assert other.mask == fast.mask
        with torch.no_grad():
            other.original.a.up.weight.zero_()
        assert model.a.up.weight.abs().sum() > 0
        assert_follows(other, truth(other.original, compute), range(5))


def test_weights_changed_in_place_are_seen():
    model, compute, fast = make(6)
    assert_follows(fast, truth(model, compute), range(5))
    fast.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    assert_follows(fast, truth(model, compute), range(5))
    assert len(fast._captures) == 1


@pytest.mark.parametrize(
    "replace",
    [
        lambda model, fast: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True),
        lambda model, fast: setattr(model, "b", Chain().eval().b),
        lambda model, fast: setattr(fast.b, "up", nn.Sequential(copy.deepcopy(model.b.up), nn.Tanh()).eval()),
        lambda model, fast: setattr(fast, "b", Chain().eval().b),
        lambda model, fast: model.b.register_forward_hook(lambda module, args, output: 2 * output),
        lambda model, fast: setattr(model.b, "forward", lambda x, time: x + time),
        lambda model, fast: setattr(model, "gain", 3.0),
        lambda model, fast: model.settings["b"].update(scale=2.0),
    ],
)
def test_weights_and_modules_replaced_after_capture_are_captured_again(replace):
    model, compute, fast = make(7)
    assert_follows(fast, truth(model, compute), range(5))
    replace(model, fast)
    assert_follows(fast, truth(model, compute), range(5))
    assert fast.report().recaptures == 1


def test_running_and_compiling_the_original_is_no_change_of_it():
    model, compute, fast = make(7)
    assert_follows(fast, truth(model, compute), range(5))
    with torch.no_grad():
        torch.compile(model, backend="eager")(sample(0), torch.tensor(900))
    model(sample(0), torch.tensor(900))
    assert_follows(fast, truth(model, compute), range(5))
    assert fast.report().recaptures == 0


def test_to_another_dtype_and_back():
    model, compute, fast = make(8)
    assert fast.to(torch.float64) is fast
    assert next(model.parameters()).dtype == torch.float64
    executor = truth(model, compute)
    for step, t in enumerate(TIMESTEPS):
        x = sample(step).double()
        assert torch.equal(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t)))
    fast.float()
    assert_follows(fast, truth(model, compute), range(5))


def test_compiled_graphs_are_full_graphs_and_agree():
    model, compute, fast = make(9)
    fast = mc.optimize(model, fast.mask, backend="aot_eager")
    fast.warmup(sample(0), torch.tensor(900))
    compiled = len(fast.report().signatures[0].compile_seconds)
    executor = truth(model, compute)
    for step, t in enumerate(TIMESTEPS):
        x = sample(step)
        torch.testing.assert_close(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t)))
    assert len(fast.report().signatures[0].compile_seconds) == compiled == fast.report().signatures[0].graphs


def test_inductor_agrees_with_eager():
    case = denoiser("dit")
    args, kwargs = case.inputs(2, case.timesteps[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    mask = mc.schedules.uniform(program, case.timesteps, 3)
    fast, eager = mc.optimize(case.model, mask), mc.optimize(case.model, mask, backend="eager")
    for step, t in enumerate(case.timesteps):
        args, kwargs = case.inputs(2, t, step)
        for a, b in zip(tensors_of(fast(*args, **kwargs)), tensors_of(eager(*args, **kwargs)), strict=True):
            torch.testing.assert_close(a, b)


def test_a_new_mask_keeps_the_capture_and_a_wrong_one_changes_nothing():
    model, compute, fast = make(10)
    assert_follows(fast, truth(model, compute), range(5))
    captured = next(iter(fast._captures.values()))
    with pytest.raises(mc.MaskError, match="'x'"):
        fast.set_mask(mc.Mask.full(["x"], TIMESTEPS))
    assert_follows(fast, truth(model, compute), range(5))
    fast.set_mask(mc.Mask(~compute, blocks=BLOCKS, timesteps=TIMESTEPS))
    assert_follows(fast, Executor(model, BLOCKS, ~compute), range(5))
    assert next(iter(fast._captures.values())) is captured
    fast.set_mask(mc.Mask(compute[:, :1], blocks=["b.up"], timesteps=TIMESTEPS))  # a leaf, not marked so far
    assert_follows(fast, Executor(model, ["b.up"], compute[:, :1]), range(5))


# ---- bad input ------------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_clear_sentence():
    model, _, fast = make(11)
    x, t = sample(0), torch.tensor(900)
    with pytest.raises(TypeError, match=r"Chain\.forward\(sample.*unexpected keyword argument 'mask'"):
        fast(x, t, mask=None)
    with pytest.raises(TypeError, match="missing a required argument: 'timestep'"):
        fast(x)
    with pytest.raises(RuntimeError, match=r"Chain \(weights float32 on cpu\) does not run on these inputs \(float64\[2, 4\]"):
        fast(x.double(), t)
    with pytest.raises(RuntimeError, match=r"\(float32\[2, 5\] on cpu"):
        fast(torch.randn(2, 5), t)
    with pytest.raises(ValueError, match="without a tensor or number for 'timestep'"):
        fast(x, None)
    with pytest.raises(ValueError, match="no gradients"):
        fast(x.clone().requires_grad_(), t)
    with pytest.raises(ValueError, match="already optimised"):
        mc.optimize(fast, fast.mask)
    with pytest.raises(ValueError, match=r"optimize\(\.\.\., timestep='its name'\)"):
        mc.optimize(nn.Linear(4, 4).eval(), mc.Mask.full([], [1]))
    fast(x, t)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast is active"):
        fast(x, t)
    with pytest.raises(TypeError, match=r"torch\.compile has no option 'mod'"):
        mc.optimize(model, fast.mask, mod="max-autotune")
    with pytest.raises(ValueError, match="'eager' compiles nothing; leave out 'mode'"):
        mc.optimize(model, fast.mask, backend="eager", mode="max-autotune")
    assert torch.equal(fast(x, t), model(x, t))


def test_train_mode_is_refused():
    model, _, fast = make(12)
    with pytest.raises(ValueError, match=r"Chain is in train mode; call \.eval\(\)"):
        mc.optimize(Chain(), fast.mask)
    part = Chain().eval()
    part.b.down = torch.nn.Sequential(part.b.down, torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"Chain\.b\.down\.1 is in train mode"):
        mc.optimize(part, fast.mask)
    fast.train()
    assert model.training
    with pytest.raises(ValueError, match="train mode"):
        fast(sample(0), torch.tensor(900))
    fast.eval()
    fast(sample(0), torch.tensor(900))


def test_other_caches_are_refused():
    case = denoiser("flux")
    from diffusers import FirstBlockCacheConfig

    cached = copy.deepcopy(case.model)
    mask = mc.Mask.full(["transformer_blocks.0"], [1.0])
    fast = mc.optimize(cached, mask, backend="eager")
    cached.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(
        ValueError, match=r"FluxTransformer2DModel\S* has a diffusers hook .*cannot be combined with other caches"
    ):
        mc.optimize(cached, mask)
    args, kwargs = case.inputs(1, 1.0, 0)
    with pytest.raises(ValueError, match="cannot be combined with other caches"):
        fast(*args, **kwargs)


@pytest.mark.parametrize("failing", ["capture", "graph"])
def test_calls_that_fail_leave_the_run_as_it_was(failing, monkeypatch):
    model, compute, fast = make(14)
    executor = truth(model, compute)
    assert_follows(fast, executor, range(2))
    if failing == "capture":
        with pytest.raises(RuntimeError):
            fast(torch.randn(2, 9), torch.tensor(500))
    else:
        with monkeypatch.context() as patch:
            patch.setattr(executing.Graph, "__call__", lambda self, *tensors: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                fast(sample(2), torch.tensor(500))
    assert_follows(fast, executor, range(2, 5))


# ---- models that are hard to capture ----------------------------------------------------------------------------------------


def test_one_tensor_given_twice_is_two_inputs():
    class Two(Chain):
        def forward(self, sample, timestep, other):
            return super().forward(sample, timestep) - other

    model = Two().eval()
    fast = mc.optimize(model, mc.Mask.full(BLOCKS, TIMESTEPS), backend="eager")
    x, t = sample(0), torch.tensor(900)
    fast.warmup(x, t, x)
    assert torch.equal(fast(x, t, sample(1)), model(x, t, sample(1)))


def test_decorators_that_look_into_keywords_still_find_them():
    seen = []

    def remember(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            seen.append(str(kwargs.get("options")))
            return forward(self, *args, **kwargs)

        return wrapper

    class Scaled(Chain):
        @remember
        def forward(self, sample, timestep, options=None):
            return Chain.forward(self, sample, timestep)

    fast = mc.optimize(Scaled().eval(), mc.Mask.full(BLOCKS, TIMESTEPS), backend="eager")
    fast(sample(0), torch.tensor(900), options={"scale": 0.5})
    assert set(seen) == {"{'scale': 0.5}"}


def test_blocks_within_autocast_and_grad_regions():
    class Regions(Chain):
        def forward(self, sample, timestep):
            time = timestep.float().reshape(-1, 1) / 1000
            with torch.autocast("cpu", enabled=False):
                a = self.a(sample, time)
            with torch.enable_grad():
                b = self.b(a, time)
            return self.c(b + a, time)

    torch.manual_seed(0)
    model = Regions().eval()
    program = mc.trace(model, sample(0), torch.tensor(900))
    assert program.names == ("a", "b", "c")
    assert len({block.macs for block in program.blocks}) == 1
    compute = np.random.default_rng(3).random((5, 3)) < 0.4
    fast = mc.optimize(model, mc.Mask(compute, blocks=BLOCKS, timesteps=TIMESTEPS), backend="eager")
    assert_follows(fast, truth(model, compute), range(5))


def test_a_block_that_returns_no_tensor_is_refused():
    class Box:
        def __init__(self, value):
            self.value = value

    class Boxing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Chain().a

        def forward(self, x, time):
            return Box(self.inner(x, time))

    class Boxed(Chain):
        def __init__(self):
            super().__init__()
            self.b = Boxing()

        def forward(self, sample, timestep):
            time = timestep.float().reshape(-1, 1) / 1000
            return self.c(self.b(self.a(sample, time), time).value, time)

    model = Boxed().eval()
    fast = mc.optimize(model, mc.Mask.full(["b"], TIMESTEPS), backend="eager")
    with pytest.raises(mc.MaskError, match="block 'b' returns no tensor"):
        fast(sample(0), torch.tensor(900))
    compute = np.random.default_rng(0).random((5, 2)) < 0.4
    fast = mc.optimize(model, mc.Mask(compute, blocks=["a", "b.inner"], timesteps=TIMESTEPS), backend="eager")
    assert_follows(fast, Executor(model, ["a", "b.inner"], compute), range(5))


def test_names_that_are_no_identifiers():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"a-b": Chain().a, "a_b": Chain().a})

        def forward(self, sample, timestep):
            time = timestep.float().reshape(-1, 1) / 1000
            return self.parts["a-b"](self.parts["a_b"](sample, time), time) + self.parts["a_b"](sample, time)

    model, names = Named().eval(), ["parts.a-b", "parts.a_b"]
    compute = np.array([[True, True], [False, False], [True, False], [False, True], [False, False]])
    fast = mc.optimize(model, mc.Mask(compute, blocks=names, timesteps=TIMESTEPS), backend="eager")
    assert_follows(fast, Executor(model, names, compute), range(5))


def test_warmup_compiles_what_a_run_needs():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Sequential(nn.Linear(4, 8), nn.Tanh())

        def forward(self, x, time):
            return self.wide(x).chunk(2, dim=-1)[0]

    class Chunky(Chain):
        def __init__(self):
            super().__init__()
            self.b = Halves()

    model = Chunky().eval()
    compute = np.array([[True] * 3, [True, False, True], [True, False, True]])
    fast = mc.optimize(model, mc.Mask(compute, blocks=BLOCKS, timesteps=TIMESTEPS[:3]), backend="aot_eager")
    fast.warmup(sample(0), torch.tensor(900))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in TIMESTEPS[:3]:
            fast(sample(0), torch.tensor(t))
    assert len(fast.report().signatures[0].compile_seconds) == 2


def test_a_foreign_module_named_passes_is_named(tmp_path):
    (tmp_path / "passes.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import maskcompile"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "maskcompile needs its own package 'passes', but Python found" in result.stderr
    assert str(tmp_path) in result.stderr


# ---- the steady state ---------------------------------------------------------------------------------------------------


class Refusing(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses every read of a tensor's value, which on a GPU waits for all that is queued."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read")
        return func(*args, **(kwargs or {}))


def of_a_scheduler(t):
    return t, t.expand(2), t[None]


@pytest.mark.parametrize("form", range(3))
def test_timesteps_of_a_scheduler_are_read_once_a_run(form):
    """As a pipeline gives them: the elements of ``scheduler.timesteps``, one for each picture or one for all."""
    model, compute, fast = make(3)
    for run in range(2):
        executor = truth(model, compute)
        timesteps = torch.tensor(TIMESTEPS)
        for step, t in enumerate(timesteps):
            x = sample(10 * run + step)
            expected = executor.step(step, x, t)
            fast_t = of_a_scheduler(t)[form]
            if step == 0 or form == 2:  # a view of one element that does not say of what
                assert torch.equal(fast(x, fast_t), expected)
            else:
                with Refusing():
                    ours = fast(x, fast_t)
                assert torch.equal(ours, expected)
    assert fast.report().reusing_calls == 8


def test_timesteps_changed_in_place_are_read_again():
    model, compute, fast = make(3)
    executor = truth(model, compute)
    timesteps = torch.tensor([*TIMESTEPS, 0])
    for step, t in enumerate(TIMESTEPS):
        timesteps[2] = t
        x = sample(step)
        assert torch.equal(fast(x, timesteps[2]), executor.step(step, x, torch.tensor(t)))


@pytest.mark.parametrize("schedulers", [True, False])
def test_threads_never_mix_their_runs(schedulers):
    """Four threads in step with each other, each half way through a run of its own with other noise.

    With the tensor of a scheduler each goes on with its run. Without, no call tells whose it is: a thread goes on only while no
    other has called since, and else starts over, so that its results are those of its own run begun at some step.
    """
    model, compute, fast = make(5)
    together = threading.Barrier(4)
    failed = []

    def run(number: int) -> None:
        try:
            own = copy.deepcopy(model)
            for round_ in range(3):
                begun = []
                timesteps = torch.tensor(TIMESTEPS)
                for step, t in enumerate(timesteps):
                    together.wait(60)
                    x = sample(100 * number + 10 * round_ + step)
                    ours = fast(x, t if schedulers else t.clone())
                    if not step or not schedulers:
                        begun.append(truth(own, compute))
                    as_begun = [torch.equal(ours, executor.step(step, x, t)) for executor in begun]  # all must step
                    if not any(as_begun):
                        failed.append((number, round_, step))
        except BaseException as error:
            failed.append(error)
            together.abort()
            raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    with torch.no_grad():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert fast.report().calls == 4 * 3 * len(TIMESTEPS)
    alone = make(5)[2]
    assert_follows(alone, truth(model, compute), range(5))
    most = 4 * 3 * alone.report().reusing_calls
    assert fast.report().reusing_calls == most if schedulers else fast.report().reusing_calls < most
    assert len(fast._captures) == 1


def test_a_run_that_moves_between_threads_is_never_another():
    """As in a server's thread pool: run 1 leaves thread A after two steps, run 2 comes to A at the third."""
    model, compute, fast = make(5, density=0.2)
    pool = {name: ThreadPoolExecutor(1) for name in "AB"}

    def call(name: str, seed: int, step: int) -> torch.Tensor:
        return pool[name].submit(fast, sample(seed), torch.tensor(TIMESTEPS[step])).result()

    for step, name in enumerate("AABBB"):
        call(name, step, step)
    for step, name in enumerate("BBA"):
        ours = call(name, 10 + step, step)
    late = truth(model, compute)
    assert torch.equal(ours, late.step(2, sample(12), torch.tensor(TIMESTEPS[2])))  # it starts over


def test_a_mask_set_by_another_thread_meets_no_cache_of_the_last(monkeypatch):
    model, compute, fast = make(5, density=0.2)
    assert_follows(fast, truth(model, compute), range(2))
    other = fast.mask.replace(~compute)
    locate = runtime.locate

    def meanwhile(*args):
        monkeypatch.setattr(runtime, "locate", locate)
        thread = threading.Thread(target=fast.set_mask, args=(other,))
        thread.start()
        thread.join(0.5)
        return locate(*args)

    monkeypatch.setattr(runtime, "locate", meanwhile)
    executor = truth(model, compute)
    for step in range(3):
        x, t = sample(step), torch.tensor(TIMESTEPS[step])
        expected = executor.step(step, x, t)
    assert torch.equal(fast(x, t), expected)


def test_denoisers_of_several_threads_are_captured_one_after_another():
    made = [make(seed) for seed in range(4)]
    barrier = threading.Barrier(4)

    def first(model, fast):
        barrier.wait(60)
        return torch.equal(fast(sample(0), torch.tensor(900)), model(sample(0), torch.tensor(900)))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(first, *zip(*((model, fast) for model, _, fast in made), strict=True)))


def test_timesteps_in_memory_shared_with_numpy():
    """torch counts no change that numpy makes."""
    model, compute, fast = make(3)
    executor = truth(model, compute)
    memory = np.array([*TIMESTEPS, 0])
    timesteps = torch.from_numpy(memory)
    for step, t in enumerate(TIMESTEPS):
        memory[0] = t
        x = sample(step)
        assert torch.equal(fast(x, timesteps[0]), executor.step(step, x, torch.tensor(t)))


def test_a_wrong_call_is_as_wrong_the_second_time():
    _, _, fast = make(3)
    for wrong in (None, [torch.tensor(900)]):
        for _ in range(2):
            with pytest.raises(ValueError, match="without a tensor or number for 'timestep'"):
                fast(sample(0), wrong)


def test_calls_in_many_forms_are_one_another():
    """Whatever the form of a call, quick recognition of a form seen before changes nothing."""

    class Forms(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Sequential(nn.Linear(4, 4))

        def forward(self, sample, timestep, extra=None, scale=1.0, flag=True):
            out = self.b(sample) * scale + timestep / 1000
            for value in (extra or {}).values():
                out = out + value.sum()
            return (out,) if flag else {"out": out}

    model = Forms().eval()
    fast = mc.optimize(model, mc.Mask.full(["b"], TIMESTEPS), backend="eager")
    x, y = sample(0), torch.ones(3)
    wide = torch.randn(2, 8)[:, ::2]
    forms = [
        ((x, 900), {}), ((x, 900.0), {}), ((x, torch.tensor(900)), {}), ((x,), {"timestep": 900}),
        ((), {"timestep": torch.tensor(900), "sample": x}), ((), {"sample": x, "timestep": torch.tensor(900)}),
        ((x, 900, {"p": y, "q": 2 * y}), {}), ((x, 900, {"q": y, "p": 3 * y}), {}), ((x, 900), {"extra": {"q": y}}),
        ((x, 900), {"scale": 2.0}), ((x, 900), {"scale": 2}), ((x, 900), {"scale": 3.0}), ((x, 900), {"flag": False}),
        ((x, 900), {"flag": 0}), ((wide, 900), {}), ((x.double().float(), 900), {}), ((torch.randn(3, 4), 900), {}),
        ((x, torch.full((2, 1), 900)), {}), ((x, torch.tensor(900.0)), {}), ((x, torch.tensor(900).expand(2, 1)), {}),
    ]  # fmt: skip
    for _ in range(3):
        for args, kwargs in forms:
            fast.reset()
            with torch.no_grad():
                expected = model(*args, **kwargs)
            ours = fast(*args, **kwargs)
            assert type(ours) is type(expected)
            for a, b in zip(tensors_of(ours), tensors_of(expected), strict=True):
                assert torch.equal(a, b), (args, kwargs)
