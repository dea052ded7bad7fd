"""Tiny pipelines whose denoiser is a UNet, or that predate transformers: Stable Diffusion and its kin."""

from __future__ import annotations

from typing import Any

import diffusers as df
from diffusers.pipelines.kolors import ChatGLMModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from torch import nn

from scripts.tiny_parts import (
    HIDDEN,
    clip_image_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    kl_vae,
    movq,
    positioned_tokenizer,
    t5_text,
    t5_tokenizer,
)

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Attention that adds the text's keys to the image's, as in Kandinsky 2 and DeepFloyd IF.
_ADDED_KEYS: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "resnet_time_scale_shift": "scale_shift"}
_NO_FILTER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def unet(channels: int = 4, out_channels: int = 4, cross_attention_dim: int = HIDDEN, **more: Any) -> Any:
    return df.UNet2DConditionModel(**{
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": channels, "out_channels": out_channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross_attention_dim, "attention_head_dim": 4, "norm_num_groups": 4, **more})


def sd15() -> Any:
    scheduler = df.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    return _sd(df.StableDiffusionPipeline, scheduler)


def sd_ddim() -> Any:
    return df.DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


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
    return unet(**{
        "cross_attention_dim": 2 * HIDDEN, "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + HIDDEN,
        "transformer_layers_per_block": (1, 2), "use_linear_projection": True, **more})


def sdxl(pipeline: Any = df.StableDiffusionXLPipeline, **more: Any) -> Any:
    return pipeline(**{
        "vae": kl_vae(), "text_encoder": clip_text(), "text_encoder_2": clip_text(projection=True), "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(), "unet": sdxl_unet(),
        "scheduler": df.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1), **more})


def latent_consistency() -> Any:
    return _sd(df.LatentConsistencyModelPipeline, df.LCMScheduler(**SD_BETAS), unet=unet(time_cond_proj_dim=16))


def sd_ancestral() -> Any:
    return _sd(df.StableDiffusionPipeline, df.EulerAncestralDiscreteScheduler(**SD_BETAS))


def sd_ddpm() -> Any:
    return _sd(df.StableDiffusionPipeline, df.DDPMScheduler(**SD_BETAS, clip_sample=False))


def sd_heun() -> Any:
    return _sd(df.StableDiffusionPipeline, df.HeunDiscreteScheduler(**SD_BETAS))


def sd_inpaint() -> Any:
    return _sd(df.StableDiffusionInpaintPipeline, sd_ddim(), unet=unet(9))


def sd_image_to_image() -> Any:
    return _sd(df.StableDiffusionImg2ImgPipeline, sd_ddim())


def instruct_pix2pix() -> Any:
    return _sd(df.StableDiffusionInstructPix2PixPipeline, sd_ddim(), unet=unet(8))


def sd_pag() -> Any:
    return _sd(df.StableDiffusionPAGPipeline, sd_ddim(), pag_applied_layers="mid")


def controlnet() -> Any:
    control = df.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, in_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=HIDDEN, attention_head_dim=4, norm_num_groups=4, conditioning_embedding_out_channels=(4, 8))
    return _sd(df.StableDiffusionControlNetPipeline, sd_ddim(), controlnet=control)


def unconditional(pipeline: Any, scheduler: Any) -> Any:
    return pipeline(unet=df.UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")), scheduler=scheduler)


def ddpm() -> Any:
    return unconditional(df.DDPMPipeline, df.DDPMScheduler(clip_sample=False))


def ddim() -> Any:
    return unconditional(df.DDIMPipeline, df.DDIMScheduler(clip_sample=False))


def ddim_clipped() -> Any:
    return unconditional(df.DDIMPipeline, df.DDIMScheduler(clip_sample=True))


def kolors() -> Any:
    text = ChatGLMModel(ChatGLMConfig(
        num_layers=2, padded_vocab_size=len(positioned_tokenizer()), hidden_size=HIDDEN, ffn_hidden_size=37, kv_channels=8,
        num_attention_heads=4, seq_length=256, original_rope=True, multi_query_attention=True, multi_query_group_num=2, add_bias_linear=False, rmsnorm=True))
    for parameter in text.parameters():
        nn.init.normal_(parameter, std=0.05)  # its constructor leaves the weights uninitialised
    network = sdxl_unet(cross_attention_dim=24, encoder_hid_dim=HIDDEN, encoder_hid_dim_type="text_proj")
    return df.KolorsPipeline(
        vae=kl_vae(), text_encoder=text, tokenizer=positioned_tokenizer(), unet=network,
        scheduler=df.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear", steps_offset=1))


def kandinsky22() -> Any:
    network = unet(
        out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj", encoder_hid_dim=HIDDEN, **_ADDED_KEYS)
    return df.KandinskyV22Pipeline(unet=network, movq=movq(), scheduler=df.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1))


def kandinsky3() -> Any:
    network = df.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2, block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=8, encoder_hid_dim=HIDDEN)
    return df.Kandinsky3Pipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), unet=network, movq=movq(), scheduler=df.DDPMScheduler(
            beta_start=0.00085, beta_end=0.02, beta_schedule="squaredcos_cap_v2", clip_sample=False))


def deepfloyd() -> Any:
    network = unet(
        3, 6, addition_embed_type="text", addition_embed_type_num_heads=2, encoder_hid_dim=HIDDEN, act_fn="gelu",
        cross_attention_norm="group_norm", **_ADDED_KEYS)
    return df.IFPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), unet=network, safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False, scheduler=df.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range",
                                                                  prediction_type="epsilon", thresholding=True, clip_sample=False))


def stable_cascade_prior() -> Any:
    prior = df.StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=16, block_out_channels=(16,), num_attention_heads=(2,), down_num_layers_per_block=(1,),
        up_num_layers_per_block=(1,), down_blocks_repeat_mappers=(1,), up_blocks_repeat_mappers=(1,), clip_image_in_channels=HIDDEN,
        clip_text_in_channels=HIDDEN, clip_text_pooled_in_channels=HIDDEN, timestep_ratio_embedding_dim=8, switch_level=(False,),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),), dropout=(0.0,))
    return df.StableCascadePriorPipeline(
        tokenizer=clip_tokenizer(), text_encoder=clip_text(projection=True), prior=prior, scheduler=df.DDPMWuerstchenScheduler(),
        image_encoder=clip_vision(), feature_extractor=clip_image_processor())


def consistency_model() -> Any:
    network = df.UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return df.ConsistencyModelPipeline(unet=network, scheduler=df.CMStochasticIterativeScheduler(clip_denoised=False))
