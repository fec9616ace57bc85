"""Import of L2C's routers, against their package's rule, published conversions and figures."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import maskcompile as mc
from tests.denoisers import denoiser, tensors_of

DATA = Path(__file__).parents[1] / "data"


@cache
def dit_xl_2():
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(
            sample_size=32, num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
            patch_size=2, num_embeds_ada_norm=1000,
        ).eval()  # fmt: skip
        z, t = torch.empty(1, 4, 32, 32), torch.empty(1, dtype=torch.int64)
    return mc.trace(model, z, t, class_labels=t)


@cache
def tiny(name="dit"):
    case = denoiser(name)
    args, kwargs = case.inputs(2, 901, 0)
    return mc.trace(case.model, *args, **kwargs)


@pytest.mark.parametrize(("steps", "share", "speed_up"), [(20, 0.78, 1.285), (50, 0.76, 1.311)])
def test_published_routers(steps, share, speed_up):
    """Layers computed, and MACs of the whole run without and with them; the measured speed-ups of the paper are 1.27 and 1.30."""
    program = dit_xl_2()
    mask = mc.schedules.l2c(program, range(steps - 1, -1, -1), DATA / f"l2c_dit_xl_2_ddim{steps}.json")
    assert mask.compute.mean() == pytest.approx(share, abs=0.005)
    assert 1 / mc.cost(program, mask).share == pytest.approx(speed_up, abs=0.001)
    assert mask.compute[0].all()
    assert mask.compute[::2].all()


def test_the_conversion_that_smoothcache_publishes():
    """Roblox's package ships the 50-step router as a schedule of its own format: the same decisions, layer by layer."""
    program, timesteps = dit_xl_2(), range(49, -1, -1)
    ours = mc.schedules.l2c(program, timesteps, DATA / "l2c_dit_xl_2_ddim50.json")
    theirs = mc.schedules.smoothcache_file(
        program, timesteps, DATA / "smoothcache-50-N-2-l2c.json", names={"attn": "attn1", "mlp": "ff"}
    )
    assert np.array_equal(ours.compute, theirs.compute)
    assert not ours.compute.all()


@torch.no_grad()
def package_run(model, rank, inputs):
    """L2C's inference on the reference layout, re-derived: features are forgotten before odd indices, and reused by rank."""
    kept, calls = {}, []

    def layer(index, module):
        forward = module.forward

        def routed(*args):
            if index in kept and index not in rank[step]:
                return kept[index]
            calls.append((step, index))
            kept[index] = forward(*args)
            return kept[index]

        return routed

    layers = [part for block in model.blocks for part in (block.attn, block.mlp)]
    for index, module in enumerate(layers):
        module.forward = layer(index, module)
    results = []
    try:
        for step, (args, kwargs) in zip(range(len(inputs) - 1, -1, -1), inputs, strict=True):
            if step % 2 == 1:
                kept.clear()
            results.append(model(*args, **kwargs))
    finally:
        for module in layers:
            del module.forward
    return results, calls


@pytest.mark.parametrize("steps", [8, 7])
def test_a_run_is_that_of_the_package(steps):
    case = denoiser("timm_dit")
    timesteps = [100 * (steps - i) for i in range(steps)]
    scores = torch.rand(steps, 4, generator=torch.Generator().manual_seed(steps))
    rank = {k: set(range(4)) if k % 2 else set(np.flatnonzero(scores[k] > 0.5)) for k in range(steps)}
    program = tiny("timm_dit")
    mask = mc.schedules.l2c(program, timesteps, scores, threshold=0.5)
    inputs = [case.inputs(2, t, i) for i, t in enumerate(timesteps)]
    expected, calls = package_run(case.model, rank, inputs)
    assert sorted((steps - 1 - i, j) for i, j in np.argwhere(mask.compute)) == sorted(calls)
    assert len(calls) < 4 * steps
    fast = mc.optimize(case.model, mask, backend="eager")
    for (args, kwargs), theirs in zip(inputs, expected, strict=True):
        assert torch.equal(tensors_of(fast(*args, **kwargs))[0], theirs)


def test_router_formats(tmp_path):
    program, timesteps = tiny(), [3, 2, 1, 0]
    scores = np.array([[0.2, 0.0, 0.9, 0.1], [0.0] * 4, [0.0, 0.5, 0.05, 0.11], [0.0] * 4])
    mask = mc.schedules.l2c(program, timesteps, scores)
    assert mask.compute.tolist() == [[True] * 4, [False, True, False, True], [True] * 4, [True, False, True, False]]
    rows = [list(scores[0]), None, list(scores[2]), None]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "router.json").write_text(json.dumps({"scores": rows}))
    (tmp_path / "router.pt").write_bytes(b"\x80\x04pickle")
    for router in (torch.from_numpy(scores), rows, tmp_path / "list.json", str(tmp_path / "router.json")):
        assert mc.schedules.l2c(program, timesteps, router) == mask
    wrong = [
        ("a pickle is for you to load", timesteps, tmp_path / "router.pt"),
        ("learned for 4 steps; got 3", [2, 1, 0], scores),
        ("the denoiser has 4 layers", timesteps, scores[:, :2]),
        ("sigmoid of its logits", timesteps, scores * 5 - 1),
        (r"scores \[steps, layers\]", timesteps, np.zeros(4)),
    ]
    for message, steps, router in wrong:
        with pytest.raises(mc.MaskError, match=message):
            mc.schedules.l2c(program, steps, router)
    with pytest.raises(mc.MaskError, match="attention and MLP in turn"):
        mc.schedules.l2c(tiny("pixart"), timesteps, scores)
