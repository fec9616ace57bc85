"""Masks learned through pipelines: with class guidance, text embeddings, and for a UNet."""

from __future__ import annotations

import warnings

import pytest
import torch

import maskcompile as mc
from tests.maskcompile.pipelines.test_exact import recorded
from tests.maskcompile.pipelines.tiny import TINY


@pytest.mark.parametrize("name", ["dit", "pixart_alpha", "text2img"])
def test_a_learned_mask_meets_its_budget(name):
    pipe, run = TINY[name]()
    at = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, at)
    calls = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    original, timesteps, _ = recorded(pipe, at, run)
    hook.remove()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mask = mc.learn(model, lambda seed: run(pipe, seed=seed), budget=0.6, method=mc.Search(passes=12), progress=False)
    assert mask.timesteps == tuple(timesteps)
    assert mask.provenance["share"] <= 0.61
    program = mc.trace(model, *calls[0][0], **calls[0][1])
    largest = max(block.macs for block in program.blocks) / (program.macs * mask.steps)
    assert mask.provenance["share"] >= 0.6 - max(0.01, largest)
    coarse = any("no block is small enough" in str(w.message) for w in said)
    assert coarse == (mask.provenance["share"] < 0.59)
    mc.optimize(pipe, mask, backend="eager")
    sampled = run(pipe, seed=7)
    report = getattr(pipe, at).report()
    assert report.reusing_calls > 0
    assert report.unknown_timesteps == 0
    assert [s.share for s in report.signatures] == [pytest.approx(mask.provenance["share"], abs=1e-4)]
    setattr(pipe, at, model)
    assert not torch.equal(sampled, run(pipe, seed=7))
    assert torch.equal(run(pipe), original)
