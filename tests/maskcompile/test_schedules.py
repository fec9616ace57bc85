"""Published schedules and accounting, against figures and definitions that are not ours."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import maskcompile as mc
from tests.denoisers import denoiser


def trace(name):
    case = denoiser(name)
    args, kwargs = case.inputs(2, case.timesteps[0], 0)
    return mc.trace(case.model, *args, **kwargs)


def test_default_blocks():
    """ResNet and attention blocks in UNets; attention and feed-forward in transformers; never embeddings or norms."""
    unet = {b.name: b.kind for b in trace("unet2d").blocks}
    assert unet == {
        **{f"down_blocks.{i}.resnets.0": "convolution" for i in range(2)},
        **{f"mid_block.resnets.{i}": "convolution" for i in range(2)},
        **{f"up_blocks.{i}.resnets.{j}": "convolution" for i in range(2) for j in range(2)},
        **dict.fromkeys(("down_blocks.1.attentions.0", "mid_block.attentions.0"), "attention"),
        **{f"up_blocks.0.attentions.{j}": "attention" for j in range(2)},
    }
    text = {b.name: b.kind for b in trace("unet2d_condition").blocks}
    assert text["down_blocks.0.attentions.0"] == text["mid_block.attentions.0"] == "attention"
    assert not [name for name in text if "transformer_blocks" in name or "time" in name]
    assert {b.name: b.kind for b in trace("dit").blocks} == {
        f"transformer_blocks.{i}.{part}": kind
        for i in range(2)
        for part, kind in (("attn1", "attention"), ("ff", "feed_forward"))
    }
    assert [b.name for b in trace("timm_dit").blocks] == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert [b.name for b in trace("pixart").blocks][:3] == [f"transformer_blocks.0.{p}" for p in ("attn1", "attn2", "ff")]
    sd3 = {b.name: b for b in trace("sd3").blocks}
    assert set(sd3) == {f"transformer_blocks.{i}.{p}" for i in range(2) for p in ("attn", "ff", "ff_context")} - {
        "transformer_blocks.1.ff_context"  # the last joint block has no text branch
    }
    assert len(sd3["transformer_blocks.0.attn"].outputs) == 2
    flux = [b.name for b in trace("flux").blocks]
    # Attention and MLP run in parallel inside a single-stream block: the block is the unit.
    assert [n for n in flux if n.startswith("single")] == ["single_transformer_blocks.0", "single_transformer_blocks.1"]


def test_blocks_are_the_users_to_choose():
    case = denoiser("unet2d")
    args, kwargs = case.inputs(2, 901, 0)
    by_pattern = mc.trace(case.model, *args, blocks=["**.attentions.*"], **kwargs).names
    assert "down_blocks.1.attentions.0" in by_pattern
    assert "mid_block.attentions.0" in by_pattern
    assert not [name for name in by_pattern if name.count(".") > 3]
    by_type = mc.trace(case.model, *args, blocks=[type(case.model.mid_block)], **kwargs).names
    assert by_type == ("mid_block",)
    by_callable = mc.trace(case.model, *args, blocks=lambda name, module: name == "conv_in", **kwargs).names
    assert by_callable == ("conv_in",)
    with pytest.raises(ValueError, match=r"'nothing\.\*' takes no module of UNet2DModel"):
        mc.trace(case.model, *args, blocks=["nothing.*"], **kwargs)


def test_dependencies_of_the_unet():
    graph = trace("unet2d").dependencies
    assert set(graph.predecessors("output")) == {"up_blocks.1.resnets.1"}
    # The last up block reads the skip connection of conv_in, and with it the sample itself.
    assert set(graph.predecessors("up_blocks.1.resnets.1")) == {"up_blocks.1.resnets.0", "input:sample", "input:timestep"}
    assert set(graph.predecessors("mid_block.attentions.0")) == {"mid_block.resnets.0"}
    assert graph.nodes["mid_block.attentions.0"]["kind"] == "attention"
    assert graph.nodes["input:sample"]["kind"] == "input"
    assert graph.nodes["mid_block.attentions.0"]["bytes"] == 2 * 32 * 8 * 8 * 4


def test_uniform_computes_every_nth_step():
    program = trace("dit")
    mask = mc.schedules.uniform(program, range(99, -1, -1), 3)
    assert mask.compute.shape == (100, 4)
    assert [bool(row.all()) for row in mask.compute] == [i % 3 == 0 for i in range(100)]
    assert not mask.compute[1].any()
    assert mask.denoiser == "DiTTransformer2DModel"
    with pytest.raises(mc.MaskError, match="interval must be a whole number, at least 1"):
        mc.schedules.uniform(program, [1], 0)
    with pytest.raises(mc.MaskError, match=r"whole number, at least 1; got 2\.5"):
        mc.schedules.uniform(program, [2, 1], 2.5)


def test_warm_up_steps_come_before_the_intervals():
    dit, unet = trace("dit"), trace("unet2d")
    timesteps = range(12, 0, -1)
    log_snr = [float(i) for i in range(12)]
    mask = mc.schedules.uniform(dit, timesteps, 3, warmup=4, reuse="linear", log_snr=log_snr)
    assert [step for step, row in enumerate(mask.compute) if row.all()] == [0, 1, 2, 3, 6, 9]
    assert set(mask.reuse) == {"linear"}
    assert mask.log_snr == tuple(log_snr)
    assert mask.provenance["warmup"] == 4
    deep = mc.schedules.deepcache(unet, timesteps, 3, warmup=4)
    assert [step for step, row in enumerate(deep.compute) if row.all()] == [0, 1, 2, 3, 6, 9]
    assert set(deep.reuse) == {"hold"}
    with pytest.raises(mc.MaskError, match="warmup must be at least 1"):
        mc.schedules.uniform(dit, timesteps, 3, warmup=0)


def test_every_schedule_takes_a_rule_a_clock_and_a_warm_up():
    schedules, dit, pixart, unet = mc.schedules, trace("dit"), trace("pixart"), trace("unet2d")
    timesteps, log_snr = tuple(range(900, 0, -90)), [float(i) for i in range(10)]
    changes = schedules.Changes(dit.names, timesteps, np.zeros((3, 10, 4)))
    calls = {
        schedules.uniform: (dit, timesteps, 2),
        schedules.deepcache: (unet, timesteps, 2),
        schedules.l2c: (dit, timesteps, np.zeros((10, 4))),
        schedules.smoothcache: (dit, changes, 0.1),
        schedules.smoothcache_file: (dit, timesteps, {"attn1": [1] + [0] * 9}),
        schedules.block_caching: (dit, changes, 0.1),
        schedules.pab: (dit, timesteps, {"spatial": 2}),
        schedules.tgate: (pixart, timesteps, 1),
        schedules.delta_dit: (dit, timesteps, 2, 1, 5),
    }
    assert {f.__name__ for f in calls} | {"Changes", "measure_changes"} == set(schedules.__all__)
    for schedule, arguments in calls.items():
        mask = schedule(*arguments, warmup=3, reuse="linear", log_snr=log_snr)
        assert mask.compute[:3].all()
        assert not mask.compute.all()
        assert set(mask.reuse) == {"linear"}
        assert mask.log_snr == tuple(log_snr)
        assert mask.timesteps == timesteps
        assert mask.provenance["schedule"] == schedule.__name__
        assert mask.block_hash == arguments[0].block_hash
        with pytest.raises(mc.MaskError, match="warmup must be at least 1"):
            schedule(*arguments, warmup=0)


def test_deepcache_keeps_the_shallow_path():
    """Levels by hand: the outermost skip joins the last resnet, the next one the two beside it, and so on."""
    program = trace("unet2d")
    shallow = {"up_blocks.1.resnets.1"}
    for depth, added in ((1, set()), (2, {"down_blocks.0.resnets.0", "up_blocks.1.resnets.0"})):
        shallow |= added
        mask = mc.schedules.deepcache(program, [9, 8, 7, 6], interval=2, depth=depth)
        assert {b for b, c in zip(mask.blocks, mask.compute[1], strict=True) if c} == shallow
        assert mask.compute[[0, 2]].all()
        assert np.array_equal(mask.compute[1], mask.compute[3])
    with pytest.raises(mc.MaskError, match="depth must be 1 to"):
        mc.schedules.deepcache(program, [9, 8], interval=2, depth=50)
    for name in ("dit", "sd3", "pixart"):
        with pytest.raises(mc.MaskError, match="U-shaped"):
            mc.schedules.deepcache(trace(name), [9, 8], interval=2)


def test_deepcache_stores_only_what_crosses_the_cut():
    program = trace("unet2d")
    mask = mc.schedules.deepcache(program, [9, 8, 7, 6], interval=2)
    fast = mc.optimize(denoiser("unet2d").model, mask, backend="eager")
    (x, _), _ = denoiser("unet2d").inputs(2, 9, 0)
    fast(x, 9)
    deepest = denoiser("unet2d").model.up_blocks[1].resnets[0].conv2.out_channels
    assert fast.cache_bytes == 2 * deepest * 16 * 16 * 4


def ddpm_cifar10():
    """google/ddpm-cifar10-32: Ho et al. 2020, appendix B."""
    return diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, norm_eps=1e-6, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None, act_fn="silu", norm_num_groups=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def dit_xl_2():
    return diffusers.DiTTransformer2DModel(
        sample_size=32, num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip


def test_macs_of_published_denoisers():
    """6.22 GMACs for DDPM CIFAR-10 (0.61T for 100 steps in arXiv 2603.19939), 118.7 for DiT-XL/2 256 (118.64 in arXiv 2212.09748)."""
    with torch.device("meta"):
        unet, dit = ddpm_cifar10().eval(), dit_xl_2().eval()
        x, z = torch.empty(1, 3, 32, 32), torch.empty(1, 4, 32, 32)
        t, y = torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    assert mc.count_macs(unet, x, t) == pytest.approx(6.22e9, rel=0.01)
    assert mc.count_macs(dit, z, t, class_labels=y) == pytest.approx(118.7e9, rel=0.01)
    program = mc.trace(unet, x, t)
    assert program.macs == mc.count_macs(unet, x, t)
    run = mc.cost(program, mc.Mask.full(program.names, range(99, -1, -1)))
    assert run.full_macs == run.macs == pytest.approx(0.61e12, rel=0.03)
    assert run.share == 1
    assert len(program.blocks) == 28


def test_counting_needs_no_meta_device_and_changes_nothing():
    case = denoiser("unet2d")
    args, kwargs = case.inputs(2, 901, 0)
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    program = mc.trace(case.model, *args, **kwargs)
    assert mc.count_macs(case.model, *args, **kwargs) == program.macs
    assert all(torch.equal(v, before[k]) and not v.is_meta for k, v in case.model.state_dict().items())


def test_printing_a_program():
    text = str(trace("unet2d"))
    assert text.startswith("UNet2DModel(sample 2x3x16x16, timestep scalar): 12 blocks")
    assert "mid_block.attentions.0" in text
