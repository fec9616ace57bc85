"""Real-size latency, run on denoisers that are not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, real_size
from benchmarks.dit import DiT


def small_dit():
    return DiT(input_size=8, depth=2, hidden_size=32, num_heads=2, num_classes=10).eval()


@pytest.fixture
def small(monkeypatch):
    row = dataclasses.replace(models.row_named("dit-256"), build=small_dit)
    monkeypatch.setattr(real_size, "row_named", lambda name: row)
    monkeypatch.setattr(real_size, "apart", real_size.measure)
    trials = tuple(real_size.Trial("dit-256", "uniform", (("interval", interval),), 4) for interval in (2, 3))
    monkeypatch.setattr(real_size, "MASKS", trials)
    return row


def test_the_table(small, tmp_path, capsys):
    real_size.main(["--repeats", "2", "--backend", "eager", "--out", str(tmp_path), "--trials", "0"])
    (row,) = json.loads((tmp_path / "real_size.json").read_text())["rows"]
    model = small.build()
    args, kwargs = small.inputs(model, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args, **kwargs)
    assert row["gmacs"] == counter.get_total_flops() / 2e9
    assert row["steps"] == 4
    assert row["mask"] == "uniform(interval=2)"
    assert row["graphs"] == 2
    assert 0.5 < row["share"] < 1
    assert row["realised_share"] == pytest.approx(row["over_compiled"] * row["share"])
    text = (tmp_path / "real_size.md").read_text()
    assert text in capsys.readouterr().out
    assert f"| {row['share']:.1%} |" in text
    # goes on: the first row stays as it is
    real_size.main(["--repeats", "2", "--backend", "eager", "--out", str(tmp_path)])
    again = json.loads((tmp_path / "real_size.json").read_text())["rows"]
    assert again[0] == row
    assert [r["mask"] for r in again] == ["uniform(interval=2)", "uniform(interval=3)"]
    with pytest.raises(SystemExit, match="another repeats"):
        real_size.main(["--repeats", "3", "--backend", "eager", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", sorted({trial.row for trial in real_size.MASKS}))
def test_calls_at_another_timestep(name):
    """Of every row measured: only what means the timestep is another."""
    model, inputs = models.one_picture(models.row_named(name))
    inputs = real_size.moved(inputs, "meta", torch.float32)
    given = inputs[1]["timestep"] if name == "pixart" else inputs[0][1]
    args, kwargs = real_size.at(inputs, torch.tensor(7, dtype=given.dtype, device="meta"))
    before = {**dict(enumerate(inputs[0])), **inputs[1]}
    changed = [place for place, value in {**dict(enumerate(args)), **kwargs}.items() if value is not before[place]]
    assert changed == (["timestep"] if name == "pixart" else [1])
    given = kwargs["timestep"] if name == "pixart" else args[1]
    assert (given.shape, given.dtype) == (before[changed[0]].shape, before[changed[0]].dtype)
    with torch.device("meta"), torch.no_grad():
        model(*args, **kwargs)


def test_the_timestep_is_the_one_asked_for():
    (_, t, y), kwargs = real_size.at(((torch.randn(2), torch.full((2,), 999), torch.ones(2)), {}), torch.tensor(7))
    assert t.tolist() == [7, 7]
    assert not kwargs
    _, kwargs = real_size.at(((torch.randn(2),), {"timestep": torch.tensor(999), "mask": y}), torch.tensor(7))
    assert kwargs["timestep"] == 7
    assert kwargs["mask"] is y
