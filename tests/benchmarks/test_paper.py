"""A row of the paper end to end, on tiny checkpoints with random weights: against diffusers' pipelines and the executor."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import string
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import maskcompile as mc
from benchmarks import checkpoints, convert_ldm, dit, frechet, models, paper, weights
from benchmarks.reference.classifier import load_features
from maskcompile.learning.processes import Processes
from tests.executor import Executor

ROOT = Path(__file__).parents[2]
#: learns almost nothing, fast
QUICK = [
    "--backend",
    "eager",
    "--repeats",
    "1",
    "--steps",
    "4",
    "--passes",
    "4",
    "--seeds",
    "0",
    "--learn-images",
    "2",
    "--batch",
    "2",
]


def filled(model, seed=0, scale=0.1):
    """Every parameter random: what starts at zero or one would hide a wrong reuse."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def unet(**more):
    return diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints as their pipelines save them, of a DDPM, an LDM and a DiT with its decoder."""
    root = tmp_path_factory.mktemp("checkpoints")
    scheduler = diffusers.DDPMScheduler(clip_sample=True, beta_end=0.015)
    diffusers.DDPMPipeline(filled(unet(), scale=0.02), scheduler).save_pretrained(root / "ddpm")
    vq = diffusers.VQModel(
        latent_channels=3, block_out_channels=(16, 32), norm_num_groups=8, num_vq_embeddings=16, sample_size=32, scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    latent = diffusers.DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    filled(unet(), seed=1, scale=0.02).save_pretrained(root / "ldm" / "unet")
    filled(vq, seed=2).save_pretrained(root / "ldm" / "vqvae")
    latent.save_pretrained(root / "ldm" / "scheduler")
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4, sample_size=8)
    filled(vae, seed=3).save_pretrained(root / "dit" / "vae")
    torch.manual_seed(4)
    model = filled(dit.DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10), seed=4)
    torch.save(model.state_dict(), root / "dit" / "DiT-tiny.pt")
    rng = np.random.default_rng(0)
    (root / "real").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (20, 18, 3), dtype=np.uint8)).save(root / "real" / f"{i}.png")
    return root


def pictures(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def run(*arguments):
    assert paper.main([str(a) for a in arguments]) == 0


def result(out, row):
    """(settings, rows by the first word of their key)."""
    document = json.loads((out / row / "result.json").read_text())
    return document, {r["key"].split()[0] if "variant" not in r else r["variant"]: r for r in document["rows"]}


@pytest.fixture(scope="module")
def ddpm(folders, tmp_path_factory):
    """One run of the row, with all that it measures."""
    out = tmp_path_factory.mktemp("ddpm")
    arguments = [
        "ddpm-church",
        "--weights",
        folders / "ddpm",
        *QUICK,
        "--budget",
        "0.6",
        "--real",
        folders / "real",
        "--out",
        out,
    ]
    run(*arguments, "--images", "5")
    return out, arguments


def test_the_original_pictures_are_the_pipelines(ddpm, folders):
    out, _ = ddpm
    model = diffusers.UNet2DModel.from_pretrained(folders / "ddpm" / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folders / "ddpm" / "scheduler", clip_sample=False)
    assert scheduler.config.beta_end == 0.015  # the folder's, not the row's, which decides about clipping alone
    pipe = diffusers.DDIMPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    expected = pipe(batch_size=5, generator=generators, num_inference_steps=4, output_type="np").images
    found = pictures(out / "ddpm-church" / "original")
    assert found.shape == (5, 16, 16, 3)
    assert np.abs(found - (expected * 255).round()).max() <= 1  # a batch of 5 rounds otherwise than of 2
    assert found.std() > 20
    assert np.abs(found[0].astype(int) - found[1]).mean() > 5


SCRIPT = """
import os, sys
from pathlib import Path
from benchmarks import paper
paper.main(sys.argv[1:])
out = Path(sys.argv[sys.argv.index("--out") + 1])
(out / ("process" + os.environ.get("RANK", "0"))).write_text(os.environ.get("WORLD_SIZE", "1"))
"""


def test_two_processes_come_to_the_same(folders, tmp_path):
    """The mask and the pictures of one; by torchrun, which ``accelerate launch`` is on GPUs (with --cpu it starts one)."""
    (tmp_path / "row.py").write_text(SCRIPT)
    row = ["ddpm-church", "--weights", folders / "ddpm", *QUICK, "--budget", "0.6", "--images", "5"]
    row[row.index("--seeds") : row.index("--seeds") + 2] = ["--seeds", "0", "1"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    for count, launch in ((1, []), (2, torchrun)):
        command = [sys.executable, *launch, tmp_path / "row.py", *row, "--out", tmp_path / str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([str(word) for word in command], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said = sorted(path.name + path.read_text() for path in (tmp_path / str(count)).glob("process*"))
        assert said == [f"process{rank}{count}" for rank in range(count)]
    one, two = (tmp_path / str(count) / "ddpm-church" for count in (1, 2))
    assert mc.Mask.load(one / "mask.json") == mc.Mask.load(two / "mask.json")
    assert np.array_equal(pictures(one / "masked"), pictures(two / "masked"))


def test_the_masked_pictures_are_the_executors(ddpm, folders):
    out, _ = ddpm
    mask = mc.Mask.load(out / "ddpm-church" / "mask.json")
    sampler = checkpoints.load(checkpoints.Request(_row("ddpm-church", 4), folders / "ddpm"))
    compute = mask.compute.copy()
    compute[0] = True
    order = [int(rule == "linear") for rule in mask.reuse]
    executor, drawn = Executor(sampler.denoiser, mask.blocks, compute, order, mask.log_snr, mask.reach), []
    for start in (0, 2, 4):
        executor.reset()
        steps = iter(range(4))
        called = lambda *args, s=steps, **kwargs: executor.step(next(s), *args, **kwargs)  # noqa: E731
        drawn.append(sampler.draw(called, range(start, start + 2), True))
    expected = (torch.cat(drawn)[:5] * 255).round().permute(0, 2, 3, 1).numpy()
    found = pictures(out / "ddpm-church" / "masked")
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, pictures(out / "ddpm-church" / "original"))


def _row(name, steps):
    return replace(checkpoints.find_row(name), steps=steps)


def test_cifar10_keeps_its_timesteps_with_the_folders_noise(folders):
    """The square roots of 0, 88, 355 and 800 are evenly spaced; the noise schedule is the folder's."""
    sampler = checkpoints.load(checkpoints.Request(_row("ddpm-cifar10", 4), folders / "ddpm"))
    called = []
    found = sampler.draw(lambda x, t, **more: (called.append(int(t)), sampler.denoiser(x, t, **more))[1], [3], False)
    assert called == [800, 355, 88, 0]
    assert sampler.scheduler.config.beta_end == 0.015
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.015, 1000, dtype=torch.float64), 0)
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(3))[None]
    with torch.no_grad():
        for t, after in zip(called, [alphas[355], alphas[88], alphas[0], torch.tensor(1.0)], strict=True):
            noise = sampler.denoiser(x, torch.tensor(t)).sample
            x = (after.sqrt() * (x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt() + (1 - after).sqrt() * noise).float()
    assert torch.allclose(found, x, atol=1e-3)


def test_the_columns(ddpm, folders):
    out, _ = ddpm
    settings, found = result(out, "ddpm-church")
    model = diffusers.UNet2DModel.from_pretrained(folders / "ddpm" / "unet")
    program = mc.trace(model, torch.randn(1, 3, 16, 16), torch.tensor(1))
    mask = mc.Mask.load(out / "ddpm-church" / "mask.json")
    speed = found["speed"]
    assert speed["gmacs"] == pytest.approx(program.macs / 1e9)
    assert speed["share"] == pytest.approx(mc.cost(program, mask).share)
    assert 0.5 < speed["share"] < 0.61  # its few blocks come no nearer to 0.6
    assert speed["gmacs_masked"] == pytest.approx(speed["gmacs"] * speed["share"])
    original, masked = (pictures(out / "ddpm-church" / name).astype(np.float64) for name in paper.VARIANTS)
    errors = np.square(original - masked).mean((1, 2, 3))
    assert found["likeness"]["psnr"] == pytest.approx(np.median(10 * np.log10(255**2 / errors)))
    real = [Image.open(folders / "real" / f"{i}.png").convert("RGB").crop((0, 1, 18, 19)).resize((16, 16), 3) for i in range(6)]
    expected = frechet_by_hand(np.stack([np.asarray(p) for p in real]), original)
    assert found["original"]["distance"] == pytest.approx(expected, rel=1e-2)
    text = (out / "ddpm-church" / "result.md").read_text()
    assert "Frechet distance (bundled classifier, not Inception)" in text
    assert f"| {speed['share']:.1%} |" in text
    assert "| DDIM, 4 steps |" in text
    assert settings["learning"]["budget"] == 0.6


def features_by_hand(pictures):
    """The bundled classifier's features of pictures [N, S, S, 3], resized to 32 x 32."""
    x = torch.from_numpy(np.asarray(pictures, dtype=np.float32)).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True).round().to(torch.uint8)
    with torch.no_grad():
        return load_features()(x).double().numpy()


def frechet_by_hand(a, b):
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)) (arXiv 1706.08500, Eq. 6)."""
    a, b = features_by_hand(a), features_by_hand(b)
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(one @ two).astype(complex)).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one) + np.trace(two) - 2 * roots.sum()


def test_statistics_of_real_pictures(tmp_path, folders, ddpm):
    """The statistics of a folder stand for the folder."""
    out, _ = ddpm
    samples = frechet.pictures_in(out / "ddpm-church" / "original")
    first = frechet.metric(None, "cpu")
    frechet.see_real(first, folders / "real", 16)
    seen = next(frechet.batches(frechet.pictures_in(folders / "real"), 16)).permute(0, 2, 3, 1)
    known = features_by_hand(seen)
    np.savez(tmp_path / "real.npz", mu=known.mean(0), sigma=np.cov(known, rowvar=False))
    second = frechet.metric(None, "cpu")
    frechet.see_real(second, tmp_path / "real.npz", 16)
    for metric in (first, second):
        frechet.see(metric, samples, real=False, size=16)
    assert second.compute().item() == pytest.approx(first.compute().item(), rel=1e-3)
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="statistics of 2048 features"):
        frechet.see_real(second, tmp_path / "inception.npz", 16)
    (tmp_path / "nothing.npz").write_text("nothing")
    with pytest.raises(ValueError, match="with 'mu' and 'sigma'"):
        frechet.see_real(second, tmp_path / "nothing.npz", 16)


def test_inceptions_features_from_a_file(tmp_path, monkeypatch):
    """Of torch-fidelity's network with random weights; the distance by hand from what that network returns."""
    with monkeypatch.context() as patched:  # it takes its weights from a file when it is made
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        patched.setattr(torch, "load", lambda *args, **kwargs: {})
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    draws, features = np.random.default_rng(0), []
    found = frechet.metric(tmp_path / "weights.pth", "cpu")
    for kind, bright in (("real", 255), ("made", 120)):
        (tmp_path / kind).mkdir()
        pictures = draws.integers(0, bright, (6, 32, 32, 3), dtype=np.uint8)
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / kind / f"{index}.png")
        (of,) = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        features.append(of.double().numpy())
    frechet.see_real(found, tmp_path / "real", 32)
    frechet.see(found, frechet.pictures_in(tmp_path / "made"), real=False, size=32)
    means = [of.mean(0) for of in features]
    one, two = ((of - mean) / 5**0.5 for of, mean in zip(features, means, strict=True))  # covariances are one.T @ one, ...
    roots = np.linalg.svd(one @ two.T, compute_uv=False).sum()  # of the eigenvalues of their product
    expected = ((means[0] - means[1]) ** 2).sum() + (one**2).sum() + (two**2).sum() - 2 * roots
    assert found.compute().item() == pytest.approx(expected, rel=1e-3)
    assert frechet.name(tmp_path / "weights.pth") == "FID"


def test_what_else_pictures_depend_on_is_told_apart(folders, tmp_path):
    """The decoder, the class embedder, text encoders; the scheduler's configuration; the real pictures."""

    def known(sampler):
        options = argparse.Namespace(
            mask=None, budget=0.5, method="search", reuse="auto", seeds=[0], passes=4, learn_images=2, heads=None, batch=2,
            dtype="float32", backend="eager", prompts=(),
        )  # fmt: skip
        found = paper.settings(sampler, options)
        assert json.loads(json.dumps(found)) == found
        return found

    def differing(one, other):
        return {name for name in one if one[name] != other[name]}

    first, again = (checkpoints.load(checkpoints.Request(_row("ldm-bedroom", 3), folders / "ldm")) for _ in range(2))
    before = known(first)
    assert known(again) == before
    with torch.no_grad():
        weight = again.beside["decoder"].decoder.conv_in.weight
        weight.copy_(weight.flip(0))  # of the same sum
    assert differing(known(again), before) == {"beside"}
    again.scheduler.register_to_config(beta_end=0.02)
    assert differing(known(again), before) == {"beside", "sampler"}
    assert paper.digest(torch.tensor([1.0, 2.0])) != paper.digest(torch.tensor([2.0, 1.0]))

    (tmp_path / "real").mkdir()
    shutil.copytree(folders / "real", tmp_path / "real", dirs_exist_ok=True)
    options = argparse.Namespace(real=tmp_path / "real", inception=None, images=2)
    key = paper.distance_key("masked", options)
    assert paper.distance_key("masked", options) == key
    shutil.copy(tmp_path / "real" / "1.png", tmp_path / "real" / "0.png")
    changed = paper.distance_key("masked", options)
    (tmp_path / "real" / "0.png").unlink()
    keys = {key, changed, paper.distance_key("masked", options)}
    for content in ("statistics", "others"):
        (tmp_path / "real.npz").write_text(content)
        keys.add(paper.distance_key("masked", argparse.Namespace(real=tmp_path / "real.npz", inception=None, images=2)))
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("device", "backend", "mode", "graphs"),
    [
        ("cuda:1", "inductor", "reduce-overhead", "auto"),
        ("cuda:1", "aot_eager", None, False),
        ("cpu", "inductor", None, False),
    ],
)
def test_both_are_compiled_alike(device, backend, mode, graphs, monkeypatch):
    """With CUDA graphs both, or neither: what torch.compile and optimize are asked for."""
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda model, **given: asked.setdefault("original", given))
    monkeypatch.setattr(mc, "optimize", lambda model, mask, **given: asked.setdefault("masked", given))
    made = paper.compiled_alike(None, None, argparse.Namespace(device=device, backend=backend))
    assert set(made) == set(paper.VARIANTS)
    assert asked["original"].get("mode") == mode
    assert asked["masked"]["cuda_graphs"] == graphs
    assert {given["backend"] for given in asked.values()} == {backend}


def test_an_interrupted_run_goes_on_to_the_same_pictures(ddpm, tmp_path, monkeypatch, capsys):
    out, arguments = ddpm
    arguments = [*arguments[:-1], tmp_path, "--images", "5"]
    (tmp_path / "ddpm-church").mkdir()
    shutil.copy(out / "ddpm-church" / "mask.json", tmp_path / "ddpm-church")  # learning goes on by itself: see test_learn
    monkeypatch.setattr(mc, "learn", None)
    encode, encoded = paper.png, []

    def stop(picture):
        encoded.append(picture)
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return encode(picture)

    monkeypatch.setattr(paper, "png", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert len(list(tmp_path.rglob("*.png"))) == 3
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(paper, "png", encode)
    run(*arguments)
    for name in paper.VARIANTS:
        folder = "ddpm-church/" + name
        assert np.array_equal(pictures(tmp_path / folder), pictures(out / folder))

    # All is there: nothing is drawn or measured again. More pictures begin with these; other settings do not mix.
    monkeypatch.setattr(paper, "speed", None)
    monkeypatch.setattr(paper, "png", None)
    run(*arguments)
    monkeypatch.setattr(paper, "png", encode)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    run(*arguments[:-1], "7")
    assert len(list(tmp_path.rglob("*.png"))) == 14
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(SystemExit, match="another batch, learning"):
        run(*arguments, "--batch", "3", "--mask", out / "ddpm-church" / "mask.json")
    assert all(path.read_bytes() == content for path, content in before.items())
    monkeypatch.setattr(
        paper, "speed", lambda *_: {"speedup": 1.0, "spread": 0.0, "original_ms_a_picture": 1.0, "masked_ms_a_picture": 1.0}
    )
    run(*arguments, "--batch", "3", "--mask", out / "ddpm-church" / "mask.json", "--fresh", "--no-original")
    assert len(list(tmp_path.rglob("*.png"))) == 5
    assert not (tmp_path / "ddpm-church" / "mask.json").exists()


def test_processes_divide_the_pictures(tmp_path):
    """Two processes of which each knows only what was there at the start: every batch is drawn once, by one of them."""
    drawn = []

    def draw(called, indices, decode):
        drawn.append((called, list(indices)))
        return torch.stack([torch.full((3, 2, 2), index / 255) for index in indices])

    class Alike(Processes):  # what the first process sees, in each
        def first(self, value):
            return [0, 4, 6, 8]

    sampler = checkpoints.Sampler(_row("ddpm-church", 4), None, None, draw)
    paper.draw_missing(sampler, "ours", tmp_path, 9, 2, Alike(0, 2))
    assert drawn == [("ours", [0, 1]), ("ours", [6, 7])]
    paper.draw_missing(sampler, "ours", tmp_path, 9, 2, Alike(1, 2))
    assert drawn[2:] == [("ours", [4, 5]), ("ours", [8, 9])]
    assert paper.missing_batches(tmp_path, 9, 2) == [2]
    paper.draw_missing(sampler, "ours", tmp_path, 9, 2, Processes())
    assert drawn[4:] == [("ours", [2, 3])]
    assert [picture[0, 0, 0] for picture in pictures(tmp_path)] == list(range(9))  # the tenth of the last batch is not kept


def test_pictures_to_learn_from_are_of_all_kinds():
    """Two passes of eight pictures: of 1000 classes, some in every quarter; of ten prompts, all; none is ever sampled."""
    passes = [paper.learned_from(seed, 8) for seed in (0, 1)]
    assert [len(found) for found in passes] == [8, 8]
    for found in passes:
        assert {index % 1000 // 250 for index in found} == {0, 1, 2, 3}
    both = [index for found in passes for index in found]
    assert len({index % 1000 for index in both}) == 16
    assert {index % 10 for index in both} == set(range(10))
    assert min(both) >= 10**9
    assert len({index for seed in range(50) for index in paper.learned_from(seed, 8)}) == 400


def test_dit_in_the_reference_layout(folders, tmp_path):
    """Against the model's own forward_with_cfg and the executor, in a loop of the scheduler's own."""
    program = mc.trace(dit.load(folders / "dit" / "DiT-tiny.pt", 2), torch.randn(2, 4, 8, 8), torch.ones(2), torch.arange(2))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    compute = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]], dtype=bool)
    mc.Mask(compute, blocks=program.names, timesteps=scheduler.timesteps).save(tmp_path / "given.json")
    given = ["--mask", tmp_path / "given.json", "--out", tmp_path]
    run("dit-256", "--weights", folders / "dit", *QUICK, "--heads", "2", "--images", "2", *given)
    model, masked = (dit.load(folders / "dit" / "DiT-tiny.pt", 2) for _ in range(2))
    vae = diffusers.AutoencoderKL.from_pretrained(folders / "dit" / "vae")
    executor = Executor(masked, program.names, compute)
    for name in paper.VARIANTS:
        x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
        for step, t in enumerate(scheduler.timesteps):
            if name == "masked":
                model.forward = lambda *args, s=step: executor.step(s, *args)
            with torch.no_grad():
                noise = model.forward_with_cfg(torch.cat([x, x]), t.expand(4), torch.tensor([0, 1, 10, 10]), 1.5)[:2, :4]
            x = scheduler.step(noise, t, x).prev_sample
        with torch.no_grad():
            expected = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        found = pictures(tmp_path / "dit-256" / name)
        assert np.abs(found - (expected * 255).round().permute(0, 2, 3, 1).numpy()).max() <= 1
        assert found.std() > 5
    speed = result(tmp_path, "dit-256")[1]["speed"]
    assert speed["gmacs"] == pytest.approx(program.macs / 2 / 1e9)  # of one picture and one half of guidance
    assert not [r for r in result(tmp_path, "dit-256")[1] if r == "original"]  # no real pictures, no distance
    assert "| - / - |" in (tmp_path / "dit-256" / "result.md").read_text()


def test_ldm_with_a_sampler_that_adds_noise(folders):
    """eta 1: the pipeline's own noise, picture by picture."""
    sampler = checkpoints.load(checkpoints.Request(_row("ldm-bedroom", 3), folders / "ldm"))
    assert sampler.row.eta == 1
    found = sampler.draw(sampler.denoiser, [4, 7], True)
    model = diffusers.UNet2DModel.from_pretrained(folders / "ldm" / "unet")
    vq = diffusers.VQModel.from_pretrained(folders / "ldm" / "vqvae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folders / "ldm" / "scheduler")
    pipe = diffusers.DDIMPipeline(model, scheduler)
    pipe.scheduler.set_timesteps(3)
    generators = [torch.Generator().manual_seed(i) for i in (4, 7)]
    x = torch.cat([torch.randn(1, 3, 16, 16, generator=g) for g in generators])
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(model(x, t).sample, t, x, eta=1.0, generator=generators).prev_sample
        expected = (vq.decode(x).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.shape == (2, 3, 32, 32)
    alone = sampler.draw(sampler.denoiser, [7], True)
    assert torch.allclose(alone[0], found[1], atol=1e-5)


#: CompVis's names of a ResNet block's parts, and of the autoencoder's attention
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
RESNET["conv_shortcut"] = "skip_connection"
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def compvis_unet(name):
    """diffusers' name of a U-Net's weight in CompVis's checkpoint; two ResNet blocks a level."""

    def resnet(rest):
        for ours, theirs in RESNET.items():
            rest = rest.replace(ours, theirs)
        return rest

    for pattern, place in (
        (r"down_blocks\.(\d+)\.resnets\.(\d+)\.(.*)", lambda i, j, r: f"input_blocks.{1 + 3 * int(i) + int(j)}.0.{resnet(r)}"),
        (r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", lambda i, j, r: f"input_blocks.{1 + 3 * int(i) + int(j)}.1.{r}"),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", lambda i, r: f"input_blocks.{3 + 3 * int(i)}.0.op.{r}"),
        (r"mid_block\.resnets\.(\d)\.(.*)", lambda j, r: f"middle_block.{2 * int(j)}.{resnet(r)}"),
        (r"mid_block\.attentions\.0\.(.*)", lambda r: f"middle_block.1.{r}"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)\.(.*)", lambda i, j, r: f"output_blocks.{3 * int(i) + int(j)}.0.{resnet(r)}"),
        (r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", lambda i, j, r: f"output_blocks.{3 * int(i) + int(j)}.1.{r}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", lambda i, r: f"output_blocks.{3 * int(i) + 2}.2.{r}"),
        (r"time_embedding\.linear_(\d)\.(.*)", lambda i, r: f"time_embed.{2 * int(i) - 2}.{r}"),
        (r"conv_in\.(.*)", lambda r: f"input_blocks.0.0.{r}"),
        (r"conv_norm_out\.(.*)", lambda r: f"out.0.{r}"),
        (r"conv_out\.(.*)", lambda r: f"out.2.{r}"),
    ):  # fmt: skip
        if match := re.fullmatch(pattern, name):
            return place(*match.groups())
    raise KeyError(name)


def compvis_autoencoder(name, levels=2):
    name = (
        name.replace("conv_shortcut", "nin_shortcut")
        .replace("mid_block.attentions.0", "mid.attn_1")
        .replace("conv_norm_out", "norm_out")
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    for ours, theirs in ATTENTION.items() if "attn_1" in name else ():
        name = name.replace(ours, theirs)
    return name


def test_compvis_checkpoints_become_folders(folders, tmp_path, monkeypatch, capsys):
    """A checkpoint with CompVis's names and a trainer's class in it, as a folder that the row loads and samples from."""

    def network():
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12,
        )  # fmt: skip

    model, vq = filled(network(), scale=0.05), diffusers.VQModel.from_pretrained(folders / "ldm" / "vqvae")
    table = torch.randn(6, 12)
    saved = {f"model.diffusion_model.{compvis_unet(n)}": v for n, v in model.state_dict().items()}
    for name, value in vq.state_dict().items():
        matrix = "attentions" in name and name.endswith("weight") and value.dim() == 2
        saved[f"first_stage_model.{compvis_autoencoder(name)}"] = value[:, :, None, None] if matrix else value
    saved["cond_stage_model.embedding.weight"] = table
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save({"state_dict": saved, "callbacks": {module.ModelCheckpoint: {"best": 1.0}}}, tmp_path / "model.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)

    blank = diffusers.VQModel.from_config(vq.config)
    read = weights.read(tmp_path / "model.ckpt")
    assert convert_ldm.row_of(read, tmp_path) == "ldm-4-g"
    convert_ldm.convert(read, tmp_path / "folder", "ldm-4-g", network(), blank)
    sampler = checkpoints.load(checkpoints.Request(_row("ldm-4-g", 2), tmp_path / "folder"))
    assert all(torch.equal(v, sampler.denoiser.state_dict()[n]) for n, v in model.state_dict().items())
    assert torch.equal(load_file(tmp_path / "folder" / "class_embedder.safetensors")["weight"], table)
    assert torch.equal(sampler.beside["class embedder"], table)
    assert set(sampler.beside) == {"class embedder", "decoder"}

    found = sampler.draw(sampler.denoiser, [3, 9], True)
    x = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (3, 9)])
    scheduler = models.row_named("ldm-4-g").scheduler()  # see test_models
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [501, 1]
    with torch.no_grad():
        for t in scheduler.timesteps:
            of_class = model(x, t, table[[3, 4]][:, None]).sample  # 9 modulo five classes
            of_none = model(x, t, table[[5, 5]][:, None]).sample
            x = scheduler.step(of_none + 1.5 * (of_class - of_none), t, x).prev_sample
        expected = (vq.decode(x).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(found, expected, atol=1e-4)
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.ckpt")
    assert convert_ldm.main([str(tmp_path / "other.ckpt"), str(tmp_path / "none")]) == 1
    assert "other.ckpt is no LDM of CompVis's: it has no 'model.diffusion_model" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_compvis_checkpoints_without_conditions(folders, tmp_path):
    """The average of training is taken; its attention, by CompVis's formula (QKVAttentionLegacy), is the folder's."""
    network = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=2, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    model, vq = filled(network), diffusers.VQModel.from_pretrained(folders / "ldm" / "vqvae")
    averaged = {}
    for name, value in model.state_dict().items():
        place = compvis_unet(name)
        if ".attentions." not in name:
            averaged[place] = value
        elif ".to_v." in name:
            place = place.replace("to_v", "qkv")
            averaged[place] = torch.randn(3 * len(value), len(value), 1) if "weight" in name else torch.randn(3 * len(value))
        elif ".to_out." in name:
            averaged[place.replace("to_out.0", "proj_out")] = value[:, :, None] if "weight" in name else value
        elif ".group_norm." in name:
            averaged[place.replace("group_norm", "norm")] = value
    found = {f"model.diffusion_model.{name}": torch.randn_like(value) for name, value in averaged.items()}
    found |= {"model_ema.diffusion_model" + name.replace(".", ""): value for name, value in averaged.items()}
    for name, value in vq.state_dict().items():
        matrix = "attentions" in name and name.endswith("weight") and value.dim() == 2
        found[f"first_stage_model.{compvis_autoencoder(name)}"] = value[:, :, None, None] if matrix else value
    assert convert_ldm.row_of(found, tmp_path) == "ldm-bedroom"
    blank = diffusers.UNet2DModel.from_config(network.config)
    convert_ldm.convert(found, tmp_path, "ldm-bedroom", blank, diffusers.VQModel.from_config(vq.config))
    sampler = checkpoints.load(checkpoints.Request(_row("ldm-bedroom", 3), tmp_path))
    assert sampler.scheduler.config.steps_offset == 1
    loaded = sampler.denoiser.state_dict()
    same = [name for name in loaded if not re.search(r"attentions.*to_[qkv]", name)]
    assert all(torch.equal(loaded[name], model.state_dict()[name]) for name in same)

    x = torch.randn(2, 32, 4, 4)
    flat = torch.nn.functional.group_norm(
        x, 8, averaged["middle_block.1.norm.weight"], averaged["middle_block.1.norm.bias"], 1e-5
    )
    qkv = torch.nn.functional.conv1d(
        flat.flatten(2), averaged["middle_block.1.qkv.weight"], averaged["middle_block.1.qkv.bias"]
    )
    q, k, v = qkv.reshape(2 * 4, 3 * 8, 16).split(8, dim=1)  # four heads in the batch
    weight = (torch.einsum("bct,bcs->bts", q, k) / 8**0.5).softmax(-1)
    mixed = torch.einsum("bts,bcs->bct", weight, v).reshape(2, 32, 16)
    out = torch.nn.functional.conv1d(
        mixed, averaged["middle_block.1.proj_out.weight"], averaged["middle_block.1.proj_out.bias"]
    )
    with torch.no_grad():
        assert torch.allclose(sampler.denoiser.mid_block.attentions[0](x), x + out.reshape(x.shape), atol=1e-4)


def test_the_bundled_denoisers(tmp_path, capsys):
    """The row runs without --weights; guidance, which it does not have, is refused."""
    blocks = [f"transformer_blocks.{i}.{part}" for i in range(8) for part in ("attn1", "ff")]
    timesteps = checkpoints.load(checkpoints.Request(_row("reference-dit", 3), tmp_path)).scheduler.timesteps
    mc.Mask([[True] * 16, [False] * 16, [True] * 16], blocks=blocks, timesteps=timesteps).save(tmp_path / "given.json")
    given = ["reference-dit", *QUICK, "--steps", "3", "--images", "2", "--mask", tmp_path / "given.json", "--out", tmp_path]
    assert paper.main([str(a) for a in [*given, "--guidance", "2"]]) == 1
    assert paper.main([str(a) for a in [*given, "--steps", "4"]]) == 1
    assert "is a mask for 3 timesteps" in capsys.readouterr().err
    run(*given, "--no-original")
    found = result(tmp_path, "reference-dit")[1]
    assert found["speed"]["share"] == pytest.approx(2 / 3, abs=0.01)
    assert set(found) == {"speed"}
    assert len(pictures(tmp_path / "reference-dit" / "masked")) == 2


LETTERS = string.ascii_lowercase


def stable_diffusion():
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    text = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8,
        bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=8)
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), text_encoder=transformers.CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=filled(model),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1), safety_checker=None, feature_extractor=None,
    )  # fmt: skip


def pixart():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *((letter, -2.0) for letter in LETTERS)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    text = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = diffusers.PixArtTransformer2DModel(
        sample_size=32, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, caption_channels=16,
        cross_attention_dim=16,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        vae=_vae(levels=4),  # the pipeline knows no pictures below 256 x 256
        text_encoder=transformers.T5EncoderModel(text).eval(), tokenizer=tokenizer, transformer=filled(model),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def _vae(levels=1):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels, norm_num_groups=8, latent_channels=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip
    return filled(vae, seed=3)


@pytest.mark.parametrize("make", [stable_diffusion, pixart])
def test_text_to_image(make, tmp_path):
    """The pipeline in the folder, run by itself; the prompts in turn, and the denoiser that is drawn with is the one given."""
    torch.manual_seed(0)
    made = make()
    made.save_pretrained(tmp_path)
    row = _row("pixart" if make is pixart else "sd15", 3)
    sampler = checkpoints.load(checkpoints.Request(row, tmp_path, prompts=("a cat", "dogs")))
    slot = "transformer" if make is pixart else "unet"
    made.set_progress_bar_config(disable=True)
    decode, asked = make is stable_diffusion, []  # PixArt's pictures are never below 256 x 256
    other = type(sampler.denoiser).from_config(sampler.denoiser.config).eval()
    other.load_state_dict({name: value * 1.1 for name, value in sampler.denoiser.state_dict().items()})
    other.register_forward_hook(lambda *_: asked.append(1))
    found = sampler.draw(other, [2, 3], decode)
    assert len(asked) == len(sampler.scheduler.timesteps)
    setattr(made, slot, other)
    generators = [torch.Generator().manual_seed(i) for i in (2, 3)]
    expected = made(
        ["a cat", "dogs"], generator=generators, num_inference_steps=3, guidance_scale=row.guidance,
        output_type="pt" if decode else "latent",
    ).images  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.std() > 0.01
    assert set(sampler.beside) == {"vae", "text_encoder"}


def test_a_text_to_image_row(tmp_path):
    torch.manual_seed(0)
    pixart().save_pretrained(tmp_path / "pixart")
    (tmp_path / "prompts.txt").write_text("a cat\n\ndogs\n")
    sampler = checkpoints.load(checkpoints.Request(_row("pixart", 4), tmp_path / "pixart", prompts=("a",)))
    blocks = [f"transformer_blocks.{i}.{part}" for i in range(2) for part in ("attn1", "attn2", "ff")]
    compute = [[step != 2] * 6 for step in range(4)]
    mc.Mask(compute, blocks=blocks, timesteps=sampler.scheduler.timesteps).save(tmp_path / "given.json")
    given = [
        *QUICK,
        "--images",
        "2",
        "--mask",
        tmp_path / "given.json",
        "--prompts",
        tmp_path / "prompts.txt",
        "--out",
        tmp_path / "out",
    ]
    run("pixart", "--weights", tmp_path / "pixart", *given, "--no-original")
    assert pictures(tmp_path / "out" / "pixart" / "masked").shape == (2, 256, 256, 3)
    fast = mc.optimize(sampler.denoiser, mc.Mask.load(tmp_path / "given.json"), backend="eager")
    assert not torch.equal(sampler.draw(fast, [0, 1], False), sampler.draw(sampler.denoiser, [0, 1], False))
    assert 0.7 < result(tmp_path / "out", "pixart")[1]["speed"]["share"] < 0.85


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ddpm-cifar10"], "needs --weights, a folder with its checkpoint: google/ddpm-cifar10-32"),
        (["ddpm-cifar10", "--weights", "nowhere"], "no folder nowhere"),
        (["ddpm-cifar10", "--weights", "real"], "has no unet"),
        (["ldm-4-g", "--weights", "ldm"], "is of a UNet2DModel, and the row ldm-4-g needs a UNet2DConditionModel"),
        (["ldm-bedroom", "--weights", "ddpm"], "has no decoder"),
        (["dit-256", "--weights", "ddpm"], "must hold one DiT checkpoint (.pt or .safetensors) and has none"),
        (["dit-256", "--weights", "dit"], "how many attention heads a DiT 32 wide has"),
        (["sd15", "--weights", "ldm"], "holds no pipeline"),
        (["sd15", "--weights", "ddpm"], "needs prompts"),
        (["ddpm-cifar10", "--weights", "ddpm", "--real", "ldm"], "no pictures (.png"),
        (["ddpm-cifar10", "--weights", "ddpm", "--real", "real/0.png"], "with 'mu' and 'sigma'"),
        (["ddpm-cifar10", "--weights", "ddpm", "--inception", "real/0.png"], "--inception needs --real"),
        (["ddpm-cifar10", "--weights", "ddpm", "--real", "real", "--inception", "absent.pth"], "no file absent.pth"),
    ],
)
def test_what_is_missing_is_said(arguments, said, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    assert paper.main([*arguments, *QUICK, "--images", "2", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
