"""Regions: what every specialised graph is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from passes.blocks import default_blocks
from passes.capture import capture, composite_modules
from passes.dependencies import result_nodes, slot_dependencies
from passes.plan import plan_run
from passes.regions import partition, select_regions, structure
from passes.reuse import Rules
from tests.denoisers import TINY, denoiser
from tests.toys import Chain, RandomDag

STEPS = 4


@pytest.fixture(scope="module", params=[*range(6), *TINY])
def parts(request):
    if isinstance(request.param, int):
        model, args, kwargs = RandomDag(request.param).eval(), (torch.randn(2, 4), torch.tensor(900)), {}
        found = capture(model, args, kwargs, composite_modules(model))
        blocks = model.names()
    else:
        case = denoiser(request.param)
        args, kwargs = case.inputs(case.batch, case.timesteps[0], 0)
        found = capture(case.model, args, kwargs, composite_modules(case.model))
        blocks = default_blocks(found, case.model)
    return found, blocks, partition(found, blocks)


def test_regions_are_executed_as_a_whole_or_not_at_all(parts):
    """Every operation with MACs is in one region, and a plan's regions hold those that its step needs and no other."""
    found, blocks, whole = parts
    slots = slot_dependencies(found, blocks)
    held = [node for region in whole.regions for node in region.nodes if node in found.macs]
    assert len(held) == len(set(held))

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(arrays(np.bool_, (STEPS, len(blocks))), st.sampled_from(["hold", "linear"]))
    def check(compute, rule):
        for plan in plan_run(slots, blocks, compute, Rules([rule] * len(blocks))):
            selected = select_regions(found, whole, plan.key)
            nodes = [node for region in selected for node in region.nodes if node in found.macs]
            assert len(nodes) == len(set(nodes))
            assert sum(found.macs[node] for node in nodes) == plan.macs
            # In order, and all that is read is there: given, cached, or made before.
            cached = {found.marks[slot]: versions for slot, versions in plan.key.reads}
            there = {*found.inputs, *(mark for mark, versions in cached.items() if versions == 1)}
            for region in selected:
                assert all(cached[node] == 2 if node in region.extrapolated else node in there for node in region.inputs)
                there.update(region.outputs)
            assert there.issuperset([*result_nodes(found), *(found.marks[slot] for slot in plan.key.stores)])

    check()


def test_layers_share_their_structure():
    """Three equal blocks, one after another: whatever tells them apart are their weights."""
    model = Chain().eval()
    found = capture(model, (torch.randn(2, 4), torch.tensor(900)), {}, composite_modules(model))
    structures = [structure(region, found) for region in partition(found, ["a", "b"]).regions]
    assert len(structures) == 4  # the time embedding, a, b, and c with the skip around b
    assert structures[1] == structures[2]
