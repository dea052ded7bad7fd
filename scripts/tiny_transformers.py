"""Tiny image pipelines whose denoiser is a transformer."""

from __future__ import annotations

from typing import Any

import diffusers as df
import transformers as tf

from scripts.tiny_parts import (
    HIDDEN,
    causal_text,
    chat_tokenizer,
    clip_text,
    clip_tokenizer,
    deep_compression_vae,
    kl_vae,
    qwen25_vl,
    qwen_image_vae,
    qwen_processor,
    shifted_kl_vae,
    t5_text,
    t5_tokenizer,
    umt5_text,
    wan_vae,
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


def qwen_image(pipeline: Any = df.QwenImagePipeline, vae_levels: int = 2, **more: Any) -> Any:
    transformer = df.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=HIDDEN,
        axes_dims_rope=(8, 4, 4))
    return pipeline(**{
        "transformer": transformer, "vae": qwen_image_vae(levels=vae_levels), "text_encoder": qwen25_vl(), "tokenizer": chat_tokenizer(),
        "scheduler": df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02), **more})


def z_image(pipeline: Any = df.ZImagePipeline, **more: Any) -> Any:
    transformer = df.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=HIDDEN, axes_dims=[8, 4, 4], axes_lens=[512, 32, 32])
    return pipeline(**{
        "transformer": transformer, "vae": shifted_kl_vae(), "text_encoder": causal_text("Qwen3Model"), "tokenizer": chat_tokenizer(),
        "scheduler": df.FlowMatchEulerDiscreteScheduler(shift=3.0), **more})


def chroma() -> Any:
    transformer = df.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=HIDDEN, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=1)
    return df.ChromaPipeline(
        transformer=transformer, vae=shifted_kl_vae(), text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=False))


def flux_kontext() -> Any:
    return flux(df.FluxKontextPipeline)


def flux_fill() -> Any:
    return flux(df.FluxFillPipeline, in_channels=16 + 16 + 4 * 4)


def flux_control() -> Any:
    return flux(df.FluxControlPipeline, in_channels=32)


def flux2_klein() -> Any:
    return df.Flux2KleinPipeline(
        transformer=_flux2_transformer(guidance_embeds=False), vae=_flux2_vae(), text_encoder=causal_text("Qwen3ForCausalLM"),
        tokenizer=chat_tokenizer(), scheduler=df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def _flux2_transformer(guidance_embeds: bool) -> Any:
    return df.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=2 * HIDDEN,
        timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds)


def _flux2_vae() -> Any:
    return df.AutoencoderKLFlux2(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16)


def aura_flow() -> Any:
    transformer = df.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=HIDDEN, caption_projection_dim=32, out_channels=4, pos_embed_max_size=256)
    return df.AuraFlowPipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=umt5_text(), tokenizer=t5_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=1.73))


def lumina() -> Any:
    transformer = df.LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
        cross_attention_dim=HIDDEN)
    return df.LuminaPipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=causal_text("GemmaModel"), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler())


def lumina2() -> Any:
    transformer = df.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(512, 32, 32), cap_feat_dim=HIDDEN)
    return df.Lumina2Pipeline(
        transformer=transformer, vae=shifted_kl_vae(), text_encoder=causal_text("Gemma2Model"), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=6.0))


def hidream() -> Any:
    transformer = df.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_channels=[HIDDEN, HIDDEN], text_emb_dim=2 * HIDDEN, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32), llama_layers=[0, 1], force_inference_output=True)
    pipe = df.HiDreamImagePipeline(
        transformer=transformer, vae=shifted_kl_vae(), text_encoder=clip_text(projection=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True), tokenizer_2=clip_tokenizer(), text_encoder_3=t5_text(), tokenizer_3=t5_tokenizer(),
        text_encoder_4=causal_text("LlamaForCausalLM"), tokenizer_4=chat_tokenizer(), scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.default_sample_size = 8  # it resizes every request to this area
    return pipe


def hunyuan_dit() -> Any:
    transformer = df.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4, cross_attention_dim=HIDDEN,
        cross_attention_dim_t5=HIDDEN, pooled_projection_dim=16, hidden_size=32, activation_fn="gelu-approximate", text_len=77,
        text_len_t5=256)
    bert = tf.BertModel(tf.BertConfig(
        vocab_size=len(t5_tokenizer()), hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37))
    return df.HunyuanDiTPipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=bert, tokenizer=t5_tokenizer(77), text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(256), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        scheduler=df.DDPMScheduler(beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear", prediction_type="v_prediction",
                                   clip_sample=False, steps_offset=1))


def hunyuan_image(guidance_embeds: bool = False) -> Any:
    transformer = df.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=HIDDEN, text_embed_2_dim=HIDDEN, rope_axes_dim=(8, 8),
        guidance_embeds=guidance_embeds)
    vae = df.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1, spatial_compression_ratio=2,
        sample_size=16, scaling_factor=0.75)
    guidance = None if guidance_embeds else df.AdaptiveProjectedMixGuidance(
        guidance_scale=3.5, adaptive_projected_guidance_scale=10.0, adaptive_projected_guidance_start_step=1)
    pipe = df.HunyuanImagePipeline(
        transformer=transformer, vae=vae, text_encoder=qwen25_vl(), tokenizer=chat_tokenizer(), text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(), scheduler=df.FlowMatchEulerDiscreteScheduler(shift=5.0), guider=guidance)
    pipe.tokenizer_max_length = 64
    return pipe


def pixart_sigma() -> Any:
    return pixart(df.PixArtSigmaPipeline)


def sana() -> Any:
    transformer = df.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=HIDDEN, sample_size=8)
    return df.SanaPipeline(
        transformer=transformer, vae=deep_compression_vae(), text_encoder=causal_text("Gemma2Model"), tokenizer=chat_tokenizer(),
        scheduler=df.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))


def cogview3() -> Any:
    transformer = df.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4, text_embed_dim=HIDDEN,
        time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8)
    return df.CogView3PlusPipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=t5_text(), tokenizer=t5_tokenizer(), scheduler=df.CogVideoXDDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
            rescale_betas_zero_snr=True, snr_shift_scale=4.0, timestep_spacing="trailing"))


def cogview4() -> Any:
    transformer = df.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, text_embed_dim=HIDDEN,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8))
    return df.CogView4Pipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=causal_text("GlmModel"), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"))


def kandinsky5_image() -> Any:
    pipe = df.Kandinsky5T2IPipeline(vae=shifted_kl_vae(), **kandinsky5_parts())
    pipe.resolutions = [(16, 16)]
    return pipe


def kandinsky5_parts() -> dict[str, Any]:
    transformer = df.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=HIDDEN, in_text_dim2=HIDDEN, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2), model_dim=32,
        ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6))
    return {"transformer": transformer, "text_encoder": qwen25_vl(), "tokenizer": chat_tokenizer(), "text_encoder_2": clip_text(),
            "tokenizer_2": clip_tokenizer(), "scheduler": df.FlowMatchEulerDiscreteScheduler(shift=3.0)}


def bria() -> Any:
    transformer = df.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=HIDDEN, axes_dims_rope=[0, 8, 8])
    return df.BriaPipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler())


def omnigen() -> Any:
    transformer = df.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=1, in_channels=4, time_step_dim=4,
        rope_scaling={"long_factor": [1.0, 1.0], "short_factor": [1.0, 1.0]}, vocab_size=len(chat_tokenizer()), pad_token_id=256)
    return df.OmniGenPipeline(
        transformer=transformer, vae=kl_vae(levels=4), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1))


def dit() -> Any:
    transformer = df.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False)
    return df.DiTPipeline(transformer=transformer, vae=kl_vae(), scheduler=df.DDIMScheduler(clip_sample=False))


def sd3_pag() -> Any:
    return sd3(df.StableDiffusion3PAGPipeline, pag_applied_layers=["blocks.1"])


def qwen_image_edit() -> Any:
    return qwen_image(df.QwenImageEditPipeline, vae_levels=7, processor=qwen_processor())


def amused() -> Any:
    transformer = df.UVit2DModel(
        hidden_size=8, use_bias=False, hidden_dropout=0.0, cond_embed_dim=HIDDEN, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
        encoder_hidden_size=HIDDEN, vocab_size=32, codebook_size=8, in_channels=8, block_out_channels=8, num_res_blocks=1,
        downsample=True, upsample=True, block_num_heads=1, num_hidden_layers=1, num_attention_heads=1, attention_dropout=0.0,
        intermediate_size=8, layer_norm_eps=1e-6, ln_elementwise_affine=True)
    return df.AmusedPipeline(
        transformer=transformer, vqvae=df.VQModel(
            act_fn="silu", block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
            latent_channels=8, num_vq_embeddings=8, norm_num_groups=8, layers_per_block=1),
        tokenizer=clip_tokenizer(), text_encoder=clip_text(projection=True), scheduler=df.AmusedScheduler(mask_token_id=31))


def ovis_image() -> Any:
    transformer = df.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=HIDDEN, axes_dims_rope=(4, 4, 8))
    return df.OvisImagePipeline(
        transformer=transformer, vae=shifted_kl_vae(), text_encoder=causal_text("Qwen3Model"), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def longcat_image() -> Any:
    transformer = df.LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN, axes_dims_rope=[4, 4, 8])
    pipe = df.LongCatImagePipeline(
        transformer=transformer, vae=shifted_kl_vae(16), text_encoder=qwen25_vl(), tokenizer=chat_tokenizer(), text_processor=qwen_processor(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    pipe.tokenizer_max_length = 64
    return pipe


def prx() -> Any:
    transformer = df.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=HIDDEN, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8])
    return df.PRXPipeline(
        transformer=transformer, vae=shifted_kl_vae(), text_encoder=causal_text("Gemma2Model"), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0), default_sample_size=16)


def ernie_image() -> Any:
    transformer = df.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16, text_in_dim=HIDDEN,
        rope_axes_dim=(4, 6, 6))
    return df.ErnieImagePipeline(
        transformer=transformer, vae=_flux2_vae(), text_encoder=causal_text("MistralModel"), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0))


def bria_fibo() -> Any:
    transformer = df.BriaFiboTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=2 * HIDDEN,
        axes_dims_rope=[0, 8, 8], text_encoder_dim=HIDDEN)
    return df.BriaFiboPipeline(
        transformer=transformer, vae=wan_vae(), text_encoder=causal_text("SmolLM3ForCausalLM"), tokenizer=chat_tokenizer(),
        scheduler=df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def sana_sprint() -> Any:
    transformer = df.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=HIDDEN, sample_size=8,
        qk_norm="rms_norm_across_heads", guidance_embeds=True)
    return df.SanaSprintPipeline(
        transformer=transformer, vae=deep_compression_vae(), text_encoder=causal_text("Gemma2Model"), tokenizer=chat_tokenizer(),
        scheduler=df.SCMScheduler())
