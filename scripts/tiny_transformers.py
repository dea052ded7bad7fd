"""Tiny image pipelines whose denoiser is a transformer."""

from __future__ import annotations

from typing import Any

import diffusers as df

from scripts.tiny_parts import (
    HIDDEN,
    causal_text,
    chat_tokenizer,
    clip_text,
    clip_tokenizer,
    kl_vae,
    qwen25_vl,
    qwen_image_vae,
    shifted_kl_vae,
    t5_text,
    t5_tokenizer,
)


def sd3(pipeline: Any = df.StableDiffusion3Pipeline, **more: Any) -> Any:
    transformer = df.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * HIDDEN, caption_projection_dim=32, pooled_projection_dim=2 * HIDDEN, pos_embed_max_size=32)
    return pipeline(**{
        "transformer": transformer, "scheduler": df.FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": shifted_kl_vae(),
        "text_encoder": clip_text(projection=True), "tokenizer": clip_tokenizer(), "text_encoder_2": clip_text(projection=True),
        "tokenizer_2": clip_tokenizer(), "text_encoder_3": t5_text(2 * HIDDEN), "tokenizer_3": t5_tokenizer(), **more})


def flux(pipeline: Any = df.FluxPipeline, in_channels: int = 16, guidance_embeds: bool = True, **more: Any) -> Any:
    transformer = df.FluxTransformer2DModel(
        patch_size=1, in_channels=in_channels, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=HIDDEN, pooled_projection_dim=HIDDEN, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds)
    return pipeline(**{
        "transformer": transformer, "vae": shifted_kl_vae(), "text_encoder": clip_text(), "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_text(), "tokenizer_2": t5_tokenizer(),
        "scheduler": df.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), **more})


def pixart_transformer(**more: Any) -> Any:
    return df.PixArtTransformer2DModel(**{
        "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3, "caption_channels": HIDDEN,
        "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8, "attention_bias": True, "norm_elementwise_affine": False,
        "use_additional_conditions": False, **more})


def pixart(pipeline: Any = df.PixArtAlphaPipeline, **more: Any) -> Any:
    return pipeline(**{
        "transformer": pixart_transformer(), "vae": kl_vae(), "text_encoder": t5_text(), "tokenizer": t5_tokenizer(),
        "scheduler": df.DPMSolverMultistepScheduler(), **more})


def qwen_image(pipeline: Any = df.QwenImagePipeline, **more: Any) -> Any:
    transformer = df.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=HIDDEN,
        axes_dims_rope=(8, 4, 4))
    return pipeline(**{
        "transformer": transformer, "vae": qwen_image_vae(), "text_encoder": qwen25_vl(), "tokenizer": chat_tokenizer(),
        "scheduler": df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02), **more})


def z_image(pipeline: Any = df.ZImagePipeline, **more: Any) -> Any:
    transformer = df.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=HIDDEN, axes_dims=[8, 4, 4], axes_lens=[512, 32, 32])
    return pipeline(**{
        "transformer": transformer, "vae": shifted_kl_vae(), "text_encoder": causal_text("Qwen3Model"), "tokenizer": chat_tokenizer(),
        "scheduler": df.FlowMatchEulerDiscreteScheduler(shift=3.0), **more})
