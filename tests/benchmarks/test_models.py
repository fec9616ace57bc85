"""The paper's denoisers at real size, on the meta device, against the published figures and known architectures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import maskcompile as mc
from benchmarks import models

#: GMACs a step of one picture, and whether the products within attention are among them: Diff-Pruning (arXiv 2305.10924),
#: DeepCache (arXiv 2312.00858), DiT (arXiv 2212.09748)
PUBLISHED = {
    "ddpm-cifar10": (6.1, False), "ddpm-bedroom": (248.7, False), "ddpm-church": (248.7, False), "ldm-4-g": (99.82, False),
    "dit-256": (118.64, True), "dit-512": (524.6, True),
}  # fmt: skip
#: millions of parameters, by the papers of DDPM, LDM and DiT, and the model cards of PixArt-alpha ("0.6B") and Stable Diffusion
PARAMETERS = {
    "ddpm-cifar10": 35.7, "ddpm-bedroom": 114, "ddpm-church": 114, "ldm-bedroom": 274, "ldm-4-g": 400, "dit-256": 675, "dit-512": 675,
    "pixart": 611, "sd15": 860,
}  # fmt: skip
TRACED = ("ddpm-cifar10",)


@pytest.fixture(scope="module")
def counted():
    """row -> (GMACs for one picture, those within attention, parameters), without a capture."""
    found = {}
    for row in models.ROWS:
        if (same := next((r for r in models.ROWS if r.build is row.build and r.name in found), None)) is not None:
            found[row.name] = found[same.name]
            continue
        model, inputs = models.one_picture(row)
        halves = 2 if row.guidance else 1
        found[row.name] = *(n / halves for n in models.count(model, inputs)), sum(p.numel() for p in model.parameters())
    return found


@pytest.fixture(scope="module")
def traced():
    return {e.name: e for e in models.entries(tuple(models.row_named(name) for name in TRACED))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_macs(name, counted):
    figure, products = PUBLISHED[name]
    total, within, _ = counted[name]
    assert total - (0 if products else within) == pytest.approx(figure, rel=0.03)
    row = models.row_named(name)
    assert (row.gmacs, row.products) == PUBLISHED[name]


@pytest.mark.parametrize("row", models.ROWS, ids=lambda row: row.name)
def test_parameters(row, counted):
    assert counted[row.name][2] / 1e6 == pytest.approx(PARAMETERS[row.name], rel=0.01)


def test_attention_by_hand(counted):
    """DiT-XL/2: 28 blocks of 256 tokens 1152 wide, q k^T and the product with v. DDPM on CIFAR-10: six of 256 tokens, 256 wide,
    and one of 16 tokens in the middle."""
    assert counted["dit-256"][1] == pytest.approx(28 * 2 * 256 * 256 * 1152 / 1e9)
    assert counted["ddpm-cifar10"][1] == pytest.approx((5 * 2 * 256**2 * 256 + 2 * 16**2 * 256) / 1e9)


def test_blocks_and_macs_of_the_capture(traced, counted):
    """The capture counts as torch's counter does; two down, one in the middle and three up have attention in the U-Net."""
    for name, e in traced.items():
        assert e.gmacs == pytest.approx(counted[name][0], rel=1e-6)
        assert e.without_products == pytest.approx(counted[name][0] - counted[name][1], rel=1e-6)
        assert abs(e.off) < 0.03
        assert e.needed < 0.01
    assert traced["ddpm-cifar10"].kinds == {"attention": 6, "convolution": 8 + 2 + 12}


@pytest.mark.parametrize("row", models.ROWS, ids=lambda row: row.name)
def test_schedulers(row):
    scheduler = row.scheduler()
    assert scheduler.timesteps.device.type == "cpu"
    assert len(set(scheduler.timesteps.tolist())) == {"ddpm-cifar10": 96}.get(row.name, row.steps)
    assert len(mc.log_snr(scheduler)) == len(set(scheduler.timesteps.tolist()))


def _run(scheduler, eta=0.0):
    """A sampling run with noise that depends on the sample and the timestep, float64: the samples after each step."""
    x, found = torch.linspace(-2, 2, 8, dtype=torch.float64), []
    for t in scheduler.timesteps:
        drawn = {"eta": eta, "variance_noise": (x * 7).sin()} if eta else {}
        x = scheduler.step(predicted(x, int(t)), t, x, return_dict=False, **drawn)[0]
        found.append(x)
    return torch.stack(found)


def predicted(x, t):
    return (3 * x + t / 100).cos()


def by_hand(alphas, eta):
    """DDIM (arXiv 2010.02502, Eq. 12) by (timestep, cumulative alpha, the one to come to) in turn, without clipping."""
    x, found = torch.linspace(-2, 2, 8, dtype=torch.float64), []
    for t, a, b in alphas:
        noise, sigma = predicted(x, t), eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
        drawn = sigma * (x * 7).sin()
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * noise) / np.sqrt(a) + np.sqrt(1 - b - sigma**2) * noise + drawn
        found.append(x)
    return torch.stack(found)


@pytest.mark.parametrize("name", ["ldm-bedroom", "ldm-4-g"])
def test_latent_rows_sample_as_compvis(name):
    """Its make_ddim_timesteps and make_ddim_sampling_parameters: t = 1 + i * 1000 / S, alphas_prev[0] = alphacums[0]."""
    row = models.row_named(name)
    cumulative = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    timesteps = np.arange(0, 1000, 1000 // row.steps) + 1
    before = np.concatenate([cumulative[:1], cumulative[timesteps[:-1]]])
    scheduler = row.scheduler()
    assert scheduler.timesteps.tolist() == timesteps[::-1].tolist()
    expected = by_hand(list(zip(timesteps, cumulative[timesteps], before, strict=True))[::-1], row.eta)
    assert torch.allclose(_run(scheduler, row.eta), expected, rtol=1e-3, atol=1e-4)


def test_cifar10_has_quadratic_timesteps():
    """The papers' (--skip_type quad): all hundred calls of their loop, with those that repeat a timestep, come to the same."""
    cumulative = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])  # at timestep -1, 0, ...
    timesteps = [int(t) for t in np.linspace(0, np.sqrt(1000 * 0.8), 100) ** 2]
    assert (len(set(timesteps)), timesteps[:4], timesteps[-1]) == (96, [0, 0, 0, 0], 800)
    turn = [(t, cumulative[t + 1], cumulative[u + 1]) for t, u in zip(timesteps, [-1, *timesteps[:-1]], strict=True)]
    scheduler = models.row_named("ddpm-cifar10").scheduler()
    assert scheduler.timesteps.tolist() == sorted(set(timesteps), reverse=True)
    found, expected = _run(scheduler), by_hand(turn[::-1], 0.0)
    assert torch.allclose(found[0], expected[0], rtol=1e-4)
    assert torch.allclose(found[-1], expected[-1], rtol=1e-3, atol=1e-4)
    assert expected[-1].abs().max() > 1  # nothing is clipped
    with pytest.raises(ValueError, match="eta 0"):
        scheduler.step(found[0], 800, found[0], eta=1.0)


@pytest.mark.parametrize("row", models.ROWS, ids=lambda row: row.name)
def test_guided_pairs(row):
    """What guidance calls the denoiser with: two of each picture in one batch."""
    with torch.device("meta"):
        args, kwargs = row.inputs(row.build(), 3)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dim()]
    assert {len(t) for t in tensors} == {6 if row.guidance else 3}


def test_the_command(tmp_path, monkeypatch, capsys, traced):
    monkeypatch.setattr(models, "entries", lambda rows: [traced[row.name] for row in rows])
    models.main(["--rows", *TRACED, "--out", str(tmp_path)])
    text = (tmp_path / "models.md").read_text()
    assert "| **6.05** | 6.1 | -0.75% |" in text
    assert text in capsys.readouterr().out
    assert [row["blocks"] for row in json.loads((tmp_path / "models.json").read_text())["rows"]] == [28]
    with pytest.raises(ValueError, match="no row 'dit'; there are ddpm-cifar10"):
        models.row_named("dit")
