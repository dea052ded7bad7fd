"""Tiny pipelines whose denoiser is a UNet, or that predate transformers: Stable Diffusion and its kin."""

from __future__ import annotations

from typing import Any

import diffusers as df

from scripts.tiny_parts import HIDDEN, clip_text, clip_tokenizer, kl_vae

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_NO_FILTER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def unet(channels: int = 4, out_channels: int = 4, cross_attention_dim: int = HIDDEN, **more: Any) -> Any:
    return df.UNet2DConditionModel(**{
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": channels, "out_channels": out_channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross_attention_dim, "attention_head_dim": 4, "norm_num_groups": 4, **more})


def sd15() -> Any:
    scheduler = df.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    return _sd(df.StableDiffusionPipeline, scheduler)


def sd_v_prediction() -> Any:
    return _sd(df.StableDiffusionPipeline, df.DDIMScheduler(
        **SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1))


def sd_zero_snr() -> Any:
    return _sd(df.StableDiffusionPipeline, df.DDIMScheduler(
        **SD_BETAS, prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"))


def _sd(pipeline: Any, scheduler: Any, **more: Any) -> Any:
    parts = {"vae": kl_vae(), "text_encoder": clip_text(), "tokenizer": clip_tokenizer(), "unet": unet(), "scheduler": scheduler}
    return pipeline(**{**parts, **_NO_FILTER, **more})


def sdxl_unet(**more: Any) -> Any:
    return unet(cross_attention_dim=2 * HIDDEN, **{
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + HIDDEN,
        "transformer_layers_per_block": (1, 2), "use_linear_projection": True, **more})


def sdxl(pipeline: Any = df.StableDiffusionXLPipeline, **more: Any) -> Any:
    return pipeline(**{
        "vae": kl_vae(), "text_encoder": clip_text(), "text_encoder_2": clip_text(projection=True), "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(), "unet": sdxl_unet(),
        "scheduler": df.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1), **more})
