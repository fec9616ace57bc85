"""Schedules by kind of attention: PAB against diffusers' hook, T-GATE against its package."""

from __future__ import annotations

import copy
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from tgate.tgate_utils import register_forward, tgate_scheduler

import maskcompile as mc
from tests.denoisers import denoiser, tensors_of

TIMESTEPS = tuple(range(950, 0, -80))


@cache
def latte():
    """Spatial, temporal and cross-attention; as many frames as there are patches, so that shapes tell nothing."""
    torch.manual_seed(0)
    model = diffusers.LatteTransformer3DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=6, in_channels=4,
        cross_attention_dim=8, out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, video_length=4,
    ).eval()  # fmt: skip
    args, kwargs = inputs(TIMESTEPS[0], 0)
    return model, mc.trace(model, *args, **kwargs)


def inputs(timestep, seed):
    noise = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(99))
    kwargs = {"timestep": torch.full((2,), timestep), "encoder_hidden_states": text, "enable_temporal_attentions": True}
    return (torch.randn(2, 4, 4, 4, 4, generator=noise),), kwargs


def counting(model, names):
    """(a list that gets (step, name) for each forward of the named modules that really runs, how to say which step it is)."""
    ran, now = [], [0]

    def count(name, module):
        forward = module.forward

        def counted(*args, **kwargs):
            ran.append((now[0], name))
            return forward(*args, **kwargs)

        module.forward = counted

    for name in names:
        count(name, model.get_submodule(name))
    return ran, now


@pytest.mark.parametrize(
    ("ranges", "window"),
    [
        ({"spatial": 2, "temporal": 3, "cross": 5}, {"spatial": (100, 800), "temporal": (300, 900), "cross": (50, 960)}),
        ({"spatial": 3}, (100, 800)),
        ({"cross": 4}, (230, 950)),
    ],
)
def test_pab_skips_what_the_hook_of_diffusers_skips(ranges, window):
    original, program = latte()
    mask = mc.schedules.pab(program, TIMESTEPS, ranges, window)
    model, step = copy.deepcopy(original), [0]
    ran, now = counting(model, program.names)
    # The identifiers by default match temporal blocks as spatial ones: "temporal_transformer_blocks" holds "transformer_blocks".
    each = window if isinstance(window, dict) else dict.fromkeys(ranges, window)
    config = diffusers.PyramidAttentionBroadcastConfig(
        **{f"{kind}_attention_block_skip_range": n for kind, n in ranges.items()},
        **{f"{kind}_attention_timestep_skip_range": each[kind] for kind in ranges},
        spatial_attention_block_identifiers=(r"^transformer_blocks",), temporal_attention_block_identifiers=(r"^temporal",),
        cross_attention_block_identifiers=(r"^transformer_blocks",), current_timestep_callback=lambda: TIMESTEPS[step[0]],
    )  # fmt: skip
    diffusers.apply_pyramid_attention_broadcast(model, config)
    fast = optimized("latte")
    fast.set_mask(mask)
    for i, t in enumerate(TIMESTEPS):
        step[0] = now[0] = i
        args, kwargs = inputs(t, i)
        with torch.no_grad():
            theirs = tensors_of(model(*args, **kwargs))[0]
        assert torch.equal(tensors_of(fast(*args, **kwargs))[0], theirs)
    assert sorted(ran) == sorted((i, program.names[j]) for i, j in np.argwhere(mask.compute))
    assert not mask.compute.all()


def test_kinds_without_a_block_are_named():
    with pytest.raises(mc.MaskError, match="DiTTransformer2DModel has no cross attention"):
        mc.schedules.pab(small("dit"), [2, 1], {"cross": 2})
    with pytest.raises(mc.MaskError, match=r"such as 'down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn2'"):
        mc.schedules.tgate(small("unet2d_condition"), [2, 1])
    with pytest.raises(mc.MaskError, match="kinds of attention are spatial, temporal, cross; got 'self'"):
        mc.schedules.pab(small("dit"), [2, 1], {"self": 2})
    with pytest.raises(mc.MaskError, match="at least 1 step"):
        mc.schedules.pab(small("dit"), [2, 1], {"spatial": 0})
    with pytest.raises(mc.MaskError, match="no timesteps for spatial attention"):
        mc.schedules.pab(small("dit"), [2, 1], {"spatial": 2}, {"cross": (1, 2)})
    with pytest.raises(
        mc.MaskError, match=r"no timestep lies in the window 100 to 800 of spatial attention: .*between 0\.1 and 0\.9"
    ):
        mc.schedules.pab(small("dit"), [0.9, 0.1], {"spatial": 2})


@cache
def small(name, blocks=None):
    case = denoiser(name)
    args, kwargs = case.inputs(2, 901, 0)
    return mc.trace(case.model, *args, blocks=blocks, **kwargs)


@cache
def optimized(name, blocks=None):
    """One capture for all masks of a denoiser."""
    program = latte()[1] if name == "latte" else small(name, blocks)
    mask = mc.Mask.full(program.names, TIMESTEPS)
    return mc.optimize(latte()[0] if name == "latte" else denoiser(name).model, mask, backend="eager")


@pytest.mark.parametrize(
    ("name", "gate", "planning", "improving", "warmup"),
    [("unet2d_condition", 5, 1, 1, 2), ("unet2d_condition", 6, 3, 2, 1), ("pixart", 4, 2, 1, 2), ("pixart", 7, 5, 3, 3)],
)
def test_tgate_reuses_what_the_package_reuses(name, gate, planning, improving, warmup):
    """Step for step by the package's scheduler and attention, with shapes kept: no halving of the batch, see ``tgate``."""
    case, timesteps = denoiser(name), tuple(range(900, 0, -90))
    program = small(name, (Attention,))
    mask = mc.schedules.tgate(program, timesteps, gate, planning=planning, improving=improving, warmup=warmup)
    model = copy.deepcopy(case.model)
    fast = optimized(name, (Attention,))
    fast.set_mask(mask)
    for i, t in enumerate(timesteps):
        (x, *rest), kwargs = case.inputs(2, t, i)
        kwargs["encoder_hidden_states"] = case.inputs(2, t, 0)[1]["encoder_hidden_states"]
        cross, own, _ = tgate_scheduler(i, gate, planning, improving, warmup)
        register_forward(model, "Attention", ca_kward=cross, sa_kward=own, keep_shape=True, count=0)
        with torch.no_grad():
            theirs = tensors_of(model(x, *rest, **kwargs))[0]
        torch.testing.assert_close(tensors_of(fast(x, *rest, **kwargs))[0], theirs, rtol=1e-5, atol=1e-6)
        for name_, runs in zip(program.names, mask.compute[i], strict=True):
            is_cross = model.get_submodule(name_).is_cross_attention
            assert runs != (cross if is_cross else own)["reuse"]
    assert not mask.compute.all()
