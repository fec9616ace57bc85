"""Tiny diffusers pipelines with random weights: ``TINY[name]() -> (pipe, run)``; ``run(pipe)`` samples, the same at every call."""

from __future__ import annotations

from functools import cache

import diffusers
import torch

from tests.architectures import architecture, randomised

STEPS = 6


def _noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _vae(channels=4):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


@cache
def _unet(channels=3):
    """Of one level: a capture takes a second."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16, in_channels=channels, layers_per_block=1, block_out_channels=(16,), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",),
    )  # fmt: skip
    return randomised(model)


@cache
def text_unet():
    """Of one level, for text embeddings of width 16."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16,), norm_num_groups=8, attention_head_dim=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    return randomised(model)


def _run(output="images", steps=STEPS, **given):
    """Sample with a generator of its own, to latents."""

    def run(pipe, seed=3, **more):
        generator = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", **given, **more}
        return torch.as_tensor(getattr(pipe(**settings), output))

    return run


def ddpm():
    return diffusers.DDPMPipeline(_unet(), diffusers.DDPMScheduler()), _run(output_type="np", batch_size=2)


def ddim():
    return diffusers.DDIMPipeline(_unet(), diffusers.DDIMScheduler()), _run(output_type="np", batch_size=2)


def _vqvae(channels):
    torch.manual_seed(0)
    return diffusers.VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, num_vq_embeddings=8, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    ).eval()  # fmt: skip


def ldm():
    pipe = diffusers.LDMPipeline(_vqvae(3), _unet(), diffusers.DDIMScheduler())
    return pipe, _run(output_type="np", batch_size=2)


def ldm_super_resolution():
    pipe = diffusers.LDMSuperResolutionPipeline(_vqvae(3), _unet(6), diffusers.DDIMScheduler())
    return pipe, _run(output_type="np", image=_noise(0)(1, 3, 16, 16))


def dit():
    torch.manual_seed(0)
    # The pipeline's null class is 1000.
    model = diffusers.DiTTransformer2DModel.from_config(
        {**architecture("dit").model.config, "num_embeds_ada_norm": 1000}
    ).eval()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8).eval()
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    return pipe, _run(output_type="np", class_labels=[1, 7], guidance_scale=4.0)


def _pixart(kind):
    noise = _noise(0)
    masks = {name: torch.ones(2, 6) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    pipe = getattr(diffusers, kind)(None, None, _vae(), architecture("pixart").model, diffusers.DPMSolverMultistepScheduler())
    return pipe, _run(
        negative_prompt=None, prompt_embeds=noise(2, 6, 12), negative_prompt_embeds=noise(2, 6, 12), height=64, width=64,
        use_resolution_binning=False, **masks,
    )  # fmt: skip


def pixart_alpha():
    return _pixart("PixArtAlphaPipeline")


def pixart_sigma():
    return _pixart("PixArtSigmaPipeline")


def _stable_diffusion(kind="StableDiffusionPipeline", scheduler=None, unet=None, **components):
    return getattr(diffusers, kind)(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=unet or text_unet(),
        scheduler=scheduler or diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        **components,
    )  # fmt: skip


def _prompt(batch=2, width=16, length=5):
    noise = _noise(0)
    return {"prompt_embeds": noise(batch, length, width), "negative_prompt_embeds": noise(batch, length, width)}


def _picture(batch=2):
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def text2img(scheduler=None, **given):
    return _stable_diffusion(scheduler=scheduler), _run(**_prompt(), height=64, width=64, **given)


def text2img_without_guidance():
    return text2img(guidance_scale=1.0)


def text2img_guided_at_first():
    """Guidance is switched off midway, as to save time: the batch halves."""

    def off(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return text2img(callback_on_step_end=off, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def img2img():
    return _stable_diffusion("StableDiffusionImg2ImgPipeline"), _run(**_prompt(), image=_picture(), strength=0.7, steps=8)


def inpaint():
    area = torch.zeros(2, 1, 64, 64)
    area[..., 16:40, 8:48] = 1
    pipe = _stable_diffusion("StableDiffusionInpaintPipeline")
    return pipe, _run(**_prompt(), image=_picture(), mask_image=area, height=64, width=64, strength=0.99)


def controlnet():
    unet = text_unet()
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 16))
    pipe = _stable_diffusion("StableDiffusionControlNetPipeline", controlnet=randomised(net))
    return pipe, _run(**_prompt(), image=_picture(), height=64, width=64)


def _pooled(width):
    noise = _noise(1)
    return {"pooled_prompt_embeds": noise(2, width), "negative_pooled_prompt_embeds": noise(2, width)}


def sdxl():
    unet = architecture("unet_sdxl").model
    pipe = diffusers.StableDiffusionXLPipeline(
        _vae(), None, None, None, None, unet, diffusers.EulerDiscreteScheduler(), add_watermarker=False
    )
    return pipe, _run(**_prompt(), **_pooled(8), height=64, width=64)


def sd3():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3Pipeline(architecture("sd3").model, scheduler, _vae(), None, None, None, None, None, None)
    return pipe, _run(**_prompt(), **_pooled(12), height=64, width=64)


def _flux(name, **given):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, architecture(name).model)
    return pipe, _run(height=64, width=64, **given)


def flux_distilled():
    return _flux(
        "flux_guidance", prompt_embeds=_prompt()["prompt_embeds"], pooled_prompt_embeds=_pooled(12)["pooled_prompt_embeds"]
    )


def flux_guided_separately():
    return _flux("flux", **_prompt(), **_pooled(12), true_cfg_scale=3.0)


def sana():
    masks = {name: torch.ones(2, 6) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    pipe = diffusers.SanaPipeline(None, None, None, architecture("sana").model, diffusers.FlowMatchEulerDiscreteScheduler())
    return pipe, _run(
        **_prompt(width=8, length=6), **masks, negative_prompt=None, height=256, width=256, use_resolution_binning=False
    )


def _wan(**components):
    pipe = diffusers.WanPipeline(
        None, None, None, diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), **components
    )  # fmt: skip
    return pipe, _run("frames", **_prompt(length=6), height=64, width=64, num_frames=5, guidance_scale=4.0)


def wan():
    return _wan(transformer=architecture("wan").model)


def wan_two_experts():
    torch.manual_seed(1)
    second = diffusers.WanTransformer3DModel.from_config(architecture("wan").model.config).eval()
    return _wan(transformer=architecture("wan").model, transformer_2=second, boundary_ratio=0.7)


def qwen_image():
    pipe = diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, architecture("qwen_image").model
    )
    masks = {name: torch.ones(2, 6, dtype=torch.long) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
    return pipe, _run(**_prompt(length=6), **masks, true_cfg_scale=4.0, height=64, width=64)


def cogvideox():
    pipe = diffusers.CogVideoXPipeline(None, None, None, architecture("cogvideox").model, diffusers.CogVideoXDDIMScheduler())
    prompts = _prompt(batch=1, width=8, length=8)
    return pipe, _run("frames", **prompts, height=64, width=64, num_frames=5, use_dynamic_cfg=True)


TINY = {
    f.__name__: f
    for f in (
        ddpm, ddim, ldm, ldm_super_resolution, dit, pixart_alpha, pixart_sigma, text2img, text2img_without_guidance, text2img_guided_at_first,
        img2img, inpaint, controlnet, sdxl, sd3, flux_distilled, flux_guided_separately, sana, wan, qwen_image, cogvideox,
    )
}  # fmt: skip
