"""Tiny configurations of the denoisers of diffusers, with random weights: beside ``tests.denoisers`` those that differ in layout.

A row: configuration, inputs as a function of (noise, batch), the timestep's name. ``noise(*shape)`` draws.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import torch

from tests.denoisers import TINY, Case, _noise, denoiser

_UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "sample_size": 8,
}
_CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 12, "pos_embed_max_size": 8,
}  # fmt: skip
_COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2, "text_embed_dim": 8,
    "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "patch_size": 2, "temporal_compression_ratio": 4,
    "max_text_seq_length": 8,
}  # fmt: skip


def _ids(noise: Any, image: int, text: int, axes: int) -> dict[str, Any]:
    return {"img_ids": noise(image, axes), "txt_ids": noise(text, axes)}


def _video(noise: Any, b: int, text: int = 16) -> dict[str, Any]:
    return {"hidden_states": noise(b, 4, 2, 8, 8), "encoder_hidden_states": noise(b, 6, text)}


def _sizes(b: int) -> dict[str, Any]:
    return {name: torch.tensor([[64.0, 64.0]]).repeat(b, 1) for name in ("original_size", "target_size", "crop_coords")}


ROWS: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "unet_sdxl": (
        "UNet2DConditionModel",
        {
            **_UNET, "attention_head_dim": 2, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32, "transformer_layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        lambda noise, b: {
            "sample": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 16),
            "added_cond_kwargs": {"text_embeds": noise(b, 8), "time_ids": noise(b, 6)},
        },
        "timestep",
    ),
    "unet_ncsnpp": (  # its filters move pictures to one channel and back, where strides are ambiguous
        "UNet2DModel",
        {
            "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": None, "time_embedding_type": "fourier",
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
        lambda noise, b: {"sample": noise(b, 3, 16, 16)},
        "timestep",
    ),
    "unet_spatio_temporal": (
        "UNetSpatioTemporalConditionModel",
        {
            "block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlockSpatioTemporal",),
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal",), "cross_attention_dim": 16, "num_attention_heads": 2,
            "out_channels": 4, "in_channels": 4, "layers_per_block": 1, "sample_size": 8, "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8,
        },
        lambda noise, b: {"sample": noise(b, 2, 4, 8, 8), "encoder_hidden_states": noise(b, 1, 16), "added_time_ids": noise(b, 3)},
        "timestep",
    ),
    "unet_3d": (
        "UNet3DConditionModel",
        {
            **_UNET, "block_out_channels": (16,), "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock3D",),
            "up_block_types": ("CrossAttnUpBlock3D",),
        },
        lambda noise, b: {"sample": noise(b, 4, 2, 8, 8), "encoder_hidden_states": noise(b, 4, 16)},
        "timestep",
    ),
    "unet_motion": (
        "UNetMotionModel",
        {
            **_UNET, "block_out_channels": (16,), "num_attention_heads": 2, "down_block_types": ("CrossAttnDownBlockMotion",),
            "up_block_types": ("CrossAttnUpBlockMotion",), "motion_max_seq_length": 4, "motion_num_attention_heads": 2,
        },
        lambda noise, b: {"sample": noise(b, 4, 2, 8, 8), "encoder_hidden_states": noise(2 * b, 4, 16)},
        "timestep",
    ),
    "transformer_2d": (
        "Transformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
            "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10, "norm_elementwise_affine": False, "activation_fn": "gelu-approximate",
        },
        lambda noise, b: {"hidden_states": noise(b, 4, 8, 8), "class_labels": torch.arange(b)},
        "timestep",
    ),
    "sd35": (
        "SD3Transformer2DModel",
        {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        lambda noise, b: {"hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 5, 16), "pooled_projections": noise(b, 12)},
        "timestep",
    ),
    "flux_guidance": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 16, "pooled_projection_dim": 12, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True,
        },
        lambda noise, b: {
            "hidden_states": noise(b, 16, 8), "encoder_hidden_states": noise(b, 4, 16), "pooled_projections": noise(b, 12),
            "guidance": torch.full((b,), 3.5), **_ids(noise, 16, 4, 3),
        },
        "timestep",
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 16, "timestep_guidance_channels": 32, "axes_dims_rope": [4, 4, 4, 4],
        },
        lambda noise, b: {
            "hidden_states": noise(b, 16, 4), "encoder_hidden_states": noise(b, 6, 16), "guidance": torch.ones(b), **_ids(noise, 16, 6, 4),
        },
        "timestep",
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 16, "axes_dims_rope": [4, 4, 8], "approximator_num_channels": 8, "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        lambda noise, b: {"hidden_states": noise(b, 16, 4), "encoder_hidden_states": noise(b, 6, 16), **_ids(noise, 16, 6, 3)},
        "timestep",
    ),
    "aura_flow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 16, "out_channels": 4, "pos_embed_max_size": 16,
        },
        lambda noise, b: {"hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 6, 16)},
        "timestep",
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 8,
        },
        lambda noise, b: {"hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 6, 8)},
        "timestep",
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        _COGVIDEOX,
        lambda noise, b: {"hidden_states": noise(b, 2, 4, 8, 8), "encoder_hidden_states": noise(b, 8, 8)},
        "timestep",
    ),
    "cogvideox_longer": (  # than its table of positions
        "CogVideoXTransformer3DModel",
        _COGVIDEOX,
        lambda noise, b: {"hidden_states": noise(b, 3, 4, 8, 8), "encoder_hidden_states": noise(b, 8, 8)},
        "timestep",
    ),
    "cogview3": (
        "CogView3PlusTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "out_channels": 4,
            "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8, "sample_size": 8,
        },
        lambda noise, b: {"hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 6, 8), **_sizes(b)},
        "timestep",
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 4, "out_channels": 4,
            "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4,
        },
        lambda noise, b: {"hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 6, 8), **_sizes(b)},
        "timestep",
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
        },
        lambda noise, b: {
            "hidden_states": noise(b, 16, 16), "encoder_hidden_states": noise(b, 6, 16),
            "encoder_hidden_states_mask": torch.ones(b, 6, dtype=torch.long), "img_shapes": [(1, 4, 4)] * b,
        },
        "timestep",
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 1,
            "n_kv_heads": 2, "qk_norm": True, "cap_feat_dim": 16, "rope_theta": 256.0, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
        },
        lambda noise, b: {"x": [noise(4, 1, 8, 8) for _ in range(b)], "cap_feats": [noise(6, 16) for _ in range(b)]},
        "t",
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {
            "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4,
            "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 6,
        },
        lambda noise, b: {**_video(noise, b), "encoder_attention_mask": torch.ones(b, 6, dtype=torch.bool)},
        "timestep",
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1, "num_single_layers": 1,
            "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        lambda noise, b: {
            **_video(noise, b), "pooled_projections": noise(b, 8), "encoder_attention_mask": torch.ones(b, 6), "guidance": torch.full((b,), 6.0),
        },
        "timestep",
    ),
    "hunyuan_dit": (
        "HunyuanDiT2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "hidden_size": 16, "text_len": 4, "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        lambda noise, b: {
            "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 4, 8), "text_embedding_mask": torch.ones(b, 4),
            "encoder_hidden_states_t5": noise(b, 4, 8), "text_embedding_mask_t5": torch.ones(b, 4), "image_meta_size": noise(b, 6),
            "style": torch.zeros(b, dtype=torch.long), "image_rotary_emb": [torch.ones(16, 8), torch.zeros(16, 8)],
        },
        "timestep",
    ),
    "wan": ("WanTransformer3DModel", _WAN, _video, "timestep"),
    "wan_vace": (
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": [0], "vace_in_channels": 12},
        lambda noise, b: {**_video(noise, b), "control_hidden_states": noise(b, 12, 2, 8, 8)},
        "timestep",
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 2,
            "caption_channels": 16,
        },
        lambda noise, b: {
            "hidden_states": noise(b, 32, 4), "encoder_hidden_states": noise(b, 6, 16), "encoder_attention_mask": torch.ones(b, 6, dtype=torch.bool),
            "num_frames": 2, "height": 4, "width": 4,
        },
        "timestep",
    ),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 2,
            "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16, "caption_channels": 16,
        },
        lambda noise, b: {
            "hidden_states": noise(b, 32, 4), "audio_hidden_states": noise(b, 5, 4), "encoder_hidden_states": noise(b, 6, 16),
            "audio_encoder_hidden_states": noise(b, 6, 16), "encoder_attention_mask": torch.ones(b, 6, dtype=torch.bool),
            "num_frames": 2, "height": 4, "width": 4, "fps": 25.0, "audio_num_frames": 5,
        },
        "timestep",
    ),
    "latte": (
        "LatteTransformer3DModel",
        {
            "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 4, "num_attention_heads": 2, "caption_channels": 8,
            "in_channels": 4, "cross_attention_dim": 8, "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 2,
        },
        lambda noise, b: _video(noise, b, 8),
        "timestep",
    ),
    "allegro": (
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "cross_attention_dim": 16,
            "sample_width": 8, "sample_height": 8, "sample_frames": 8, "caption_channels": 8,
        },
        lambda noise, b: _video(noise, b, 8),
        "timestep",
    ),
    "stable_audio": (
        "StableAudioDiTModel",
        {
            "sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "num_key_value_attention_heads": 2,
            "out_channels": 4, "cross_attention_dim": 8, "time_proj_dim": 8, "global_states_input_dim": 8, "cross_attention_input_dim": 8,
        },
        lambda noise, b: {
            "hidden_states": noise(b, 4, 16), "encoder_hidden_states": noise(b, 6, 8), "global_hidden_states": noise(b, 1, 8),
            "rotary_embedding": (noise(17, 4), noise(17, 4)),
        },
        "timestep",
    ),
    "lumina": (
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 3, "num_kv_heads": 1,
            "multiple_of": 16, "learn_sigma": False, "cross_attention_dim": 16,
        },
        lambda noise, b: {
            "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 6, 16), "encoder_mask": torch.ones(b, 6),
            "image_rotary_emb": torch.polar(torch.ones(384, 384, 4), noise(384, 384, 4)), "cross_attention_kwargs": {},
        },
        "timestep",
    ),
    "prior": (
        "PriorTransformer",
        {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "embedding_dim": 8, "num_embeddings": 7, "additional_embeddings": 4},
        lambda noise, b: {"hidden_states": noise(b, 8), "proj_embedding": noise(b, 8), "encoder_hidden_states": noise(b, 7, 8)},
        "timestep",
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32), "cap_feat_dim": 16,
        },
        lambda noise, b: {
            "hidden_states": noise(b, 4, 8, 8), "encoder_hidden_states": noise(b, 6, 16), "encoder_attention_mask": torch.ones(b, 6, dtype=torch.bool),
        },
        "timestep",
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "caption_channels": [8, 4], "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": (0, 1), "force_inference_output": True,
        },
        lambda noise, b: {
            "hidden_states": noise(b, 4, 16, 16), "encoder_hidden_states_t5": noise(b, 6, 8), "encoder_hidden_states_llama3": noise(2, b, 6, 4),
            "pooled_embeds": noise(b, 8),
        },
        "timesteps",
    ),
}  # fmt: skip

#: torch.export cannot capture these: the first reads lengths of captions, the second sends tokens to experts by value.
UNCAPTURABLE = ("lumina2", "hidream")


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """In eval mode, every parameter a little changed: what starts at zero would hide a wrong reuse."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@cache
def architecture(name: str) -> Case:
    """The case of ``ROWS`` or ``tests.denoisers.TINY``, with random weights."""
    if name in TINY:
        return denoiser(name)
    kind, config, inputs, timestep = ROWS[name]
    torch.manual_seed(0)
    model = randomised(getattr(diffusers, kind)(**config))
    whole = name in ("unet_sdxl", "unet_spatio_temporal", "unet_3d", "unet_motion")

    def call(b: int, t: float, s: int) -> Any:
        value = torch.tensor(t) if whole else torch.full((b,), float(t) if timestep == "timestep" else t)
        return (), {**inputs(_noise(s), b), timestep: value}

    return Case(model, call)
