"""The command line on real ``from_pretrained`` folders."""

from __future__ import annotations

import argparse
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch

import maskcompile as mc
from maskcompile import cli
from maskcompile.cli import main
from maskcompile.learning.memo import Memo
from maskcompile.learning.recording import record
from tests.architectures import architecture
from tests.denoisers import denoiser
from tests.maskcompile.pipelines.tiny import TINY


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    diffusers.DDIMPipeline(denoiser("unet2d").model, diffusers.DDIMScheduler()).save_pretrained(root / "pipeline")
    denoiser("dit").model.save_pretrained(root / "dit")
    denoiser("unet2d_condition").model.save_pretrained(root / "condition")
    for name in ("sdxl", "sd3", "flux_distilled", "wan", "text2img"):
        TINY[name]()[0].save_pretrained(root / name)
    architecture("pixart").model.save_pretrained(root / "pixart")
    labelled = {**denoiser("unet2d").model.config, "num_class_embeds": 10, "_use_default_values": []}
    diffusers.UNet2DModel.from_config(labelled).save_pretrained(root / "labelled")
    return root


def numbers(*shape):
    """As --call gives them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).tolist()


PROMPT = {"prompt_embeds": numbers(1, 5, 16), "height": 64, "width": 64}
GUIDED = {**PROMPT, "negative_prompt_embeds": numbers(1, 5, 16)}
POOLED = {"pooled_prompt_embeds": numbers(1, 8), "negative_pooled_prompt_embeds": numbers(1, 8)}


@pytest.mark.parametrize(
    ("folder", "call", "inputs"),
    [
        ("sdxl", {**GUIDED, **POOLED}, ("sample 2x4x8x8", "added_cond_kwargs_text_embeds 2x8", "encoder_hidden_states 2x5x16")),
        (
            "flux_distilled",
            {**PROMPT, "pooled_prompt_embeds": numbers(1, 12)},
            ("hidden_states 1x16x8", "guidance 1", "img_ids 16x3"),
        ),
        ("wan", {**GUIDED, "num_frames": 5}, ("hidden_states 1x4x2x8x8", "encoder_hidden_states 1x")),
    ],
)
def test_inspect_calls_a_denoiser_as_its_pipeline_does(folders, capsys, folder, call, inputs):
    assert main(["inspect", str(folders / folder), "--call", json.dumps(call)]) == 0
    shown = capsys.readouterr()
    assert all(given in shown.out.splitlines()[0] for given in inputs)
    assert "made up" not in shown.err


@pytest.mark.parametrize(
    ("folder", "call", "inputs"),
    [
        ("sd3/transformer", {}, ("hidden_states 2x4x8x8", "encoder_hidden_states 2x8x16", "pooled_projections 2x12")),
        ("pixart", {}, ("hidden_states 2x4x8x8", "encoder_hidden_states 2x8x12")),
        ("labelled", {}, ("class_labels 2", "sample 2x3x16x16")),
        (
            "sdxl/unet",
            {"added_cond_kwargs": {"text_embeds": numbers(2, 8), "time_ids": [[64, 64, 0, 0, 64, 64]] * 2}},
            ("added_cond_kwargs_text_embeds 2x8", "added_cond_kwargs_time_ids 2x6"),
        ),
        ("text2img", {}, ("sample 2x4x8x8", "encoder_hidden_states 2x8x16")),  # whose pipeline wants a prompt
    ],
)
def test_inspect_makes_up_what_a_denoiser_takes(folders, capsys, folder, call, inputs):
    assert main(["inspect", str(folders / folder), "--batch", "2", "--call", json.dumps(call)]) == 0
    shown = capsys.readouterr()
    assert all(given in shown.out.splitlines()[0] for given in inputs)
    assert ("Provide either `prompt` or `prompt_embeds`" in shown.err) == (folder == "text2img")


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


def learned(folder, path, steps, **call):
    command = ["learn", folder, path, "--budget", "0.6", "--steps", steps, "--passes", "2", "--batch", "1", "--seeds", "0"]
    assert main([*map(str, command), "--call", json.dumps(call)]) == 0
    return mc.Mask.load(path)


def test_learn_for_a_run_that_stops_early(folders, tmp_path):
    mask = learned(folders / "sdxl", tmp_path / "mask.json", 6, **GUIDED, **POOLED, denoising_end=0.7)
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(folders / "sdxl" / "scheduler")
    scheduler.set_timesteps(6)
    assert mask.timesteps == tuple(scheduler.timesteps.tolist()[: mask.steps])
    assert 1 < mask.steps < 6
    assert mask.log_snr == pytest.approx(mc.log_snr(scheduler)[: mask.steps])


def test_the_log_snr_is_that_of_the_timesteps_of_a_run(capsys):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    own = tuple(scheduler.timesteps.tolist())
    assert cli._log_snr(scheduler, own[2:]) == mc.log_snr(scheduler)[2:]
    assert cli._log_snr(scheduler, [t / 1000 for t in own]) == mc.log_snr(scheduler)  # as Flux is called
    assert capsys.readouterr().err == ""
    assert cli._log_snr(scheduler, [t / 1000 for t in own[2:]]) is None
    assert "counted in steps: FlowMatchEulerDiscreteScheduler has no timestep 0.6" in capsys.readouterr().err


SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "trailing"},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverSDEScheduler": {},
}


@pytest.fixture(params=SCHEDULERS)
def bare(request, tmp_path):
    """A folder of a denoiser and a scheduler without a pipeline, and the scheduler."""
    scheduler = getattr(diffusers, request.param)(**SCHEDULERS[request.param])
    denoiser("unet2d").model.save_pretrained(tmp_path / "bare" / "unet")
    scheduler.save_pretrained(tmp_path / "bare" / "scheduler")
    return tmp_path / "bare", scheduler


def test_a_folder_without_a_pipeline_is_sampled_with_its_scheduler(bare):
    folder, scheduler = bare
    options = argparse.Namespace(folder=folder, device="cpu", batch=2, call={}, steps=5)
    model, own, sample = cli._loop(options, torch.float32)
    assert type(own()) is type(scheduler)
    first = sample(0)
    assert torch.equal(sample(0), first)  # solvers remember steps, and some add noise
    assert not torch.equal(sample(1), first)
    scheduler.set_timesteps(5)
    seen = record(model, sample, 0).timesteps
    assert seen == tuple(dict.fromkeys(scheduler.timesteps.tolist()))


def test_learn_says_which_scheduler_it_assumes(folders, tmp_path, capsys):
    denoiser("unet2d").model.save_pretrained(tmp_path / "flow" / "unet")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(tmp_path / "flow" / "scheduler")
    mask = learned(tmp_path / "flow", tmp_path / "mask.json", 5)
    scheduler.set_timesteps(5)
    assert np.allclose(mask.timesteps, scheduler.timesteps)
    assert mask.log_snr == pytest.approx(mc.log_snr(scheduler))
    assert "DDIM" not in capsys.readouterr().err
    learned(tmp_path / "flow" / "unet", tmp_path / "mask.json", 5)
    assert "has no scheduler folder: it is sampled with diffusers' DDIMScheduler()" in capsys.readouterr().err


def test_what_is_wrong_is_one_line(folders, tmp_path, capsys):
    def error(*command):
        assert main([*map(str, command)]) == 1
        *notes, line = capsys.readouterr().err.splitlines()
        assert line.startswith("maskcompile ")
        notes = [note for note in notes if note and "%|" not in note]  # but for progress bars
        assert all("it is sampled with diffusers' DDIMScheduler()" in note for note in notes), notes
        return line

    assert "holds no denoiser" in error("inspect", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert "not a whole JSON file" in error("show", tmp_path / "broken.json")
    low = error("learn", folders / "dit", tmp_path / "mask.json", "--budget", "0.01", "--steps", "10")
    assert low.startswith("maskcompile learn: a budget of 0.01 is below")
    assert not (tmp_path / "mask.json").exists()
    alone = error("inspect", folders / "flux_distilled" / "transformer")
    assert "the configuration of FluxTransformer2DModel has no 'sample_size'" in alone
    assert "use its pipeline's folder, or give hidden_states by --call" in alone
    lacking = error("inspect", folders / "sdxl" / "unet")
    assert "UNet2DConditionModel could not be called with sample, timestep, encoder_hidden_states:" in lacking
    assert "given by --call" in lacking
    unknown = error("inspect", folders / "pixart", "--call", '{"class_labels": [1]}')
    assert "takes no 'class_labels', which --call names; it takes hidden_states," in unknown
    assert len(unknown) < 300
    wanting = error("learn", folders / "text2img", tmp_path / "mask.json", "--budget", "0.5")
    assert "text2img could not be sampled from: Provide either `prompt`" in wanting
    twice = error("learn", folders / "pipeline", tmp_path / "mask.json", "--budget", "0.5", "--call", '{"generator": 1}')
    assert "could not be sampled from" in twice
    assert "got multiple values for keyword argument 'generator'" in twice
    learn = ("learn", folders / "pipeline")
    assert "it names a file in a folder that there is" in error(*learn, tmp_path, "--budget", "0.5")
    assert "it names a file in a folder that there is" in error(*learn, tmp_path / "none" / "mask.json", "--budget", "0.5")
    for passes in ("0", "-1", "nan"):
        assert "passes is the work of the search" in error(*learn, tmp_path / "m.json", "--budget", "0.5", "--passes", passes)
    paper = ("--method", "paper", "--passes", "3")
    assert "the paper's method has none such" in error(*learn, tmp_path / "mask.json", "--budget", "0.5", *paper)
    for file in ("config.json", "model_index.json"):
        (tmp_path / "list").mkdir()
        (tmp_path / "list" / file).write_text("[]")
        assert "does not hold a JSON object" in error("inspect", tmp_path / "list")
        assert "does not hold a JSON object" in error("learn", tmp_path / "list", tmp_path / "mask.json", "--budget", "0.5")
        shutil.rmtree(tmp_path / "list")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "NoScheduler"}')
    denoiser("unet2d").model.save_pretrained(tmp_path / "unet")
    assert "names the class 'NoScheduler', which this diffusers" in error(
        "learn", tmp_path, tmp_path / "mask.json", "--budget", "0.5"
    )


@pytest.mark.parametrize("name", ["mask.checkpoint", "unet-0.5", "mask.json"])
def test_the_mask_is_where_it_was_to_be_written(folders, tmp_path, name):
    learned(folders / "pipeline", tmp_path / name, 5)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_interrupted_it_says_where_it_goes_on(folders, tmp_path, monkeypatch, capsys):
    """By Ctrl-C, once something has been saved; the same command comes to the mask of one that was not interrupted."""
    whole = learned(folders / "pipeline", tmp_path / "whole.json", 5)
    write = Memo.__setitem__

    def interrupting(memo, key, value):
        write(memo, key, value)
        if len(memo.results) == 3:
            raise KeyboardInterrupt

    command = ["learn", folders / "pipeline", tmp_path / "mask.json", "--budget", "0.6", "--steps", "5", "--seeds", "0"]
    command = [*map(str, command), "--passes", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(Memo, "__setitem__", interrupting)
        assert main(command) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"maskcompile learn: interrupted; the same command goes on from {tmp_path / 'mask.json.checkpoint'}."
    assert not (tmp_path / "mask.json").exists()
    assert main(command) == 0
    assert mc.Mask.load(tmp_path / "mask.json") == whole
    assert not (tmp_path / "mask.json.checkpoint").exists()


def test_an_error_that_says_nothing_is_named(monkeypatch, capsys):
    def fails(path):
        raise FloatingPointError

    monkeypatch.setattr(mc.Mask, "load", fails)
    assert main(["show", "mask.json"]) == 1
    assert capsys.readouterr().err == "maskcompile show: FloatingPointError\n"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--steps", "0", "a whole number of 1 or more is wanted; got '0'"),
        ("--batch", "-2", "a whole number of 1 or more is wanted; got '-2'"),
        ("--steps", "many", "a whole number of 1 or more is wanted; got 'many'"),
        ("--call", "[]", "a JSON object is wanted"),
        ("--call", "5", "a JSON object is wanted"),
        ("--call", "{", "'{' is not JSON"),
    ],
)
def test_options_that_make_no_sense_are_refused(folders, tmp_path, capsys, option, value, said):
    with pytest.raises(SystemExit) as ended:
        main(["learn", str(folders / "pipeline"), str(tmp_path / "mask.json"), "--budget", "0.5", option, value])
    assert ended.value.code == 2
    assert f"argument {option}: {said}" in capsys.readouterr().err
