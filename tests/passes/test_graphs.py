"""Property tests of the passes on random graphs: any graph, any mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils.flop_counter import FlopCounterMode

from passes.capture import capture, composite_modules
from passes.dependencies import slot_dependencies
from passes.plan import plan_run, share_graphs
from passes.rectify import rectify
from passes.specialise import specialise
from tests.executor import Executor
from tests.toys import RandomDag

STEPS = 5
SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=range(12))
def captured(request):
    model = RandomDag(request.param).eval()
    inputs = [(torch.randn(2, 4), torch.tensor(900 - 100 * step)) for step in range(STEPS)]
    return model, capture(model, inputs[0], {}, composite_modules(model)), inputs


def masks(model):
    return arrays(np.bool_, (STEPS, len(model.names())))


def run(found, blocks, compute, inputs):
    """Execute the plans by hand: (results of every step, slots held after every step, MACs that each step really does)."""
    slots = slot_dependencies(found, blocks)
    plans = plan_run(slots, blocks, compute)
    keys = share_graphs(plans, {})
    cache, results, macs = {}, [], []
    for plan, tensors in zip(plans, inputs, strict=True):
        key = keys[plan]
        graph = specialise(found, key)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs = graph(*tensors, *(cache[slot] for slot in key.reads))
        macs.append(counter.get_total_flops() // 2)
        cache |= {slot: t for slot, t in zip(key.stores, outputs[2:], strict=True) if slot in plan.stores}
        cache = {slot: cache[slot] for slot in plan.held}
        results.append(outputs[:2])
    return plans, results, macs


def test_specialised_graphs_are_the_executor(captured):
    model, found, inputs = captured

    @SETTINGS
    @given(masks(model))
    def check(compute):
        executor = Executor(model, model.names(), compute)
        plans, results, macs = run(found, model.names(), compute, inputs)
        for step, tensors in enumerate(inputs):
            expected = executor.step(step, *tensors)
            assert torch.equal(results[step][0], expected["sample"])
            assert torch.equal(results[step][1], expected["first"])
        assert macs == [plan.macs for plan in plans]
        assert not plans[-1].held

    check()


def test_rectifying_changes_cost_and_nothing_else(captured):
    model, found, inputs = captured
    slots = slot_dependencies(found, model.names())

    @SETTINGS
    @given(masks(model))
    def check(compute):
        cheaper = rectify(slots, model.names(), compute)
        before, after = Executor(model, model.names(), compute), Executor(model, model.names(), cheaper)
        for step, tensors in enumerate(inputs):
            expected, actual = before.step(step, *tensors), after.step(step, *tensors)
            assert torch.equal(expected["sample"], actual["sample"])
            assert torch.equal(expected["first"], actual["first"])
        assert np.array_equal(rectify(slots, model.names(), cheaper), cheaper)
        spent = [sum(p.macs for p in plan_run(slots, model.names(), m)) for m in (compute, cheaper)]
        assert spent[1] <= spent[0]

    check()


def test_nothing_is_stored_that_no_later_step_reads(captured):
    model, found, _ = captured
    slots = slot_dependencies(found, model.names())

    @SETTINGS
    @given(masks(model))
    def check(compute):
        plans = plan_run(slots, model.names(), compute)
        for step, plan in enumerate(plans):
            for slot in plan.stores:
                until = next((s for s in range(step + 1, STEPS) if slot in plans[s].stores), STEPS)
                assert any(slot in plans[s].reads for s in range(step + 1, min(until + 1, STEPS)))
            for slot in plan.reads:
                assert any(slot in earlier.stores for earlier in plans[:step])
            for slot in plan.held:
                assert any(slot in later.reads for later in plans[step + 1 :])
            assert plan.held_bytes == sum(found.marks[slot].meta["val"].nbytes for slot in plan.held)

    check()


@given(st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_capture_leaves_the_model_alone(seed):
    model = RandomDag(seed, blocks=3).eval()
    tensors = (torch.randn(3, 4), torch.tensor(5))
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = model(*tensors)["sample"]
    found = capture(model, tensors, {}, composite_modules(model))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(model(*tensors)["sample"], expected)
    captured_parameters = dict(found.graph_module.named_parameters())
    assert captured_parameters
    assert all(captured_parameters[name] is p for name, p in model.named_parameters() if name in captured_parameters)
