"""Which call belongs to which run, and what the optimised denoiser looks like from outside."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import maskcompile as mc
from tests.denoisers import denoiser, tensors_of
from tests.executor import Executor
from tests.toys import Chain

BLOCKS = ["a", "b", "c"]
TIMESTEPS = (900, 700, 500, 300, 100)


def make(seed: int = 0, timesteps=TIMESTEPS, density: float = 0.4):
    torch.manual_seed(seed)
    model = Chain().eval()
    compute = np.random.default_rng(seed).random((len(timesteps), 3)) < density
    fast = mc.optimize(model, mc.Mask(compute, blocks=BLOCKS, timesteps=timesteps), backend="eager")
    return model, compute, fast


def sample(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def assert_follows(fast, executor, steps, batch=2, seed=0, timesteps=TIMESTEPS):
    for step in steps:
        x, t = sample(seed + step, batch), torch.tensor(timesteps[step])
        assert torch.equal(fast(x, t), executor.step(step, x, t)), step


@pytest.mark.parametrize("seed", range(5))
def test_two_runs_in_a_row_share_nothing(seed):
    model, compute, fast = make(seed)
    for run in range(2):
        assert_follows(fast, Executor(model, BLOCKS, compute), range(5), seed=10 * run)
    assert fast.cache_bytes == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_stops_early_leaves_nothing_to_the_next(seed):
    model, compute, fast = make(seed)
    assert_follows(fast, Executor(model, BLOCKS, compute), range(3))
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5), seed=50)
    fast(sample(0), torch.tensor(900))
    fast.reset()
    assert fast.cache_bytes == 0
    assert_follows(fast, Executor(model, BLOCKS, compute), range(1, 5), seed=70)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [1, 3])
def test_a_run_that_starts_in_the_middle(seed, start):
    model, compute, fast = make(seed)
    assert_follows(fast, Executor(model, BLOCKS, compute), range(start, 5))
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5))


@pytest.mark.parametrize("seed", range(5))
def test_skipping_ahead_starts_over(seed):
    """Nobody can tell a skip from another run that starts late, so nothing is carried over."""
    model, compute, fast = make(seed)
    assert_follows(fast, Executor(model, BLOCKS, compute), range(2))
    assert_follows(fast, Executor(model, BLOCKS, compute), range(3, 5))


@pytest.mark.parametrize("seed", range(5))
def test_batch_changes_between_and_within_runs(seed):
    model, compute, fast = make(seed)
    for batch in (2, 3, 2):
        assert_follows(fast, Executor(model, BLOCKS, compute), range(5), batch=batch)
    assert_follows(fast, Executor(model, BLOCKS, compute), range(3), batch=4)
    assert_follows(fast, Executor(model, BLOCKS, compute), range(3, 5), batch=2)


@pytest.mark.parametrize("seed", range(5))
def test_separate_guidance_passes_have_caches_of_their_own(seed):
    model, compute, fast = make(seed)
    conditional, unconditional = Executor(model, BLOCKS, compute), Executor(model, BLOCKS, compute)
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
    first, second = Executor(model, BLOCKS, compute), Executor(model, BLOCKS, compute)
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
    executor = Executor(model, BLOCKS, compute)
    assert_follows(fast, executor, [start])
    executor.reset()
    assert_follows(fast, executor, range(start + 1, 5))


@pytest.mark.parametrize("seed", range(5))
def test_a_new_scheduler_tensor_is_a_new_run(seed):
    """A run is interrupted after step 1; another one, image-to-image say, starts at step 2."""
    model, compute, fast = make(seed, density=0.2)
    for first, steps in ((0, [0, 1]), (50, [2, 3, 4])):
        timesteps, executor = torch.tensor(TIMESTEPS), Executor(model, BLOCKS, compute)
        for step in steps:
            x, t = sample(first + step), timesteps[step].expand(2)
            assert torch.equal(fast(x, t), executor.step(step, x, t))


@pytest.mark.parametrize("seed", range(5))
def test_an_unknown_timestep_computes_everything_and_says_so_once(seed):
    model, compute, fast = make(seed)
    executor = Executor(model, BLOCKS, compute)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t, step in ((900, 0), (700, 1), (600, None), (500, 2), (400, None), (300, 3), (100, 4), (50, None)):
            x = sample(t)
            expected = executor.full(x, torch.tensor(t)) if step is None else executor.step(step, x, torch.tensor(t))
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
    executor = Executor(model, BLOCKS, compute)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, t in enumerate(timesteps):
            value = torch.full((2,), t).to(dtype)
            assert torch.equal(fast(sample(step), value), executor.step(step, sample(step), value))


def test_steps_that_rounding_makes_equal_follow_in_order():
    timesteps = (999, 998, 997, 996)  # 1000, 1000, 996, 996 in bfloat16
    model, compute, fast = make(2, timesteps)
    executor = Executor(model, BLOCKS, compute)
    for step, t in enumerate(timesteps):
        value = torch.tensor(t).to(torch.bfloat16)
        assert torch.equal(fast(sample(step), value), executor.step(step, sample(step), value))


def test_rising_timesteps():
    timesteps = (0.0, 0.25, 0.5, 0.75)
    model, compute, fast = make(3, timesteps)
    for run in range(2):
        assert_follows(fast, Executor(model, BLOCKS, compute), range(4), seed=run, timesteps=timesteps)


@pytest.mark.parametrize("kind", [int, float, lambda t: torch.tensor([t]), np.int64])
def test_timesteps_of_any_kind(kind):
    case = denoiser("unet2d")
    (x, _), _ = case.inputs(2, 0, 0)
    program = mc.trace(case.model, x, 901)
    fast = mc.optimize(case.model, mc.Mask.full(program.names, case.timesteps), backend="eager")
    for t in case.timesteps[:3]:
        value = kind(t) if kind is not np.int64 else int(np.int64(t))
        assert torch.equal(fast(x, value).sample, case.model(x, value).sample)
    assert len(fast.report().signatures) == 1


def test_changing_results_and_inputs_in_place_does_not_reach_the_cache():
    model, compute, fast = make(4, density=0.0)
    executor = Executor(model, BLOCKS, compute)
    for step, t in enumerate(TIMESTEPS):
        x = sample(step)
        ours, theirs = fast(x, torch.tensor(t)), executor.step(step, x.clone(), torch.tensor(t))
        assert torch.equal(ours, theirs)
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
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for r in fast._trajectories for t in r.cache.values()
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
        assert_follows(other, Executor(other.original, BLOCKS, compute), range(5))


def test_weights_changed_in_place_are_seen():
    model, compute, fast = make(6)
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5))
    fast.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5))
    assert len(fast._captures) == 1


@pytest.mark.parametrize(
    "replace",
    [
        lambda model, fast: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True),
        lambda model, fast: setattr(model, "b", Chain().eval().b),
        lambda model, fast: setattr(fast.b, "up", nn.Sequential(copy.deepcopy(model.b.up), nn.Tanh()).eval()),
        lambda model, fast: setattr(fast, "b", Chain().eval().b),
    ],
)
def test_weights_and_modules_replaced_after_capture_are_captured_again(replace):
    model, compute, fast = make(7)
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5))
    replace(model, fast)
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5))


def test_to_another_dtype_and_back():
    model, compute, fast = make(8)
    assert fast.to(torch.float64) is fast
    assert next(model.parameters()).dtype == torch.float64
    executor = Executor(model, BLOCKS, compute)
    for step, t in enumerate(TIMESTEPS):
        x = sample(step).double()
        assert torch.equal(fast(x, torch.tensor(t)), executor.step(step, x, torch.tensor(t)))
    fast.float()
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5))


def test_compiled_graphs_are_full_graphs_and_agree():
    model, compute, fast = make(9)
    fast = mc.optimize(model, fast.mask, backend="aot_eager")
    fast.warmup(sample(0), torch.tensor(900))
    compiled = len(fast.report().signatures[0].compile_seconds)
    executor = Executor(model, BLOCKS, compute)
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
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5))
    captured = next(iter(fast._captures.values()))
    with pytest.raises(mc.MaskError, match="'x'"):
        fast.set_mask(mc.Mask.full(["x"], TIMESTEPS))
    assert_follows(fast, Executor(model, BLOCKS, compute), range(5))
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
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast is active"):
        fast(sample(1, batch=7), t)
    assert torch.equal(fast(x, t), model(x, t))


def test_train_mode_is_refused():
    model, _, fast = make(12)
    with pytest.raises(ValueError, match=r"Chain is in train mode; call \.eval\(\)"):
        mc.optimize(Chain(), fast.mask)
    part = Chain().eval()
    part.b.train()
    with pytest.raises(ValueError, match=r"Chain\.b is in train mode"):
        mc.optimize(part, fast.mask)
    fast.train()
    assert model.training
    with pytest.raises(ValueError, match="train mode"):
        fast(sample(0), torch.tensor(900))
    fast.eval()
    fast(sample(0), torch.tensor(900))


def test_offload_hooks_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model, _, fast = make(13)
    accelerate.hooks.add_hook_to_module(model.b, accelerate.hooks.CpuOffload())
    with pytest.raises(ValueError, match=r"Chain\.b has an accelerate hook \(CpuOffload\)"):
        mc.optimize(model, fast.mask)
    case = denoiser("flux")
    from diffusers.hooks import apply_layerwise_casting

    casted = copy.deepcopy(case.model)
    apply_layerwise_casting(casted, torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="has a diffusers hook"):
        mc.optimize(casted, mc.Mask.full(["transformer_blocks.0"], [1.0]))


def test_calls_that_fail_leave_the_run_as_it_was():
    model, compute, fast = make(14)
    executor = Executor(model, BLOCKS, compute)
    assert_follows(fast, executor, range(2))
    with pytest.raises(RuntimeError):
        fast(torch.randn(2, 9), torch.tensor(500))
    assert_follows(fast, executor, range(2, 5))
