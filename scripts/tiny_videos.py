"""Tiny pipelines for video and audio."""

from __future__ import annotations

from typing import Any

import diffusers as df
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from scripts.tiny_parts import HIDDEN, cogvideox_vae, oobleck_vae, t5_text, t5_tokenizer, umt5_text, wan_vae


def wan_transformer(in_channels: int = 4, out_channels: int = 4, **more: Any) -> Any:
    return df.WanTransformer3DModel(**{
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": in_channels,
        "out_channels": out_channels, "text_dim": HIDDEN, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32, **more})


def wan(pipeline: Any = df.WanPipeline, **more: Any) -> Any:
    scheduler = df.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return pipeline(**{
        "transformer": wan_transformer(), "vae": wan_vae(), "text_encoder": umt5_text(), "tokenizer": t5_tokenizer(),
        "scheduler": scheduler, **more})


def wan22() -> Any:
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.875)


def wan22_ti2v() -> Any:
    return wan(expand_timesteps=True)


def cogvideox(pipeline: Any = df.CogVideoXPipeline, in_channels: int = 4, rotary: bool = False, **more: Any) -> Any:
    transformer = df.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=in_channels, out_channels=4, time_embed_dim=4, text_embed_dim=HIDDEN,
        num_layers=1, sample_width=4, sample_height=4, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=24,
        use_rotary_positional_embeddings=rotary, use_learned_positional_embeddings=rotary and in_channels > 4)
    scheduler = df.CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
        rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing")
    return pipeline(**{
        "transformer": transformer, "vae": cogvideox_vae(), "text_encoder": t5_text(), "tokenizer": t5_tokenizer(), "scheduler": scheduler,
        **more})


def stable_audio() -> Any:
    transformer = df.StableAudioDiTModel(
        sample_size=64, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=2, cross_attention_dim=HIDDEN, cross_attention_input_dim=HIDDEN, time_proj_dim=16,
        global_states_input_dim=2 * HIDDEN)
    return df.StableAudioPipeline(
        transformer=transformer, vae=oobleck_vae(), text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        projection_model=StableAudioProjectionModel(text_encoder_dim=HIDDEN, conditioning_dim=HIDDEN, min_value=0, max_value=1),
        scheduler=df.EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential",
                                                    solver_order=2, prediction_type="v_prediction"))
