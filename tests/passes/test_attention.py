"""Kinds of attention, against what denoisers say of their own modules."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from torch import nn

import maskcompile as mc
from passes.attention import attention_kinds, attention_modules
from tests.denoisers import denoiser


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def latte():
    """As many frames as patches a frame, 4: the shapes of spatial and temporal attention are the same."""
    model = diffusers.LatteTransformer3DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=6, in_channels=4,
        cross_attention_dim=8, out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, video_length=4,
    )  # fmt: skip
    return model, (noise(2, 4, 4, 4, 4),), {"timestep": torch.full((2,), 5), "encoder_hidden_states": noise(2, 3, 6)}


def wan():
    """Frames and positions together, then text; by keywords of which the sample's is not the first of the alphabet."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    kwargs = {"hidden_states": noise(2, 4, 3, 8, 8), "timestep": torch.full((2,), 5), "encoder_hidden_states": noise(2, 5, 16)}
    return model, (), kwargs


def motion():
    """AnimateDiff: both attentions of a motion module go along the frames, whatever they are called."""
    model = diffusers.UNetMotionModel(
        sample_size=4, block_out_channels=(32,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, num_attention_heads=2,
        motion_num_attention_heads=2, down_block_types=("CrossAttnDownBlockMotion",), up_block_types=("CrossAttnUpBlockMotion",),
        use_motion_mid_block=False,
    )  # fmt: skip
    return model, (noise(1, 4, 3, 4, 4), torch.tensor(5)), {"encoder_hidden_states": noise(3, 5, 8)}


@pytest.mark.parametrize("make", [latte, wan, motion])
def test_video_denoisers(make):
    model, args, kwargs = make()
    found = attention_modules(mc.trace(model.eval(), *args, **kwargs).capture)
    named = {n: m for n, m in model.named_modules() if hasattr(m, "to_q")}
    assert set(found) == set(named)
    for name, kinds in found.items():
        temporal = "temporal" in name or "motion" in name
        cross = (
            getattr(named[name], "cross_attention_dim_head", None) is not None
            if make is wan
            else named[name].is_cross_attention
        )
        assert kinds == {"temporal" if temporal else "cross" if cross else "spatial"}, name


def test_attention_as_products_and_a_softmax():
    model = copy.deepcopy(denoiser("unet2d_condition").model)
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    args, kwargs = denoiser("unet2d_condition").inputs(2, 5, 0)
    capture = mc.trace(model, *args, **kwargs).capture
    found = attention_modules(capture)
    assert found == {n: {"cross" if n.endswith("attn2") else "spatial"} for n, m in model.named_modules() if hasattr(m, "to_q")}
    both = attention_kinds(
        capture, ["mid_block.attentions.0", "mid_block.resnets.0", "mid_block.attentions.0.transformer_blocks.0.ff"]
    )
    assert both == {"mid_block.attentions.0": {"spatial", "cross"}}


def test_joint_attention_is_spatial():
    for name in ("sd3", "flux"):
        args, kwargs = denoiser(name).inputs(2, denoiser(name).timesteps[0], 0)
        assert set(attention_modules(mc.trace(denoiser(name).model, *args, **kwargs).capture).values()) == {
            frozenset({"spatial"})
        }


class Axial(nn.Module):
    """Attention along one axis of a video at a time, written out by hand."""

    def __init__(self, order, width=4):
        super().__init__()
        self.order, self.embed = order, nn.Conv3d(4, width, 1)
        self.along = nn.ModuleList(nn.Sequential(nn.Linear(width, 3 * width), nn.Linear(width, width)) for _ in order)

    def forward(self, sample, timestep):
        x = self.embed(sample).permute(0, 2, 3, 4, 1) + timestep.reshape(-1, 1, 1, 1, 1)
        for axis, layer in zip(self.order, self.along, strict=True):
            y = x.movedim(axis, 3)
            q, k, v = layer[0](y).split(x.shape[-1], dim=-1)
            weights = ((q @ k.transpose(-1, -2)) * 0.5).float().softmax(dim=-1)
            x = x + layer[1](weights @ v).movedim(3, axis)
        return x


def test_attention_along_each_axis():
    """The kinds need no module of the attention alone: here it happens in the denoiser itself."""
    for axis, kind in ((1, "temporal"), (2, "spatial"), (3, "spatial")):
        model = nn.Module()
        model.inner = Axial([axis])
        model.forward = lambda sample, timestep, inner=model.inner: inner(sample, timestep)
        capture = mc.trace(model.eval(), noise(2, 4, 3, 3, 3), torch.ones(2)).capture
        assert attention_modules(capture) == {"inner": {kind}}


def test_the_sample_is_the_first_parameter_however_keywords_are_ordered():
    """Wan called by keywords alone: the text embedding does not depend on the sample, and is no block."""
    model, _, kwargs = wan()
    by_keyword = mc.trace(model.eval(), **kwargs)
    by_position = mc.trace(model, kwargs["hidden_states"], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
    assert by_keyword.capture.sample.name == by_position.capture.sample.name == "hidden_states"
    assert by_keyword.names == by_position.names == tuple(f"blocks.0.{part}" for part in ("attn1", "attn2", "ffn"))


def test_what_has_no_size_before_it_is_computed_tells_nothing():
    class Picked(nn.Module):
        """Attention over all tokens, then a layer for those that are kept."""

        def __init__(self):
            super().__init__()
            self.attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)})
            self.attention.forward = self.attend
            self.picked = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))

        def attend(self, x):
            q, k, v = self.attention["qkv"](x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.attention["out"](x.transpose(1, 2).flatten(2))

        def forward(self, sample, timestep, kept):
            x = sample.flatten(2).transpose(1, 2)
            x = x + self.attention(x) * timestep
            at = kept.nonzero().squeeze(1)
            x = x.index_copy(1, at, self.picked(x[:, at]))
            return x.transpose(1, 2).unflatten(-1, sample.shape[2:])

    program = mc.trace(Picked().eval(), torch.randn(2, 8, 3, 2), 0.5, torch.tensor([1, 0, 1, 1, 0, 0]))
    assert program.names == ("attention",)
    mask = mc.schedules.pab(program, (900.0, 500.0, 100.0), {"spatial": 2})
    assert mask.compute[:, 0].tolist() == [True, False, True]
