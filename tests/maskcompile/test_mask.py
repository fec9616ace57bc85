"""Masks and their files."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import maskcompile as mc
from maskcompile.mask import hash_blocks
from tests.toys import Chain


def example(**changes):
    arguments = {"compute": np.array([[True, True], [False, True]]), "blocks": ["a", "b"], "timesteps": [900, 100.5]}
    arguments |= changes
    return mc.Mask(arguments.pop("compute"), **arguments)


@given(
    arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=9)),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    st.booleans(),
)
def test_files_round_trip(tmp_path_factory, compute, provenance, rising):
    path = tmp_path_factory.mktemp("masks") / "mask.json"
    steps, blocks = compute.shape
    timesteps = [i * 0.1 if rising else 1000 - 7 * i for i in range(steps)]
    mask = mc.Mask(
        compute,
        blocks=[f"m.{i}" for i in range(blocks)],
        timesteps=timesteps,
        denoiser="D",
        block_hash="x",
        provenance=provenance,
    )
    mask.save(path)
    loaded = mc.Mask.load(path)
    assert loaded == mask
    assert loaded.provenance == provenance
    assert loaded.timesteps == tuple(timesteps)
    document = json.loads(path.read_text())
    assert document["compute"] == ["".join("01"[int(c)] for c in row) for row in compute]
    assert document["version"] == 1
    assert not {"reuse", "log_snr"} & set(document)


@given(st.data())
def test_files_round_trip_with_reuse_rules(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("masks") / "mask.json"
    reuse = data.draw(
        st.sampled_from(["hold", "linear"]) | st.lists(st.sampled_from(["hold", "linear"]), min_size=2, max_size=2)
    )
    log_snr = data.draw(st.sampled_from([None, [-3.25, 0.1]]))
    mask = example(reuse=reuse, log_snr=log_snr)
    mask.save(path)
    loaded = mc.Mask.load(path)
    assert loaded == mask
    assert loaded.reuse == ((reuse, reuse) if isinstance(reuse, str) else tuple(reuse))
    assert loaded.log_snr == (None if log_snr is None else (-3.25, 0.1))
    # Whoever knows version 1 alone must refuse a file whose rules it would ignore.
    plain = log_snr is None and set(mask.reuse) == {"hold"}
    assert json.loads(path.read_text())["version"] == (1 if plain else 2)


def test_files_that_say_nothing_hold(tmp_path):
    path = tmp_path / "mask.json"
    path.write_text('{"format": "maskcompile mask", "version": 1, "blocks": ["a"], "timesteps": [2, 1], "compute": ["1", "0"]}')
    assert mc.Mask.load(path).reuse == ("hold",)


def test_join_full_and_equality():
    other = example(compute=np.array([[False, True], [True, False]]))
    assert (example() | other) == mc.Mask.full(["a", "b"], [900, 100.5])
    assert example() == example(provenance={"seed": 1})
    assert example() != other
    assert len({example(), example(), other}) == 2
    for changes in ({"blocks": ["a", "c"]}, {"reuse": "linear"}, {"log_snr": [0, 1]}):
        assert example() != example(**changes)
        with pytest.raises(mc.MaskError, match="same blocks, timesteps, reuse rules, log-SNR and reach"):
            example() | example(**changes)
    linear = example().replace(reuse="linear", log_snr=[0, 1], seed=3)
    assert linear == example(reuse=["linear", "linear"], log_snr=[0, 1])
    assert linear.provenance == {"seed": 3}
    assert linear.replace(~linear.compute).reuse == ("linear", "linear")
    assert linear.replace(reuse="hold", log_snr=None) == example()
    assert linear.replace(reuse="hold").log_snr == (0, 1)
    assert example(log_snr=[1, 0]).log_snr == (1, 0)
    with pytest.raises(ValueError, match="read-only"):
        example().compute[0, 0] = False


def test_print_shows_blocks_and_steps():
    assert str(example()).splitlines() == ["Mask(2 steps x 2 blocks, 75% computed)", "a  #.", "b  ##"]
    linear = example(compute=np.array([[True, True], [False, False]]), reuse=["linear", "hold"])
    assert str(linear).splitlines() == ["Mask(2 steps x 2 blocks, 50% computed, reuse hold and linear)", "a  #-", "b  #."]


def test_scheduler_tensors_are_timesteps():
    assert example(timesteps=torch.tensor([999, 0])).timesteps == (999, 0)
    assert example(timesteps=np.linspace(1, 0, 2, dtype=np.float32)).timesteps == (1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute": np.ones((2, 2))}, "boolean.*float64"),
        ({"compute": np.ones((3, 2), bool)}, r"\[2, 2\]; got \[3, 2\]"),
        ({"compute": np.ones(2, bool)}, r"got \[2\]"),
        ({"blocks": ["a", "a"]}, "'a' is named more than once"),
        ({"timesteps": [100, 100]}, "100 followed by 100 at step 1"),
        ({"compute": np.ones((3, 2), bool), "timesteps": [900, 100, 500]}, "100 followed by 500 at step 2"),
        ({"compute": np.ones((0, 2), bool), "timesteps": []}, "at least one timestep"),
        ({"timesteps": ["a", "b"]}, "timesteps are finite numbers; got 'a'"),
        ({"timesteps": [float("nan"), 1]}, "timesteps are finite numbers; got nan"),
        ({"reuse": "cubic"}, "a reuse rule is one of 'hold', 'linear'; got 'cubic'"),
        ({"reuse": ["hold"]}, "one for each of the 2; got 1"),
        ({"reuse": None}, "reuse is a sequence; got None"),
        ({"log_snr": 5}, "log_snr is a sequence; got 5"),
        ({"log_snr": [[1], [2]]}, r"log_snr are finite numbers; got \[1\]"),
        ({"log_snr": [1, 1]}, "log_snr rises from step to step"),
        (
            {"compute": np.ones((3, 2), bool), "timesteps": [3, 2, 1], "log_snr": [0, 2, 1]},
            r"log_snr rises from step to step \(or falls, for inversion\)",
        ),
        ({"log_snr": [1]}, r"each of the 2 timesteps .* got 1 .*set_timesteps"),
        ({"reach": [1]}, "reach has one factor, 0 to 4, for each of the 2 steps"),
        ({"reach": [1, -0.1]}, "reach has one factor, 0 to 4"),
        ({"reach": [1, 4.1]}, "reach has one factor, 0 to 4"),
        ({"reach": [1, float("nan")]}, "reach are finite numbers; got nan"),
        ({"log_snr": [float("-inf"), 1]}, "log_snr are finite numbers; got -inf"),
    ],
)
def test_wrong_masks_say_what_is_wrong(changes, message):
    with pytest.raises(mc.MaskError, match=message):
        example(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "maskcompile mask", "vers', "not a whole JSON file"),
        ("[]", "no mask file"),
        ('{"scores": [[0.5]]}', "no mask file"),
        ('{"format": "maskcompile mask", "version": 9}', "version 9; this maskcompile reads versions 1, 2, 3"),
        ('{"format": "maskcompile mask", "version": 1, "blocks": ["a"], "timesteps": [1]}', "lacks the list 'compute'"),
        ('{"format": "maskcompile mask", "version": 1, "blocks": ["a"], "timesteps": [1], "compute": ["2"]}', "row 0"),
        (
            '{"format": "maskcompile mask", "version": 1, "blocks": ["a"], "timesteps": [1, 1], "compute": ["1", "0"]}',
            "followed by",
        ),
        ('{"format": "maskcompile mask", "version": 1, "blocks": [1], "timesteps": [1], "compute": ["1"]}', "must be a string"),
        (
            '{"format": "maskcompile mask", "version": 1, "blocks": ["a"], "timesteps": [1], "compute": ["1"], "reuse": "linear"}',
            "need mask format version 2; this file says 1",
        ),
        (
            '{"format": "maskcompile mask", "version": 2, "blocks": ["a"], "timesteps": [1], "compute": ["1"], "reuse": 7}',
            "'reuse' must be a rule, or a list of rules",
        ),
        (
            '{"format": "maskcompile mask", "version": 2, "blocks": ["a"], "timesteps": [1], "compute": ["1"], "log_snr": 7}',
            "log_snr",
        ),
        (
            '{"format": "maskcompile mask", "version": 2, "blocks": ["a"], "timesteps": [1], "compute": ["1"], "reach": [1]}',
            "a reach needs mask format version 3; this file says 2",
        ),
        (
            '{"format": "maskcompile mask", "version": 3, "blocks": ["a"], "timesteps": [1], "compute": ["1"], "reach": 1}',
            "'reach' must be a list of numbers",
        ),
        ("\x00\xff", "not a whole JSON file"),
    ],
)
def test_foreign_files_say_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "mask.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(mc.MaskError, match=message) as caught:
        mc.Mask.load(path)
    assert str(path) in str(caught.value)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "mask.json"
    example().save(path)
    with pytest.raises(TypeError):
        example(provenance={"scheduler": object()}).save(path)
    assert mc.Mask.load(path) == example()
    assert [p.name for p in tmp_path.iterdir()] == ["mask.json"]


def test_a_mask_for_another_denoiser_is_refused():
    model = Chain().eval()
    fitting = {"compute": np.ones((2, 2), bool), "denoiser": "Chain", "block_hash": hash_blocks(model, ["a", "b"])}
    mc.optimize(model, example(**fitting))
    with pytest.raises(mc.MaskError, match="made for a UNet2DModel, this denoiser is a Chain"):
        mc.optimize(model, example(denoiser="UNet2DModel"))
    with pytest.raises(mc.MaskError, match="same names and other parameter shapes"):
        mc.optimize(Chain(width=8).eval(), example(**fitting))
    with pytest.raises(mc.MaskError, match=r"block 'a\.upp', which Chain does not have; nearest: a\.up"):
        mc.optimize(model, example(blocks=["a.upp", "b"]))


def descending(steps, shift=0.0):
    return [1000 * (steps - i) / steps - shift for i in range(steps)]


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)), st.booleans(), st.booleans())
def test_resampling_to_its_own_timesteps_changes_nothing(compute, rising, linear):
    steps = len(compute)
    timesteps = descending(steps)[:: -1 if rising else 1]
    snr = np.linspace(-5, 5, steps) ** 3 if linear else None
    mask = mc.Mask(compute, blocks=[str(i) for i in range(compute.shape[1])], timesteps=timesteps, reuse="linear", log_snr=snr)
    again = mask.resample(timesteps)
    assert again == mask
    assert again.provenance == mask.provenance


@given(st.integers(5, 60), st.integers(1, 80), st.integers(1, 8), st.floats(0.1, 0.9), st.integers(0, 10**6), st.booleans())
def test_resampled_masks_have_rows_of_the_mask_and_keep_its_share(steps, new, blocks, density, seed, rising):
    compute = np.random.default_rng(seed).random((steps, blocks)) < density
    order = -1 if rising else 1
    mask = mc.Mask(
        compute, blocks=[str(i) for i in range(blocks)], timesteps=descending(steps)[::order], log_snr=np.linspace(-5, 5, steps)
    )
    other = mask.resample(descending(new)[::order])
    assert other.compute.shape == (new, blocks)
    assert other.timesteps == tuple(descending(new)[::order])
    assert {row.tobytes() for row in other.compute} <= {row.tobytes() for row in mask.compute}
    assert np.array_equal(other.compute[0], mask.compute[0])
    assert (other.blocks, other.reuse) == (mask.blocks, mask.reuse)
    assert np.allclose(
        np.interp(other.timesteps[::-order], mask.timesteps[::-order], mask.log_snr[::-order]), other.log_snr[::-order]
    ) or (other.log_snr[0] < mask.log_snr[0] or other.log_snr[-1] > mask.log_snr[-1])
    if steps >= 10 and new >= 20 and compute[0].mean() > 0:
        assert abs(other.compute.mean() - compute.mean()) < 0.1


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("new", [25, 30, 40, 100])
def test_resampling_keeps_the_rhythm_of_a_schedule(interval, new):
    """Taking the nearest row would compute all or none of the 25 steps where the mask computes every second of 50."""
    compute = np.zeros((50, 3), dtype=bool)
    compute[::interval] = True
    mask = mc.Mask(compute, blocks=["a", "b", "c"], timesteps=descending(50))
    other = mask.resample(descending(new)).compute
    assert abs(other.mean() - compute.mean()) <= 1.5 / new
    assert len({row.tobytes() for row in other}) == 2
    gaps = np.diff(np.flatnonzero(np.append(other[:, 0], True)))
    assert gaps.max() <= 2 * interval * max(1, new / 50)


def test_resampling_a_late_or_wrong_run():
    mask = mc.Mask(np.eye(4, dtype=bool), blocks=list("abcd"), timesteps=[900, 700, 500, 300], log_snr=[-4, -1, 1, 4])
    late = mask.resample([500, 300])
    assert late.compute.tolist() == [[True, False, False, False], [False, False, False, True]]
    assert late.log_snr == (1, 4)
    assert mask.resample([800, 400, 100]).log_snr == (-2.5, 2.5, 7)
    assert mask.resample([800, 400], log_snr=[-2, 2]).log_snr == (-2, 2)
    assert late.provenance["resampled"] == "4 to 2 steps"
    with pytest.raises(
        mc.MaskError, match="fall from 900 to 300; a mask cannot be resampled to timesteps that go the other way, 300 to 900"
    ):
        mask.resample([300, 900])
    with pytest.raises(mc.MaskError, match="at least one timestep"):
        mask.resample([])
    with pytest.raises(mc.MaskError, match="without repeats"):
        mask.resample([900, 300, 900])
    with pytest.raises(
        mc.MaskError, match=r"between 300 and 900, these between 0\.3 and 0\.9; give the values that the denoiser is"
    ):
        mask.resample([0.9, 0.3])


@pytest.mark.parametrize("kind", ["DDIM", "PNDM", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_timesteps_as_a_scheduler_has_them(kind):
    """Of those that are called twice in a row a mask has one step."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    scheduler.set_timesteps(10)
    values = list(dict.fromkeys(scheduler.timesteps.tolist()))
    mask = mc.Mask(np.eye(20, 3, dtype=bool), blocks=list("abc"), timesteps=descending(20))
    snr = mc.log_snr(scheduler)
    assert mask.resample(scheduler.timesteps, log_snr=snr) == mask.resample(values, log_snr=snr)
    assert mc.Mask.full(["a"], scheduler.timesteps).timesteps == tuple(values)


def test_provenance_is_what_json_knows(tmp_path):
    mask = mc.Mask.full(["a"], [9, 1]).replace(interval=np.int64(2), share=np.float32(0.5), seeds=[np.int64(1)])
    mask.save(tmp_path / "mask.json")
    assert mc.Mask.load(tmp_path / "mask.json").provenance == {"interval": 2, "share": 0.5, "seeds": [1]}


@pytest.mark.parametrize("field", ["timesteps", "blocks", "denoiser"])
def test_replace_refuses_what_it_does_not_replace(field):
    with pytest.raises(mc.MaskError, match=f"replace does not change '{field}'"):
        mc.Mask.full(["a"], [9, 1]).replace(**{field: [8, 2]})
