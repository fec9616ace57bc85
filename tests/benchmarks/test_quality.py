"""The quality benchmark end to end, in small and uncompiled, and the arithmetic of its report."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import quality, quality_report
from benchmarks.masks import Choice, choices
from benchmarks.reference import load
from benchmarks.reference.classifier import Features, augment, load_features, train
from benchmarks.rivals import BLOCKS, taylorseer_computes, taylorseer_hook
from benchmarks.sampling import noise, psnr, sample, task, with_solver
from tests.executor import Executor

SMALL = ["--denoisers", "dit", "--steps", "5", "--pictures", "6", "--batch", "6", "--frechet", "12", "--backend", "eager"]


def test_quality(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "LIMIT", 8)
    pictures = torch.rand(12, 3, 32, 32) * 2 - 1
    monkeypatch.setattr(quality, "training_pictures", lambda name: (pictures, torch.arange(12) % 6))
    arguments = [*SMALL, "--only", '"reference": 5,', "--out", str(tmp_path)]
    quality.main(arguments)
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    wanted = [t for t in quality.trials(["dit"], (5,)) if t.reference == 5]
    assert {row["key"] for row in rows} == {t.key for t in wanted}

    found = {(r["mask"], r["rule"], r["steps"]): r for r in rows if "psnr" in r and r["solver"] == "DDIM"}
    loaded = load("dit")
    t = with_solver(loaded, "dit", 5, "DDIM", clip=False)
    start = noise(6, quality.SEED)
    original = sample(t, t.denoiser, start)
    blocks = [f"transformer_blocks.{i}.{part}" for i in range(8) for part in ("attn1", "ff")]
    for rule, order in (("hold", 0), ("linear by step", 1)):
        executor = Executor(t.denoiser, blocks, [[step % 2 == 0] * 16 for step in range(5)], order)
        steps = iter(range(5))
        masked = sample(t, lambda *args, e=executor, s=steps, **kwargs: e.step(next(s), *args, **kwargs), start)
        assert found["uniform(interval=2)", rule, 5]["psnr"] == pytest.approx(psnr(masked, original).mean().item(), abs=0.1)
    fewer = with_solver(loaded, "dit", 4, "DDIM", clip=False)
    expected = psnr(sample(fewer, fewer.denoiser, start), original).mean().item()
    assert found[None, None, 4]["psnr"] == pytest.approx(expected, abs=0.1)

    # A second call finds everything done, and other settings do not mix with these.
    monkeypatch.setattr(quality, "measure", None)
    quality.main(arguments)
    assert "## The reuse rule" in (tmp_path / "quality.md").read_text()
    with pytest.raises(SystemExit, match="another pictures"):
        quality.main([*arguments, "--pictures", "12"])


def test_the_report_by_hand(tmp_path):
    def row(rule, mask, value, **more):
        described = {"denoiser": "dit", "reference": 50, "steps": 50, "solver": "DDIM", "frechet": False, "warmup": 1}
        return described | {"key": "", "rule": rule, "mask": mask, "share": 0.5, "psnr": value, "ssim": 0.9} | more

    two, three = "uniform(interval=2)", "uniform(interval=3)"
    rows = [
        row("hold", two, 40.0), row("linear", two, 47.0), row("linear by step", two, 45.0), row("linear fitted", two, 48.0),
        row("hold", three, 30.0, share=0.35), row("linear", three, 35.0, share=0.35), row("linear by step", three, 33.0),
        row(None, None, 31.0, steps=25), row("linear", two, 0.0, frechet=1.25),
        row("hold", two, 20.0, solver="DDIM, eta 1"), row("linear", two, 18.0, solver="DDIM, eta 1"),
    ]  # fmt: skip
    del rows[8]["psnr"]
    document = {"setting": "", "pictures": 1, "frechet_pictures": 1, "features": "classifier", "rows": rows}
    (tmp_path / "quality.json").write_text(json.dumps(document))
    speeds = {f"{two}, hold": 1.8, f"{two}, linear": 1.75, f"{three}, hold": 2.6, f"{three}, linear": 2.5}
    here = {"setting": "50 steps, float32, backend inductor; here", "added_mib": None, "denoiser": "dit"}
    timed = [{**here, "variant": v, "over_compiled": s} for v, s in speeds.items()]
    others = [(here["setting"].replace("here", "a GPU"), None), (here["setting"].replace("here", "a GPU"), 1.0)]
    others += [(here["setting"].replace("50", "20"), None), (here["setting"].replace("here", "elsewhere"), None)]
    wrong = [{**timed[0], "over_compiled": 9.0, "setting": setting, "added_mib": added} for setting, added in others]
    timed = [*wrong[:3], *timed, *wrong[3:]]
    latency = {"rows": timed}
    (tmp_path / "latency.json").write_text(json.dumps(latency))
    quality_report.write(tmp_path)
    text = (tmp_path / "quality.md").read_text()
    assert (
        "| DiT | 50 | uniform(interval=2) | 50.0% | 40.0 | 47.0 | 45.0 | 48.0 | +7.0 | 0.9000 / 0.9000 | - / - | - / 1.250 |"
        in text
    )
    assert "| DiT | all | +6.0 dB (+5.0 to +7.0) |" in text
    assert "| DiT | 50 | 50% | 25 steps | uniform(interval=2), linear fitted: 50.0% | 48.0 / 31.0 / - / - |" in text
    assert "| DiT | 50 | DDIM, eta 1 | uniform(interval=2) | 50.0% | 20.0 | 18.0 | -2.0 |" in text
    # Hold reaches 35 dB half way between its masks at 40 dB (1.8x) and 30 dB (2.6x), and 47 dB nowhere.
    assert "| DiT | uniform(interval=3) | 35.0 | 2.50x | 2.20x |" in text
    assert "| DiT | uniform(interval=2) | 47.0 | 1.75x | less than 1.80x |" in text
    assert (tmp_path / "quality.png").stat().st_size > 5000


def test_frechet_distances_tell_pictures_from_noise(monkeypatch):
    """Through the metric as the benchmark makes it, which once saw all pictures as black."""
    t = with_solver(load("dit"), "dit", 4, "DDIM", clip=False)
    pictures = sample(t, t.denoiser, noise(48, 5))
    monkeypatch.setattr(quality, "training_pictures", lambda name: (pictures * 2 - 1, torch.zeros(48, dtype=torch.int64)))
    metric = quality.frechet_metrics(None, 48)

    def distance(other):
        found = metric("dit")
        found.update(quality.to_bytes(other), real=False)
        return found.compute().item()

    same, near, far = (
        distance(p) for p in (pictures, (pictures + 0.05 * torch.randn_like(pictures)).clamp(0, 1), torch.rand_like(pictures))
    )
    assert abs(same) < 1e-2
    assert same + 0.01 < near < far / 10


def test_choices_are_masks_of_their_schedule():
    assert len(choices("dit")) == 3 * 2 * 2
    assert Choice("uniform", 3, 4).label == "uniform(interval=3, warmup=4)"
    t = task("unet", 10)
    samplers = quality.Samplers("eager", 2)
    samplers.task("unet", 10, "DDIM")
    program = samplers.programs["unet"]
    linear, by_step = (Choice("deepcache", 2, 4, rule).mask(program, t) for rule in ("linear", "linear by step"))
    assert linear.log_snr is not None
    assert by_step.log_snr is None
    assert by_step.reuse == linear.reuse == ("linear",) * len(program.names)
    assert [step for step, row in enumerate(linear.compute) if row.all()] == [0, 1, 2, 3, 5, 7, 9]


def test_taylorseer_computes_when_it_says():
    model = task("dit", 12).denoiser
    calls = []
    model.transformer_blocks[0].ff.net[0].register_forward_hook(lambda *_: calls.append(step))
    for warmup in (1, 3):
        calls.clear()
        with taylorseer_hook(model, BLOCKS["dit"], 3, 1, warmup) as restart:
            for _ in range(2):
                restart()
                for step in range(12):
                    with torch.no_grad():
                        model(torch.randn(1, 3, 32, 32), torch.tensor([step]), class_labels=torch.tensor([0]))
        assert calls == 2 * [step for step in range(12) if taylorseer_computes(step, 3, warmup)]


def test_the_classifier_learns_and_the_bundled_one_tells_pictures_apart():
    torch.manual_seed(0)
    pictures = (torch.rand(8, 3, 8, 8) > 0.5).repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8) * 255
    _, accuracy = train(pictures, steps=40, batch=16)
    assert accuracy >= 0.75
    features = load_features()
    assert isinstance(features, Features)
    with torch.no_grad():
        same, moved = features(pictures), features(augment(pictures))
    assert same.shape == (8, 64)
    assert (torch.cdist(same, moved).argmin(1) == torch.arange(8)).float().mean() >= 0.75
