"""Schedules made of measured changes: SmoothCache and block caching, against the package and the papers' own rules."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from SmoothCache import DiffuserCacheHelper, SmoothCacheHelper

import maskcompile as mc
from tests.denoisers import denoiser, tensors_of

DATA = Path(__file__).parents[1] / "data"


@cache
def trace(name):
    case = denoiser(name)
    args, kwargs = case.inputs(2, 901, 0)
    return mc.trace(case.model, *args, **kwargs)


def sampler(case, steps, outputs=None, names=()):
    """A run whose sample is pulled to what the denoiser predicts; ``outputs`` gets what the named modules return, by step."""

    @torch.no_grad()
    def sample(seed):
        timesteps = np.linspace(901, 101, steps).astype(int).tolist()
        (x,), kwargs = case.inputs(2, timesteps[0], seed)
        for t in timesteps:
            seen = {}
            handles = [
                case.model.get_submodule(n).register_forward_hook(
                    lambda m, a, out, n=n, seen=seen: seen.update({n: out.clone()})
                )
                for n in names
            ]
            predicted = tensors_of(case.model(x, **(kwargs | {"timestep": torch.full((2,), t)})))[0][:, : x.shape[1]]
            for handle in handles:
                handle.remove()
            if outputs is not None:
                outputs.setdefault(seed, []).append(seen)
            x = x - 0.2 * predicted
        return x

    return sample


def test_changes_are_those_of_a_plain_recording():
    case, program, outputs = denoiser("dit"), trace("dit"), {}
    sample = sampler(case, 6, outputs, program.names)
    sample(0), sample(1)
    changes = mc.schedules.measure_changes(case.model, sampler(case, 6), program, seeds=(0, 1), distance=3)
    assert changes.relative.shape == (3, 6, 4)
    assert changes.timesteps == (901, 741, 581, 421, 261, 101)
    for d in (1, 2, 3):
        for step in range(6):
            for column, name in enumerate(program.names):
                if step < d:
                    assert np.isnan(changes.relative[d - 1, step, column])
                    continue
                each = [
                    (torch.norm(run[step][name] - run[step - d][name], p=1) / torch.norm(run[step][name], p=1)).item()
                    for run in outputs.values()
                ]
                assert changes.relative[d - 1, step, column] == pytest.approx(np.mean(each), rel=1e-5)
    assert not [m for m in case.model.modules() if m._forward_hooks]
    assert "forward" not in vars(case.model)


def test_separate_guidance_calls_are_compared_each_with_its_own():
    """Two calls a step, of which one sees the same input throughout: its changes are those of the timestep alone."""
    case, program = denoiser("dit"), trace("dit")

    def calls(which):
        @torch.no_grad()
        def sample(seed):
            for i, t in enumerate((901, 501, 101)):
                for call in which:
                    args, kwargs = case.inputs(2, t, seed + 100 * call + 10 * i * call)
                    case.model(*args, **kwargs)

        return sample

    first, second, both = (
        mc.schedules.measure_changes(case.model, calls(w), program, seeds=(3,)).relative for w in ((0,), (1,), (0, 1))
    )
    np.testing.assert_allclose(both, (first + second) / 2)
    assert np.nanmax(np.abs(first - second)) > 1e-3


def test_measuring_says_what_is_wrong():
    case, program = denoiser("dit"), trace("dit")
    measure = mc.schedules.measure_changes
    with pytest.raises(ValueError, match="never called the denoiser"):
        measure(case.model, lambda seed: None, program)

    def there_and_back(seed):
        for t in (901, 501, 701):
            args, kwargs = case.inputs(1, t, 0)
            case.model(*args, **kwargs)

    with pytest.raises(ValueError, match="in one direction"):
        measure(case.model, there_and_back, program)
    with pytest.raises(ValueError, match="other timesteps"):
        measure(case.model, lambda seed: sampler(case, 3 + seed)(seed), program)
    one = measure(case.model, sampler(case, 3), program, distance=1)
    with pytest.raises(mc.MaskError, match="measure them with distance=3"):
        mc.schedules.smoothcache(program, one, 0.1)
    with pytest.raises(mc.MaskError, match=r"changes of block 'transformer_blocks\.0\.attn2' were not measured"):
        mc.schedules.block_caching(trace("pixart"), one, 0.1)
    with pytest.raises(mc.MaskError, match=r"shape \[distances, 3, 4\]"):
        mc.schedules.Changes(one.blocks, one.timesteps, one.relative[0])


def authors_schedule(rows, threshold, length):
    """The rule of SmoothCache's calibration: rows[k - 1][i] is the error of using step i for step i + k; longest first."""
    schedule, i = [None] * length, 0
    while i < length:
        schedule[i] = 1
        for k in range(len(rows), 0, -1):
            if i < len(rows[k - 1]) and rows[k - 1][i] <= threshold:
                for skipped in range(i + 1, min(i + k, length - 1) + 1):
                    schedule[skipped] = 0
                i += k
                break
        i += 1
    schedule[0] = schedule[-1] = 1
    return schedule


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 0.5, 9.0])
@pytest.mark.parametrize("longest", [1, 2, 3])
def test_smoothcache_follows_the_authors_rule(threshold, longest):
    program, steps = trace("pixart"), 20
    draw = np.random.default_rng(0)
    relative = (
        draw.random((3, steps, 6)) * np.linspace(0.6, 0.2, steps)[None, :, None] * np.array([0.6, 0.8, 1.0])[:, None, None]
    )
    changes = mc.schedules.Changes(program.names, tuple(range(steps, 0, -1)), relative)
    mask = mc.schedules.smoothcache(program, changes, threshold, longest=longest)
    for layer in ("attn1", "attn2", "ff"):
        of_layer = [i for i, name in enumerate(program.names) if name.endswith(layer)]
        rows = [relative[k - 1][k:, of_layer].mean(axis=1).tolist() for k in range(1, longest + 1)]
        for column in of_layer:
            assert mask.compute[:, column].astype(int).tolist() == authors_schedule(rows, threshold, steps)


def test_smoothcache_warms_up_and_computes_what_was_not_measured():
    program = trace("dit")
    relative = np.full((3, 8, 4), 0.125)  # just within the threshold
    relative[:, :, 1] = np.nan  # a feed-forward block
    changes = mc.schedules.Changes(program.names, tuple(range(8, 0, -1)), relative)
    mask = mc.schedules.smoothcache(program, changes, 0.125, warmup=3)
    assert mask.compute[:, 0].astype(int).tolist() == [1, 1, 1, 0, 0, 0, 1, 1]
    assert mask.compute[:, 1].all()


@pytest.mark.parametrize("schedule", [{"attn1": [1, 0, 0, 1, 0, 1]}, {"attn1-1": [1, 0, 1, 0, 0, 1], "ff": [1, 1, 0, 0, 1, 1]}])
def test_a_file_means_what_the_package_makes_of_it(schedule, capsys):
    """The package's own wrapper, run on the same model and inputs."""
    case, program = denoiser("dit"), trace("dit")
    timesteps = list(range(600, 0, -100))
    inputs = [case.inputs(2, t, i) for i, t in enumerate(timesteps)]
    helper = SmoothCacheHelper(case.model, BasicTransformerBlock, ["attn1", "ff"], schedule)
    if list(schedule) == ["attn1"]:
        helper = DiffuserCacheHelper(case.model, schedule)
    helper.enable()
    with torch.no_grad():
        theirs = [tensors_of(case.model(*args, **kwargs))[0] for args, kwargs in inputs]
    helper.disable()
    for block in case.model.transformer_blocks:  # where the helper leaves its restored forwards
        vars(block.attn1).pop("forward"), vars(block.ff).pop("forward", None)
    fast = mc.optimize(case.model, mc.schedules.smoothcache_file(program, timesteps, schedule), backend="eager")
    for (args, kwargs), expected in zip(inputs, theirs, strict=True):
        assert torch.equal(tensors_of(fast(*args, **kwargs))[0], expected)


def test_reading_smoothcache_files(tmp_path):
    program = trace("timm_dit")
    published = DATA / "smoothcache-50-N-3-threshold-0.18.json"
    mask = mc.schedules.smoothcache_file(program, range(50, 0, -1), published)
    assert [i for i, row in enumerate(mask.compute) if row.all()][:6] == [0, 4, 7, 10, 12, 14]
    assert not mask.compute[1:4].any()
    (tmp_path / "cut.json").write_text('{"attn": [1, 0')
    for message, schedule in (
        ("2 numbers, 0 or 1, one for each timestep; got 50", published),
        ("not a whole JSON file", tmp_path / "cut.json"),
        ("maps layers to lists", {}),
        ("'attn1' is no block of DiT", {"attn1": [1, 0]}),
        ("2 numbers, 0 or 1", {"attn": [1, 2]}),
    ):
        with pytest.raises(mc.MaskError, match=message):
            mc.schedules.smoothcache_file(program, [2, 1], schedule)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.6])
def test_block_caching_reuses_until_changes_add_up(threshold):
    """The paper's condition, checked for every step: the sum since the last computation is within the threshold, or it computes."""
    program = trace("dit")
    relative = np.random.default_rng(1).random((1, 15, 4)) * 0.3
    changes = mc.schedules.Changes(program.names, tuple(range(15, 0, -1)), relative)
    mask = mc.schedules.block_caching(program, changes, threshold, warmup=2)
    assert mask.compute[:2].all()
    for block in range(4):
        for step in range(2, 15):
            last = max(s for s in range(step) if mask.compute[s, block])
            assert mask.compute[step, block] == (relative[0, last + 1 : step + 1, block].sum() > threshold)
    assert mask.compute.all() == (threshold == 0)


def test_calibrated_masks_end_to_end():
    """Measured on real runs: a higher threshold computes less and strays farther."""
    case, program = denoiser("dit"), trace("dit")
    sample = sampler(case, 8)
    changes = mc.schedules.measure_changes(case.model, sample, program)
    level = float(np.nanmedian(changes.relative[0]))
    for make in (mc.schedules.smoothcache, mc.schedules.block_caching):
        masks = [make(program, changes, level * factor) for factor in (0.0, 1.0, 4.0)]
        shares = [mc.cost(program, mask).share for mask in masks]
        assert shares[0] == 1
        assert shares[0] > shares[1] > shares[2]
        assert masks[1].timesteps == changes.timesteps
        assert masks[1].block_hash == program.block_hash
