"""A masked run gives what the executor gives, bit for bit on CPU in float32: with graphs as a whole, and region by region."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import maskcompile as mc
from tests.denoisers import REFERENCE, TINY, denoiser, tensors_of
from tests.executor import Executor

STEPS = 5


@pytest.fixture(scope="module", params=[*TINY, *REFERENCE])
def traced(request):
    case = denoiser(request.param)
    args, kwargs = case.inputs(case.batch, case.timesteps[0], 0)
    program = mc.trace(case.model, *args, **kwargs)
    full = mc.Mask.full(program.names, case.timesteps)
    both = [mc.optimize(case.model, full, backend="eager", regions=regions) for regions in (False, True)]
    return case, program, both


RULES = ("hold", "linear")
LOG_SNR = (-9.0, -3.0, -2.0, 1.0, 5.0)
REACH = (1.0, 1.0, 0.5, 4.0, 0.0)


def rows(width: int):
    """Masks of every density, with rows that skip or compute everything among them."""
    whole = st.sampled_from([None, None, True, False])
    return st.tuples(arrays(np.bool_, (STEPS, width)), st.lists(whole, min_size=STEPS, max_size=STEPS)).map(
        lambda drawn: np.array([row if w is None else np.full(width, w) for row, w in zip(*drawn, strict=True)])
    )


def rules(width: int):
    """One rule for all blocks, or any for each."""
    one = st.sampled_from(RULES)
    return one.map(lambda rule: [rule] * width) | st.lists(one, min_size=width, max_size=width)


def test_a_full_mask_is_eager(traced):
    case, program, both = traced
    for fast in both:
        fast.set_mask(mc.Mask.full(program.names, case.timesteps))
    for step, timestep in enumerate(case.timesteps):
        args, kwargs = case.inputs(case.batch, timestep, step)
        with torch.no_grad():
            theirs = case.model(*args, **kwargs)
        for fast in both:
            ours = fast(*args, **kwargs)
            assert type(ours) is type(theirs)
            for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
                assert torch.equal(a, b)
    assert all(fast.report().reusing_calls == 0 for fast in both)


def test_any_mask_is_the_executor(traced):
    case, program, both = traced
    calls = [case.inputs(case.batch, timestep, step) for step, timestep in enumerate(case.timesteps)]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        rows(len(program.names)), rules(len(program.names)), st.sampled_from([None, LOG_SNR]), st.sampled_from([None, REACH])
    )
    def check(compute, reuse, log_snr, reach):
        for fast in both:
            described = {"reuse": reuse, "log_snr": log_snr, "reach": reach}
            fast.set_mask(mc.Mask(compute, blocks=program.names, timesteps=case.timesteps, **described))
        executor = Executor(case.model, program.names, compute, [RULES.index(rule) for rule in reuse], log_snr, reach)
        for step, (args, kwargs) in enumerate(calls):
            expected = executor.step(step, *args, **kwargs)
            for fast in both:
                for ours, theirs in zip(tensors_of(fast(*args, **kwargs)), tensors_of(expected), strict=True):
                    assert torch.equal(ours, theirs), f"step {step}"
        assert all(fast.cache_bytes == 0 for fast in both)

    check()
    # The blocks must matter, or the comparison above would pass whatever a mask does.
    reuse = Executor(case.model, program.names, [[True] * len(program.names), [False] * len(program.names)])
    reuse.step(0, *calls[0][0], **calls[0][1])
    reused = tensors_of(reuse.step(1, *calls[1][0], **calls[1][1]))
    with torch.no_grad():
        assert not torch.equal(reused[0], tensors_of(case.model(*calls[1][0], **calls[1][1]))[0])
