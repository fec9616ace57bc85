"""Our deepcache mask and the DeepCache package draw the same pictures."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from DeepCache import DeepCacheSDHelper

import maskcompile as mc

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
