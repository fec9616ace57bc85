"""The benchmarks run end to end, in small and uncompiled; what they print is not tested, the arithmetic behind it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import maskcompile as mc
from benchmarks import demo, latency
from benchmarks.reference import load, train
from benchmarks.sampling import noise, psnr, sample, task
from benchmarks.timing import Timing, difference, ratio


def test_demo(tmp_path, capsys):
    demo.main(["--steps", "3", "--batch", "6", "--repeats", "1", "--backend", "eager", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "table.json").read_text())
    assert [row["blocks"] for row in written["rows"]] == [23, 16]
    assert written["setting"] in capsys.readouterr().out
    for name in ("unet", "dit"):
        for kind in ("samples", "mask", "blocks"):
            assert (tmp_path / f"{name}_{kind}.png").stat().st_size > 5000
        mask = mc.Mask.load(tmp_path / f"{name}_mask.json")
        assert mask.steps == 3
        mc.optimize(load(name)[0], mask)


def test_latency(tmp_path):
    latency.main(["--steps", "8", "--batch", "2", "--repeats", "1", "--backend", "eager", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert {row["variant"] for row in rows} >= {
        "eager",
        "torch.compile",
        "all ones",
        "deepcache(interval=3), hold",
        "uniform(interval=2), hold",
    }
    assert {row["variant"] for row in rows} >= {
        "deepcache(interval=3), linear",
        "uniform(interval=2, warmup=4), linear",
        "TaylorSeer hook, order 2, uniform(interval=3)",
    }
    costs = json.loads((tmp_path / "latency.json").read_text())["rule"]
    assert [cost["mask"] for cost in costs] == ["deepcache(interval=2)", "uniform(interval=2)", "uniform(interval=2)"]
    assert all(cost["low"] <= cost["cost"] <= cost["high"] for cost in costs)
    for row in rows:
        if row["realised_share"] is not None:
            assert row["realised_share"] == pytest.approx(row["over_compiled"] * row["share"])


def test_ratios_are_taken_within_rounds():
    assert ratio(Timing((2.0, 40.0, 6.0)), Timing((1.0, 10.0, 2.0))) == 3.0
    assert Timing((1.0, 2.0, 3.0)).spread == 1.0
    # 1, 2, 1, 0 and 3 seconds are added, of 20.
    ours, other = Timing((3.0, 5.0, 2.0, 1.0, 4.0)), Timing((2.0, 3.0, 1.0, 1.0, 1.0))
    assert difference(ours, other, Timing((10.0, 20.0, 30.0))) == (0.05, 0.05, 0.1)


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a + torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)


def test_pictures_do_not_depend_on_the_batch():
    t = task("unet", 3)
    pictures = sample(t, t.denoiser, noise(3, seed=5))
    assert torch.allclose(sample(t, t.denoiser, noise(1, seed=6))[0], pictures[1], atol=1e-4)
    assert pictures.min() >= 0
    assert pictures.max() <= 1


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_training_resumes_as_if_it_had_not_stopped(name, tmp_path, monkeypatch):
    torch.manual_seed(1)
    pictures, labels = torch.rand(12, 3, 32, 32) * 2 - 1, torch.arange(12) % (1 if name == "unet" else 6)
    monkeypatch.setitem(train.RECIPE, name, (1e-3, 2, 3))
    whole = torch.load(train.train(name, "cpu", 3, pictures, labels, tmp_path / "whole"), weights_only=True)

    rate = train.learning_rate

    def stop(step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(name, "cpu", 3, pictures, labels, tmp_path / "parts")
    monkeypatch.setattr(train, "learning_rate", rate)
    resumed = torch.load(train.train(name, "cpu", 3, pictures, labels, tmp_path / "parts"), weights_only=True)
    assert resumed["step"] == whole["step"] == 3
    for key, value in whole["ema"].items():
        assert torch.equal(value, resumed["ema"][key]), key

    train.export(name, tmp_path / "whole" / f"{name}.pt", tmp_path / "exported")
    loaded = type(load(name)[0]).from_pretrained(tmp_path / "exported")
    for key, value in loaded.state_dict().items():
        assert np.allclose(value.float(), whole["ema"][key], atol=1e-3)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_bundled_checkpoints_are_those_of_the_recipe(name):
    denoiser, scheduler = load(name)
    assert {k: v.shape for k, v in denoiser.state_dict().items()} == {
        k: v.shape for k, v in train.build(name).state_dict().items()
    }
    assert scheduler.config.prediction_type == train.build_scheduler().config.prediction_type == "v_prediction"
    assert not denoiser.training
