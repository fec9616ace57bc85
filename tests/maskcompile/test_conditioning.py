"""Trajectories are told apart by what they are given beside the sample, not only by the order of their calls."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import maskcompile as mc
from maskcompile import steps as executing
from tests.executor import Executor
from tests.toys import Chain

BLOCKS = ["a", "b", "c"]
TIMESTEPS = (900, 700, 500, 300, 100)
ROWS = np.array([[1, 1, 1], [1, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=bool)


class Prompted(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor, scale: Tensor | None = None) -> Tensor:
        sample = sample + self.embed(prompt)
        return super().forward(sample if scale is None else sample * scale, timestep)


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["graphs", "modules"])
def made(request):
    """(the original, what returns its executor, the optimised one)"""
    torch.manual_seed(0)
    model = Prompted().eval()
    fast = mc.optimize(model, mc.Mask(ROWS, blocks=BLOCKS, timesteps=TIMESTEPS), backend="eager")
    if request.param == "modules":
        import accelerate

        accelerate.hooks.add_hook_to_module(model.a, accelerate.hooks.ModelHook())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped module by module")
        yield model, lambda: Executor(model, BLOCKS, ROWS), fast


def goes_on(fast, executor, step, prompt, seed=0):
    x, t = noise(seed + step), torch.tensor(TIMESTEPS[step])
    assert torch.equal(fast(x, t, prompt), executor.step(step, x, t, prompt.contiguous())), step


def starts_over(fast, executor, step, prompt, seed=0):
    executor.reset()
    goes_on(fast, executor, step, prompt, seed)
    x, t = noise(seed + step), torch.tensor(TIMESTEPS[step])
    assert torch.equal(executor.step(step, x, t, prompt.contiguous()), executor.model(x, t, prompt.contiguous()))


#: How a loop hands on a prompt that it keeps: as it is, or as a view that it makes for every call.
VIEWS = {
    "itself": lambda kept: kept,
    "expanded": lambda kept: kept[:1].expand(2, -1),
    "transposed": lambda kept: kept.view(4, 2).t(),
    "a part": lambda kept: kept[:, :],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_guidance_that_begins_in_the_middle_unconditional_calls_first(made, view):
    _, truth, fast = made
    conditional, unconditional, prompt, empty = truth(), truth(), noise(50), noise(51)
    for step in range(2):
        goes_on(fast, conditional, step, view(prompt))
    starts_over(fast, unconditional, 2, view(empty), seed=10)
    starts_over(fast, conditional, 2, view(prompt))  # at a number of calls that the step before had not


@pytest.mark.parametrize("end", [2, 3])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_guidance_that_ends_in_the_middle_unconditional_calls_first(made, view, end):
    """Also at the step after one at which all started over: all of their calls but one have been seen."""
    _, truth, fast = made
    conditional, unconditional, prompt, empty = truth(), truth(), noise(50), noise(51)
    for step in range(end):
        if step == 1:
            conditional.reset(), unconditional.reset()
        goes_on(fast, unconditional, step, view(empty), seed=10)
        goes_on(fast, conditional, step, view(prompt))
    for step in range(end, 5):  # the step after goes by a number of calls that the step before had not
        (starts_over if step < end + 2 else goes_on)(fast, conditional, step, view(prompt))


def test_another_prompt_is_not_where_one_was_that_is_gone(made):
    """In the same memory: what a trajectory was given is known by weak references, and its place is not taken."""
    _, truth, fast = made
    prompt = noise(50)
    where = prompt.untyped_storage()._cdata
    for step in range(2):
        fast(noise(step), torch.tensor(TIMESTEPS[step]), prompt)
    del prompt
    others = [noise(50 + i) for i in range(500)]
    assert all(other.untyped_storage()._cdata != where for other in others)
    starts_over(fast, truth(), 2, others[0])


def test_halves_of_one_tensor_are_two_prompts(made):
    _, truth, fast = made
    conditional, unconditional = truth(), truth()
    empty, prompt = torch.cat([noise(50), noise(51)]).chunk(2)
    for step in range(2):
        goes_on(fast, conditional, step, prompt)
    starts_over(fast, unconditional, 2, empty, seed=10)


def test_another_picture_after_one_that_was_interrupted(made):
    """With timesteps that are no elements of the scheduler's tensor, as Flux passes them."""
    _, truth, fast = made
    first, second, prompt = truth(), truth(), noise(50)
    for step in range(2):
        goes_on(fast, first, step, prompt)
    del prompt
    other = noise(52)
    starts_over(fast, second, 2, other)
    goes_on(fast, second, 3, other)


@pytest.mark.parametrize("kept", [True, False])
def test_prompts_that_are_others_at_every_call_say_nothing(made, kept):
    """Scheduled prompts, or what a loop makes anew for every call."""
    _, truth, fast = made
    prompts = [noise(50 + step) for step in range(5)]
    for _ in range(2):
        executor = truth()
        for step in range(5):
            goes_on(fast, executor, step, prompts[step] if kept else noise(50))


def test_a_prompt_that_changes_once_costs_one_step(made):
    _, truth, fast = made
    first, second, executor = noise(50), noise(51), truth()
    for step in range(2):
        goes_on(fast, executor, step, first)
    starts_over(fast, executor, 2, second)
    for step in range(3, 5):
        goes_on(fast, executor, step, second)


@pytest.mark.parametrize("again", ["the step", "the call"])
def test_a_step_that_failed_in_its_second_call(made, monkeypatch, again):
    model, truth, fast = made
    if hasattr(model.a, "_hf_hook"):
        pytest.skip("what fails is a graph")
    conditional, unconditional, prompt, empty = truth(), truth(), noise(50), noise(50).clone()
    for step in range(3):
        if step == 1:
            conditional.reset(), unconditional.reset()
        goes_on(fast, conditional, step, prompt)
        goes_on(fast, unconditional, step, empty, seed=10)
    goes_on(fast, conditional, 3, prompt)
    with monkeypatch.context() as patch:
        patch.setattr(executing.Graph, "__call__", lambda self, *tensors: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            fast(noise(13), torch.tensor(TIMESTEPS[3]), empty)
    if again == "the step":
        starts_over(fast, conditional, 3, prompt)
    starts_over(fast, unconditional, 3, empty, seed=10)
    starts_over(fast, conditional, 4, prompt)
    starts_over(fast, unconditional, 4, empty, seed=10)


@pytest.mark.parametrize("loop", ["cast for every step", "nine tiles", "eight tiles", "elements", "pictures of one step"])
def test_a_loop_that_never_looks_like_one_run_is_told_so_once(loop):
    fast = mc.optimize(Chain().eval(), mc.Mask(ROWS, blocks=BLOCKS, timesteps=TIMESTEPS), backend="eager")
    tiles = {"nine tiles": 9, "eight tiles": 8}.get(loop, 1)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8 if loop.startswith("pictures") else 4):
            timesteps = torch.tensor(TIMESTEPS)
            for step, timestep in enumerate(timesteps):
                if loop.startswith("pictures") and step < 4:
                    continue
                for tile in range(tiles):
                    fast(noise(tile), timesteps.float()[step] if loop.startswith("cast") else timestep)
    found = [warning for warning in caught if "looked like another run" in str(warning.message)]
    assert len(found) == (loop in ("cast for every step", "nine tiles"))
    assert all(warning.filename == __file__ for warning in found)
    assert bool(found) == (fast.report().reusing_calls == 0 and not loop.startswith("pictures"))
