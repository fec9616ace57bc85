"""Our deepcache mask and the DeepCache package draw the same pictures."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from DeepCache import DeepCacheSDHelper

import maskcompile as mc
from tests.architectures import randomised

STEPS = 7


def pipeline():
    """Stable Diffusion's shape, tiny: two ResNet blocks a level, cross-attention on the outer one of two levels."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), unet=unet.eval(), scheduler=diffusers.DDIMScheduler(), text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe):
    noise = torch.Generator().manual_seed(1)
    text, none = torch.randn(2, 5, 8, generator=noise), torch.randn(2, 5, 8, generator=noise)
    return pipe(
        prompt_embeds=text, negative_prompt_embeds=none, num_inference_steps=STEPS, guidance_scale=3.0, output_type="np",
        generator=torch.Generator().manual_seed(2), height=16, width=16,
    ).images  # fmt: skip


def test_same_pictures_as_the_package():
    """The package's branch id counts the skip connections from the outermost one, 0: our depth less one."""
    pipe = pipeline()
    original = pipe.unet
    unmasked = pictures(pipe)
    example = (torch.randn(4, 4, 8, 8), torch.tensor(1))
    program = mc.trace(original, *example, encoder_hidden_states=torch.randn(4, 5, 8), return_dict=False)
    fast = mc.optimize(original, mc.Mask.full(program.names, pipe.scheduler.timesteps), backend="eager")
    for interval, branch in [(2, 0), (3, 0), (5, 0), (2, 1), (3, 2), (3, 3), (2, 4)]:
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        try:
            theirs = pictures(pipe)
        finally:
            helper.disable()
        vars(original).pop("forward")  # which the helper leaves on the instance
        fast.set_mask(mc.schedules.deepcache(program, pipe.scheduler.timesteps, interval, branch + 1))
        pipe.unet = fast
        ours = pictures(pipe)
        pipe.unet = original
        assert np.array_equal(ours, theirs), (interval, branch)
        assert np.abs(ours - unmasked).max() > 1e-4


TIMESTEPS = (900.0, 600.0, 300.0)
SMALL = {"sample_size": 8, "norm_num_groups": 4}
TEXT = {**SMALL, "attention_head_dim": 2, "cross_attention_dim": 8}
CROSS_OUTSIDE = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VIDEO = {
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
}

#: Configurations by what is special: a transformer of two layers is no block, its residual parts are.
LAYOUTS = {
    "ddpm": (
        diffusers.UNet2DModel,
        {
            **SMALL, "block_out_channels": (8, 16), "layers_per_block": 2, "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "sd15": (diffusers.UNet2DConditionModel, {**TEXT, **CROSS_OUTSIDE, "block_out_channels": (8, 16), "layers_per_block": 2}),
    "sd15, a middle of one block": (
        diffusers.UNet2DConditionModel,
        {**TEXT, **CROSS_OUTSIDE, "block_out_channels": (8, 16), "layers_per_block": 1, "mid_block_type": "UNetMidBlock2D"},
    ),
    "sdxl": (
        diffusers.UNet2DConditionModel,
        {
            **TEXT, "block_out_channels": (8, 8, 16), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 3),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "two transformer layers outside": (
        diffusers.UNet2DConditionModel,
        {
            **TEXT, **CROSS_OUTSIDE, "block_out_channels": (8, 16), "layers_per_block": 1, "transformer_layers_per_block": (2, 1),
        },
    ),
    "svd": (
        diffusers.UNetSpatioTemporalConditionModel,
        {
            **VIDEO, "block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 8,
            "num_attention_heads": (2, 2), "in_channels": 4, "out_channels": 4, "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8, "num_frames": 2,
        },
    ),
}  # fmt: skip


def call(unet, step):
    """(sample, timestep, conditions) of a step: another sample at each, the same conditions."""
    config, noise, text = unet.config, torch.Generator().manual_seed(step), torch.Generator().manual_seed(99)
    frames = (config.num_frames,) if isinstance(unet, diffusers.UNetSpatioTemporalConditionModel) else ()
    sample = torch.randn(2, *frames, config.in_channels, 8, 8, generator=noise)
    conditions = {}
    if "cross_attention_dim" in config:
        conditions["encoder_hidden_states"] = torch.randn(2, 1 if frames else 5, 8, generator=text)
    if frames:
        conditions["added_time_ids"] = torch.randn(2, 3, generator=text)
    if config.get("addition_embed_type") == "text_time":
        conditions["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, 8, generator=text),
            "time_ids": torch.randn(2, 6, generator=text),
        }
    return (sample, torch.tensor(TIMESTEPS[step])), {**conditions, "return_dict": False}


def sampled(denoiser, unet):
    results = []
    for step in range(len(TIMESTEPS)):
        args, kwargs = call(unet, step)
        with torch.no_grad():
            results.append(denoiser(*args, **kwargs)[0])
    return results


def sampled_by_the_package(unet, interval, level, layer):
    """level, layer: which skip connection the deep branch begins at, cache_block_id and cache_layer_id of the package."""
    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=torch.tensor(TIMESTEPS))))
    helper.set_params(cache_interval=interval)
    helper.params |= {"cache_block_id": level, "cache_layer_id": layer}  # its branch ids know two layers a level alone
    helper.enable()
    try:
        return sampled(unet, unet)
    finally:
        helper.disable()
        for module in unet.modules():
            vars(module).pop("forward", None)  # which the helper leaves on the instances


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_as_the_package_at_every_depth(layout):
    kind, config = LAYOUTS[layout]
    torch.manual_seed(0)
    unet = randomised(kind(**config)).eval()
    args, kwargs = call(unet, 0)
    program = mc.trace(unet, *args, **kwargs)
    fast = mc.optimize(unet, mc.Mask.full(program.names, TIMESTEPS), backend="eager")
    unmasked = sampled(unet, unet)
    layers = config["layers_per_block"] + 1  # skip connections of a level
    depths = layers * len(config["block_out_channels"])
    shares = []
    for depth in range(1, depths + 1):
        interval = 2 + depth % 2
        theirs = sampled_by_the_package(unet, interval, *divmod(depth - 1, layers))
        mask = mc.schedules.deepcache(program, TIMESTEPS, interval, depth)
        fast.set_mask(mask)
        for step, (our, their) in enumerate(zip(sampled(fast, unet), theirs, strict=True)):
            assert torch.equal(our, their), (depth, step)
        assert not torch.equal(theirs[1], unmasked[1]), depth
        shares.append(mc.cost(program, mc.schedules.deepcache(program, TIMESTEPS, 2, depth)).share)
    assert shares == sorted(set(shares))  # each level adds something
    with pytest.raises(mc.MaskError, match=f"depth must be 1 to {depths} for"):
        mc.schedules.deepcache(program, TIMESTEPS, 2, depths + 1)
