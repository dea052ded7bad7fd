"""Tiny pipelines for video and audio."""

from __future__ import annotations

from typing import Any

import diffusers as df
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.shap_e import ShapERenderer
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from torch import nn

from scripts.tiny_parts import (
    HIDDEN,
    causal_text,
    chat_tokenizer,
    clip_image_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    cogvideox_vae,
    kl_vae,
    oobleck_vae,
    qwen25_vl,
    t5_text,
    t5_tokenizer,
    umt5_text,
    wan_vae,
)
from scripts.tiny_transformers import kandinsky5_parts
from scripts.tiny_unets import sd_ddim, unet


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


def cogvideox_image() -> Any:
    return cogvideox(df.CogVideoXImageToVideoPipeline, in_channels=8, rotary=True)


def wan_image() -> Any:
    return wan(df.WanImageToVideoPipeline, transformer=wan_transformer(4 + 4 + 2, image_dim=HIDDEN), image_encoder=clip_vision(),
               image_processor=clip_image_processor())


def wan22_image() -> Any:
    return wan(df.WanImageToVideoPipeline, transformer=wan_transformer(10), transformer_2=wan_transformer(10), boundary_ratio=0.9)


def wan22_image_tokens() -> Any:
    return wan(df.WanImageToVideoPipeline, expand_timesteps=True)


def wan_vace() -> Any:
    transformer = df.WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=HIDDEN, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=12)
    return wan(df.WanVACEPipeline, transformer=transformer)


def skyreels() -> Any:
    return wan(df.SkyReelsV2Pipeline, transformer=_skyreels_transformer())


def skyreels_forcing() -> Any:
    return wan(df.SkyReelsV2DiffusionForcingPipeline, transformer=_skyreels_transformer())


def _skyreels_transformer() -> Any:
    return df.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=HIDDEN, freq_dim=256,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32)


def hunyuan_video() -> Any:
    transformer = df.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=HIDDEN, pooled_projection_dim=HIDDEN,
        rope_axes_dim=(2, 4, 4))
    vae = df.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, spatial_compression_ratio=8, temporal_compression_ratio=4)
    return df.HunyuanVideoPipeline(
        transformer=transformer, vae=vae, text_encoder=causal_text("LlamaModel"), tokenizer=chat_tokenizer(), text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(), scheduler=df.FlowMatchEulerDiscreteScheduler(shift=7.0))


def hunyuan_video15() -> Any:
    transformer = df.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1, patch_size=1,
        patch_size_t=1, text_embed_dim=HIDDEN, text_embed_2_dim=HIDDEN, image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=16,
        task_type="t2v")
    vae = df.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=2, temporal_compression_ratio=2)
    pipe = df.HunyuanVideo15Pipeline(
        transformer=transformer, vae=vae, text_encoder=_qwen_text(), tokenizer=chat_tokenizer(), text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(), guider=df.ClassifierFreeGuidance(guidance_scale=6.0),
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=7.0))
    pipe.system_message, pipe.prompt_template_encode_start_idx = "Describe", 10
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 96, 16, 4
    return pipe


def _qwen_text() -> Any:
    return qwen25_vl().model.language_model


def ltx(pipeline: Any = df.LTXPipeline) -> Any:
    transformer = df.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=HIDDEN)
    vae = df.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=1, patch_size_t=1)
    return pipeline(
        transformer=transformer, vae=vae, text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1))


def ltx_image() -> Any:
    return ltx(df.LTXImageToVideoPipeline)


def mochi() -> Any:
    transformer = df.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12, out_channels=None,
        text_embed_dim=HIDDEN, time_embed_dim=4, max_sequence_length=24)
    vae = df.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1, 1, 1, 1, 1))
    return df.MochiPipeline(
        transformer=transformer, vae=vae, text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def allegro() -> Any:
    transformer = df.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=24, sample_width=4,
        sample_height=4, sample_frames=2, caption_channels=HIDDEN)
    vae = df.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4, sample_size=16)
    vae.enable_tiling()
    return df.AllegroPipeline(
        transformer=transformer, vae=vae, text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=df.EulerAncestralDiscreteScheduler(beta_schedule="linear"))


def latte() -> Any:
    transformer = df.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=HIDDEN, in_channels=4,
        cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2)
    return df.LattePipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=df.DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False))


def easy_animate() -> Any:
    transformer = df.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=HIDDEN, num_layers=1,
        sample_width=4, sample_height=4, patch_size=2, mmdit_layers=1)
    vae = df.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8, 8, 8, 8],
        down_block_types=["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 3,
        up_block_types=["SpatialUpBlock3D"] + ["SpatialTemporalUpBlock3D"] * 3, layers_per_block=1, norm_num_groups=2)
    return df.EasyAnimatePipeline(
        transformer=transformer, vae=vae, text_encoder=qwen25_vl(), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler())


class _NoSafetyChecker(nn.Module):
    """Stands in for Cosmos' guardrail, which downloads its own weights."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos(pipeline: Any = df.CosmosTextToWorldPipeline, second: bool = False) -> Any:
    transformer = df.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=HIDDEN, adaln_lora_dim=4,
        max_size=(4, 32, 32), extra_pos_embed_type=None if second else "learnable", concat_padding_mask=True)
    if second:
        vae, scheduler = wan_vae(), df.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    else:
        scheduler = df.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon", rho=7.0,
            final_sigmas_type="sigma_min")
        vae = df.AutoencoderKLCosmos(
            latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,),
            resolution=64, num_layers=1, patch_size=4, patch_type="haar", spatial_compression_ratio=4, temporal_compression_ratio=4,
            latents_mean=None, latents_std=None)
    return pipeline(
        transformer=transformer, vae=vae, text_encoder=t5_text(), tokenizer=t5_tokenizer(), scheduler=scheduler,
        safety_checker=_NoSafetyChecker())


def cosmos2_image() -> Any:
    return cosmos(df.Cosmos2TextToImagePipeline, second=True)


def animate_diff() -> Any:
    adapter = df.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2,
        use_motion_mid_block=False)
    return df.AnimateDiffPipeline(
        vae=kl_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=unet(), motion_adapter=adapter,
        scheduler=df.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1,
                                   timestep_spacing="linspace"))


def text_to_video() -> Any:
    network = df.UNet3DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=HIDDEN, attention_head_dim=4, norm_num_groups=2)
    return df.TextToVideoSDPipeline(
        vae=kl_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=network, scheduler=sd_ddim())


def image_to_video_xl() -> Any:
    network = df.I2VGenXLUNet(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=HIDDEN, attention_head_dim=2,
        norm_num_groups=2)
    return df.I2VGenXLPipeline(
        vae=kl_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), image_encoder=clip_vision(),
        feature_extractor=clip_image_processor(), unet=network, scheduler=sd_ddim())


def stable_video() -> Any:
    network = df.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=HIDDEN, num_attention_heads=2,
        projection_class_embeddings_input_dim=24, addition_time_embed_dim=8)
    vae = df.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, layers_per_block=1)
    return df.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=clip_vision(224), unet=network, feature_extractor=clip_image_processor(), scheduler=df.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", sigma_min=0.002,
            sigma_max=700.0, steps_offset=1, timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True))


def sana_video() -> Any:
    transformer = df.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=HIDDEN, sample_size=8, patch_size=(1, 2, 2),
        rope_max_seq_len=32)
    return df.SanaVideoPipeline(
        transformer=transformer, vae=wan_vae(), text_encoder=causal_text("Gemma2Model"), tokenizer=chat_tokenizer(),
        scheduler=df.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0))


def kandinsky5_video() -> Any:
    vae = df.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, spatial_compression_ratio=8, temporal_compression_ratio=4)
    return df.Kandinsky5T2VPipeline(vae=vae, **kandinsky5_parts())


def shap_e() -> Any:
    prior = df.PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, embedding_dim=HIDDEN, num_embeddings=32, embedding_proj_dim=HIDDEN,
        time_embed_dim=64, num_layers=1, clip_embed_dim=2 * HIDDEN, additional_embeddings=0, time_embed_act_fn="gelu",
        norm_in_type="layer", embedding_proj_norm_type=None, encoder_hid_proj_type=None, added_emb_type=None)
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=HIDDEN, d_hidden=8, n_output=12, background=(0.1, 0.1, 0.1))
    return df.ShapEPipeline(
        prior=prior, text_encoder=clip_text(projection=True), tokenizer=clip_tokenizer(), shap_e_renderer=renderer,
        scheduler=df.HeunDiscreteScheduler(beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True,
                                           clip_sample_range=1.0))


def ltx2() -> Any:
    transformer = df.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4,
        audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2,
        caption_channels=HIDDEN, rope_double_precision=False, rope_type="split")
    connectors = LTX2TextConnectors(
        caption_channels=HIDDEN, text_proj_in_factor=3, video_connector_num_attention_heads=4, video_connector_attention_head_dim=8,
        video_connector_num_layers=1, video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1, audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32, rope_double_precision=False, rope_type="split")
    vae = df.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,), decoder_layers_per_block=(1, 1),
        down_block_types=("LTX2VideoDownBlock3D",), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_type=("spatiotemporal",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1, patch_size_t=1, decoder_causal=False)
    audio_vae = df.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, sample_rate=16000, mel_hop_length=160, mel_bins=8)
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000)
    return df.LTX2Pipeline(
        transformer=transformer, vae=vae, audio_vae=audio_vae, vocoder=vocoder, connectors=connectors, text_encoder=causal_text("Gemma2Model"),
        tokenizer=chat_tokenizer(), scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0))
