"""Property tests of the passes on random graphs: any graph, any mask."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils.flop_counter import FlopCounterMode

from passes.capture import capture, composite_modules
from passes.dependencies import slot_dependencies
from passes.merge import merge_rows, plan_merged
from passes.plan import plan_run, share_graphs
from passes.rectify import Version, rectify
from passes.reuse import Rules
from passes.specialise import specialise
from tests.executor import Executor
from tests.toys import Chain, RandomDag

STEPS = 6
RULES = ("hold", "linear")
SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=range(12))
def captured(request):
    model = RandomDag(request.param).eval()
    inputs = [(torch.randn(2, 4), torch.tensor(900 - 100 * step)) for step in range(STEPS)]
    return model, capture(model, inputs[0], {}, composite_modules(model)), inputs


def masks(model):
    """(compute, rules of reuse)."""
    width = len(model.names())
    gaps, reach = (st.lists(st.floats(*ends), min_size=STEPS, max_size=STEPS) for ends in ((0.01, 8), (0, 4)))
    return st.tuples(
        arrays(np.bool_, (STEPS, width)),
        st.builds(
            Rules,
            st.lists(st.sampled_from(RULES), min_size=width, max_size=width),
            st.none() | gaps.map(lambda drawn: tuple((np.cumsum(drawn) - 12).tolist())),
            st.none() | reach,
        ),
    )


def executor_of(model, mask):
    compute, rules = mask
    order = [RULES.index(rule) for rule in rules.of_block]
    return Executor(model, model.names(), compute, order=order, log_snr=rules.log_snr, reach=rules.reach)


def run(found, blocks, mask, inputs, planned=plan_run):
    """Execute the plans by hand: (plans, results of every step, MACs that each step really does)."""
    slots = slot_dependencies(found, blocks)
    plans = planned(slots, blocks, *mask)
    keys = share_graphs(plans, {})
    cache, results, macs = {}, [], []
    for step, (plan, tensors) in enumerate(zip(plans, inputs, strict=True)):
        key = keys[plan.key]
        graph = specialise(found, key)
        coefficients = [torch.tensor(plan.coefficients)] if plan.coefficients else []
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs = graph(*tensors, *(cache[version] for version in plan.inputs), *coefficients)
        macs.append(counter.get_total_flops() // 2)
        cache |= {Version(slot, step): t for slot, t in zip(key.stores, outputs[2:], strict=True)}
        cache = {version: cache[version] for version in plan.held}
        results.append(outputs[:2])
    return plans, results, macs


def test_specialised_graphs_are_the_executor(captured):
    model, found, inputs = captured

    @SETTINGS
    @given(masks(model))
    def check(mask):
        executor = executor_of(model, mask)
        plans, results, macs = run(found, model.names(), mask, inputs)
        for step, tensors in enumerate(inputs):
            expected = executor.step(step, *tensors)
            assert torch.equal(results[step][0], expected["sample"])
            assert torch.equal(results[step][1], expected["first"])
        assert macs == [plan.macs for plan in plans]
        assert not plans[-1].held

    check()


def test_merged_rows_need_few_graphs_and_are_the_executor(captured):
    model, found, inputs = captured
    slots = slot_dependencies(found, model.names())

    @SETTINGS
    @given(masks(model), st.integers(1, 4))
    def check(mask, most):
        compute, rules = mask
        merged = merge_rows(slots, model.names(), compute, rules, most)
        needed = rectify(slots, model.names(), compute, rules)
        assert (merged >= needed).all()
        executor = executor_of(model, (merged, rules))
        plans, results, macs = run(found, model.names(), (merged, rules), inputs, partial(plan_merged, most=most))
        for step, tensors in enumerate(inputs):
            expected = executor.step(step, *tensors)
            assert torch.equal(results[step][0], expected["sample"])
            assert torch.equal(results[step][1], expected["first"])
        assert macs == [plan.macs for plan in plans]
        assert len({plan.key for plan in plans}) <= most
        if len(np.unique(needed, axis=0)) <= most:  # nothing to merge
            assert np.array_equal(merged, needed)
            unmerged = plan_run(slots, model.names(), needed, rules)
            if len({plan.key for plan in unmerged}) <= most:
                assert plans == unmerged

    check()


def test_merging_takes_the_cheapest_pair():
    """Of a chain of equal blocks: c alone joins the two steps of b and c, at the price of one b; those would take two of a."""
    model = Chain().eval()
    inputs = (torch.randn(2, 4), torch.tensor(900))
    found = capture(model, inputs, {}, composite_modules(model))
    slots = slot_dependencies(found, ["a", "b", "c"])
    compute = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1]], dtype=bool)
    rules = Rules(["hold"] * 3)
    merged = merge_rows(slots, ["a", "b", "c"], compute, rules, 2)
    assert merged.tolist() == [[True] * 3, *[[False, True, True]] * 3, [True] * 3]
    with pytest.raises(ValueError, match="at least one graph; got max_graphs=0"):
        merge_rows(slots, ["a", "b", "c"], compute, rules, 0)


def test_rectifying_changes_cost_and_nothing_else(captured):
    model, found, inputs = captured
    slots = slot_dependencies(found, model.names())

    @SETTINGS
    @given(masks(model))
    def check(mask):
        compute, rules = mask
        cheaper = rectify(slots, model.names(), compute, rules)
        before, after = executor_of(model, mask), executor_of(model, (cheaper, rules))
        for step, tensors in enumerate(inputs):
            expected, actual = before.step(step, *tensors), after.step(step, *tensors)
            assert torch.equal(expected["sample"], actual["sample"])
            assert torch.equal(expected["first"], actual["first"])
        assert np.array_equal(rectify(slots, model.names(), cheaper, rules), cheaper)
        spent = [sum(p.macs for p in plan_run(slots, model.names(), m, rules)) for m in (compute, cheaper)]
        assert spent[1] <= spent[0]

    check()


def test_nothing_is_stored_that_no_later_step_reads(captured):
    model, found, _ = captured
    slots = slot_dependencies(found, model.names())

    @SETTINGS
    @given(masks(model))
    def check(mask):
        plans = plan_run(slots, model.names(), *mask)
        for step, plan in enumerate(plans):
            for slot in plan.key.stores:
                assert any(Version(slot, step) in later.inputs for later in plans[step + 1 :])
            for version in plan.inputs:
                assert version.slot in plans[version.step].key.stores
                assert all(version in between.held for between in plans[version.step : step])
            for version in plan.held:
                assert any(version in later.inputs for later in plans[step + 1 :])
            assert len(plan.coefficients) == len(plan.inputs) - len(plan.key.reads)
            assert plan.held_bytes == sum(found.marks[version.slot].meta["val"].nbytes for version in plan.held)

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
