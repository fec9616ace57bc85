"""Pipelines sample with the optimised denoiser what they sample without it, and under a mask what the executor makes of it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import maskcompile as mc
from tests.maskcompile.pipelines.hooked import HookedDenoiser, Recorder
from tests.maskcompile.pipelines.tiny import TINY


def recorded(pipe, at, run):
    """(what the pipeline samples, the timesteps that the denoiser is called with, how often at each)"""
    model = getattr(pipe, at)
    recorder = Recorder(model)
    setattr(pipe, at, recorder)
    sampled = run(pipe)
    setattr(pipe, at, model)
    return sampled, recorder.timesteps, recorder.calls


def random_mask(full, seed, **described):
    compute = np.random.default_rng(seed).random(full.compute.shape) < 0.4
    return full.replace(compute, **described)


@pytest.mark.parametrize("name", TINY)
def test_pipelines_sample_what_the_executor_does(name):
    pipe, run = TINY[name]()
    at = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, at)
    original, timesteps, calls = recorded(pipe, at, run)
    full = mc.Mask.full(mc.block_names(model), timesteps)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert mc.optimize(pipe, full, backend="eager") is pipe
        fast = getattr(pipe, at)
        assert torch.equal(run(pipe), original)
        assert fast.report().reusing_calls == 0
        for mask in (random_mask(full, 1), random_mask(full, 2, reuse="linear")):
            fast.set_mask(mask)
            sampled = [run(pipe), run(pipe, seed=4)]
            setattr(pipe, at, HookedDenoiser(model, mask))
            expected = [run(pipe), run(pipe, seed=4)]
            setattr(pipe, at, fast)
            for ours, theirs in zip(sampled, expected, strict=True):
                assert torch.equal(ours, theirs)
            assert not torch.equal(sampled[0], original)
            report = fast.report()
            assert report.calls == 2 * sum(calls)
            assert 0 < report.reusing_calls < report.calls
            assert (report.unknown_timesteps, report.skips, report.recaptures, report.uncaptured) == (0, 0, 0, ())
        assert fast.cache_bytes == 0
    setattr(pipe, at, fast.original)
    assert torch.equal(run(pipe), original)


@pytest.mark.parametrize("name", ["ddim", "flux_distilled"])
def test_the_default_backend(name):
    """What a user gets who says nothing: compiled regions, of a UNet and of a transformer with joint attention."""
    pipe, run = TINY[name]()
    at = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, at)
    original, timesteps, _ = recorded(pipe, at, run)
    mask = random_mask(mc.Mask.full(mc.block_names(model), timesteps), 1, reuse="linear")
    mc.optimize(pipe, mask)
    fast = getattr(pipe, at)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        sampled = run(pipe)
    report = fast.report()
    assert report.backend == "inductor"
    assert report.signatures[0].regions
    assert report.reusing_calls > 0
    setattr(pipe, at, HookedDenoiser(model, mask))
    expected = run(pipe)
    setattr(pipe, at, model)
    apart = (sampled - expected).abs().max()
    assert apart < 1e-3 * expected.abs().max()
    assert apart < 0.1 * (sampled - original).abs().max()
