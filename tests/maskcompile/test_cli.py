"""The command line on real ``from_pretrained`` folders."""

from __future__ import annotations

import diffusers
import pytest

import maskcompile as mc
from maskcompile.cli import main
from tests.denoisers import denoiser


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    diffusers.DDIMPipeline(denoiser("unet2d").model, diffusers.DDIMScheduler()).save_pretrained(root / "pipeline")
    denoiser("dit").model.save_pretrained(root / "dit")
    denoiser("unet2d_condition").model.save_pretrained(root / "condition")
    return root


@pytest.mark.parametrize(("folder", "steps"), [("pipeline", 10), ("dit", 24)])
def test_learn_and_show(folders, tmp_path, capsys, folder, steps):
    path = tmp_path / "mask.json"
    command = [
        "learn",
        str(folders / folder),
        str(path),
        "--budget",
        "0.5",
        "--steps",
        str(steps),
        "--passes",
        "4",
        "--batch",
        "2",
    ]
    assert main(command) == 0
    mask = mc.Mask.load(path)
    assert mask.steps == steps
    assert mask.provenance["share"] == pytest.approx(0.5, abs=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["mask.json"]
    assert str(path) in capsys.readouterr().out
    assert main(["show", str(path), "--png", str(tmp_path / "mask.png")]) == 0
    shown = capsys.readouterr().out
    assert str(mask) in shown
    assert "budget: 0.5" in shown
    assert (tmp_path / "mask.png").stat().st_size > 1000


@pytest.mark.parametrize("folder", ["pipeline", "dit", "condition"])
def test_inspect(folders, tmp_path, capsys, folder):
    assert main(["inspect", str(folders / folder), "--png", str(tmp_path / "blocks.png")]) == 0
    shown = capsys.readouterr().out
    block = {"pipeline": "down_blocks.0.resnets.0", "dit": "transformer_blocks.1.ff"}.get(folder, "mid_block.resnets.0")
    assert block in shown
    assert (tmp_path / "blocks.png").stat().st_size > 1000


def test_what_is_wrong_is_one_line(folders, tmp_path, capsys):
    def error(*command):
        assert main([*map(str, command)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "holds no denoiser" in error("inspect", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert "not a whole JSON file" in error("show", tmp_path / "broken.json")
    low = error("learn", folders / "dit", tmp_path / "mask.json", "--budget", "0.01", "--steps", "10")
    assert low.startswith("maskcompile learn: a budget of 0.01 is below")
    assert not (tmp_path / "mask.json").exists()
