"""The benchmarks run end to end, in small and uncompiled; what they print is not tested, the arithmetic behind it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

import maskcompile as mc
from benchmarks import demo, latency
from benchmarks.cases import case
from benchmarks.reference import load, train
from benchmarks.sampling import noise, psnr, sample, task
from benchmarks.timing import Timing, difference, in_parts, interleaved, ratio, ratio_spread


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


def test_latency(tmp_path, monkeypatch):
    given = ["--steps", "8", "--batch", "2", "--backend", "eager", "--out", str(tmp_path)]
    latency.main([*given, "--repeats", "1"])
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
    # What is measured again takes the place of what was there; another setting has a table of its own.
    row, cost = ({k: v for k, v in found[0].items() if k != "setting"} for found in (rows, costs))
    monkeypatch.setattr(latency, "measure", lambda of, *_: [{**row, "denoiser": of.name, "variant": "again"}])
    monkeypatch.setattr(latency, "rule_cost", lambda of, *_: [{**cost, "denoiser": of.name}])
    monkeypatch.setattr(latency, "case", lambda name, steps, batch, *_: small_case(name, steps, batch))
    latency.main([*given, "--repeats", "1", "--denoisers", "unet"])
    again = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [row["variant"] for row in again] == ["again", *(row["variant"] for row in rows if row["denoiser"] == "dit")]
    latency.main([*given, "--repeats", "2", "--denoisers", "unet"])
    assert (tmp_path / "latency.md").read_text().count("| denoiser | variant |") == 2
    (tmp_path / "latency.json").write_text(json.dumps({"setting": "", "rows": rows, "rule": costs}))
    with pytest.raises(SystemExit, match="older version"):
        latency.main(given)


@dataclass
class small_case:
    name: str
    steps: int
    batch: int

    @property
    def start(self):
        return torch.empty(self.batch)


def test_every_variant_is_beside_the_original_compiled_alike(monkeypatch):
    """Of a denoiser that does nothing: with seconds given, what is made of them."""
    seconds = {
        "eager": 8.0, "torch.compile": 6.0, "torch.compile, max-autotune-no-cudagraphs": 3.0, "all ones": 5.0,
        "all ones, max-autotune-no-cudagraphs": 2.0, "all ones, backend eager": 12.0,
    }  # fmt: skip

    def taken(runs, repeats, prepare, parts):
        assert parts == 3
        return {label: Timing((seconds.get(label, 1.0),) * repeats) for label in runs}

    monkeypatch.setattr(latency, "interleaved", taken)
    monkeypatch.setattr(mc.OptimizedDenoiser, "warmup", lambda *_, **__: None)
    rows = {row["variant"]: row for row in latency.measure(case("unet", 3, 1), 2, "inductor")}
    assert rows["torch.compile"]["spread"] is None
    assert {label: rows[label]["over_compiled"] for label in seconds} == {
        "eager": 0.75, "torch.compile": 1.0, "torch.compile, max-autotune-no-cudagraphs": 2.0, "all ones": 1.2,
        "all ones, max-autotune-no-cudagraphs": 1.5, "all ones, backend eager": 0.5,
    }  # fmt: skip
    assert rows["all ones"]["realised_share"] == 1.2
    assert rows["all ones, backend eager"]["realised_share"] is None
    assert rows["uniform(interval=2), hold"]["realised_share"] == pytest.approx(6 * rows["uniform(interval=2), hold"]["share"])


def test_variants_take_turns():
    done = []
    runs = {name: in_parts([partial(done.append, (name, step)) for step in range(7)], 3) for name in ("a", "b", "c", "d")}
    prepare = {"b": partial(done.append, ("b", "starts"))}
    times = interleaved(runs, repeats=2, warmup=1, prepare=prepare, parts=3)
    assert [len(timing.seconds) for timing in times.values()] == [2, 2, 2, 2]
    for name in "acd":
        assert [step for who, step in done if who == name] == [*range(7)] * 3
    assert [step for who, step in done if who == "b"] == ["starts", *range(7)] * 3
    # nobody has two turns before all others had one, and the order changes
    turns = [who for i, (who, step) in enumerate(done) if step in (0, 2, 4)]
    orders = [tuple(turns[i : i + 4]) for i in range(0, len(turns), 4)]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert len(set(orders)) > 1


def test_ratios_are_taken_within_rounds():
    assert ratio(Timing((2.0, 40.0, 6.0)), Timing((1.0, 10.0, 2.0))) == 3.0
    assert ratio_spread(Timing((2.0, 6.0, 9.0)), Timing((1.0, 2.0, 6.0))) == 0.75
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
