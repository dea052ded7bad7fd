"""Every pipeline family that can be built in memory with tiny random weights, and how it is called.

The registry is what `scripts/capture_families.py` sweeps and what `tests/samplers/test_capture_families.py` asserts. Weights are random
and nothing is downloaded; calls use guidance that matters, small sizes and few steps.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts import tiny_transformers as dit
from scripts import tiny_unets as unets
from scripts import tiny_videos as videos
from scripts.tiny_parts import randomise_zeros, seeded


@dataclass(frozen=True)
class Family:
    """One pipeline family.

    Attributes:
        name: as in the table and in test ids.
        builder: makes the pipeline; random weights follow the global seed.
        call: what a user passes on every call besides the prompt.
        special: what makes capturing this family interesting.
        images: condition images per prompt.
        sampled_condition: the pipeline draws its condition latents with the call's generator; capture takes seed 0's draw for every seed.
        prompts: two texts of different length, or class labels for class-conditional models.
        expected: "passed", or "refused" for families that no capture can express.
    """

    name: str
    builder: Callable[[], Any]
    call: Mapping[str, Any]
    special: str
    images: int = 0
    sampled_condition: bool = False
    prompts: tuple[str, str] = ("a photo of a dog", "two red squares above a very large green circle")
    expected: str = "passed"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The pipeline, the same weights every time."""
        seeded(0)
        pipe = self.builder(**self.options)
        seeded(1)
        randomise_zeros(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def condition_images(self, prompt: int) -> tuple[str, ...]:
        """Paths of this prompt's condition images."""
        return tuple(_picture(10 * prompt + i) for i in range(self.images))


@functools.cache
def _picture(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = Path(tempfile.mkdtemp()) / f"{seed}.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def _mask(mode: str = "L") -> Image.Image:
    """White right half: what an inpainting pipeline fills in."""
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:, 8:] = 255
    return Image.fromarray(pixels).convert(mode)


def _embeds(hidden: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"image_embeds": torch.randn(1, hidden, generator=generator), "negative_image_embeds": torch.randn(1, hidden, generator=generator)}


_IMAGE = {"num_inference_steps": 4, "height": 16, "width": 16}
_VIDEO = {**_IMAGE, "num_frames": 5}
_PIXELS = {"num_inference_steps": 4, "height": 8, "width": 8}
_TEMPLATE = {"prompt_template": {"template": "{}", "crop_start": 0}}
_BLURRY = {"negative_prompt": "blurry"}

FAMILIES: tuple[Family, ...] = (
    Family("Stable Diffusion 1.5", unets.sd15, {**_IMAGE, **_BLURRY, "guidance_scale": 7.5}, "PNDM as shipped: multistep, one level visited twice"),
    Family("Stable Diffusion, v-prediction", unets.sd_v_prediction, {**_IMAGE, "guidance_scale": 5.0}, "DDIM, v-prediction"),
    Family("Stable Diffusion, zero SNR", unets.sd_zero_snr, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "guidance_rescale": 0.7},
           "first level is pure noise; guidance rescale"),
    Family("Stable Diffusion XL", unets.sdxl, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0}, "sigma-space state, scaled input; pooled text and size ids"),
    Family("Stable Diffusion 3", dit.sd3, {**_IMAGE, **_BLURRY, "guidance_scale": 4.5, "max_sequence_length": 24}, "three text encoders"),
    Family("Flux", dit.flux, {**_IMAGE, "guidance_scale": 3.5, "max_sequence_length": 24}, "guidance as an input tensor; packed tokens"),
    Family("Flux, true CFG", dit.flux, {**_IMAGE, **_BLURRY, "true_cfg_scale": 2.0, "max_sequence_length": 24}, "guidance twice: embedded and two calls"),
    Family("PixArt-alpha", dit.pixart, {**_IMAGE, **_BLURRY, "guidance_scale": 4.5, "max_sequence_length": 24, "use_resolution_binning": False, "clean_caption": False},
           "learned variance; ragged masks; multistep solver"),
    Family("Qwen-Image", dit.qwen_image, {**_IMAGE, **_BLURRY, "true_cfg_scale": 4.0}, "guidance rescaled to the conditional norm per token"),
    Family("Z-Image", dit.z_image, {**_IMAGE, **_BLURRY, "guidance_scale": 4.0, "max_sequence_length": 64}, "list inputs, time 1 - sigma, negated output"),
    Family("Wan 2.1", videos.wan, {**_VIDEO, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24}, "multistep flow solver; two calls"),
    Family("Wan 2.2", videos.wan22, {**_VIDEO, **_BLURRY, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "max_sequence_length": 24},
           "two transformers switched at a boundary, each with its own guidance"),
    Family("Wan 2.2 TI2V", videos.wan22_ti2v, {**_VIDEO, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24}, "one timestep per token"),
    Family("CogVideoX", videos.cogvideox, {**_VIDEO, **_BLURRY, "guidance_scale": 6.0, "max_sequence_length": 24}, "frames before channels; zero SNR"),
    Family("CogVideoX, dynamic CFG", videos.cogvideox, {**_VIDEO, "guidance_scale": 6.0, "use_dynamic_cfg": True, "max_sequence_length": 24},
           "rotary positions; guidance moves with the step", options={"rotary": True}),
    Family("Stable Audio", videos.stable_audio, {"num_inference_steps": 4, "guidance_scale": 7.0, "negative_prompt": "noise", "audio_end_in_s": 0.05},
           "waveform autoencoder; EDM preconditioning; multistep solver"),
    Family("Stable Diffusion, Euler ancestral", unets.sd_ancestral, {**_IMAGE, "guidance_scale": 5.0}, "scheduler adds noise"),
    Family("Stable Diffusion, DDPM", unets.sd_ddpm, {**_IMAGE, "guidance_scale": 5.0}, "scheduler adds noise"),
    Family("Stable Diffusion, Heun", unets.sd_heun, {**_IMAGE, "guidance_scale": 5.0}, "second-order scheduler: two calls per level"),
    Family("Stable Diffusion, latent consistency", unets.latent_consistency, {**_IMAGE, "guidance_scale": 8.5}, "guidance embedded; consistency step"),
    Family("Stable Diffusion, PAG", unets.sd_pag, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "pag_scale": 2.0}, "three rows per sample: perturbed attention"),
    Family("Stable Diffusion, ControlNet", unets.controlnet, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0},
           "a second network feeds residuals to the denoiser", images=1),
    Family("InstructPix2Pix", unets.instruct_pix2pix, {"num_inference_steps": 4, "guidance_scale": 5.0, "image_guidance_scale": 1.5, **_BLURRY},
           "three rows per sample, condition latents on the channel axis", images=1),
    Family("Stable Diffusion, inpainting", unets.sd_inpaint, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "mask_image": _mask()},
           "mask and masked latents on the channel axis", images=1, sampled_condition=True),
    Family("Stable Diffusion, image to image", unets.sd_image_to_image, {"num_inference_steps": 6, "strength": 0.6, "guidance_scale": 5.0},
           "starts part of the way", images=1, expected="refused"),
    Family("Kolors", unets.kolors, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 48}, "ChatGLM text encoder, sequence-first"),
    Family("Kandinsky 2.2 decoder", unets.kandinsky22, {**_IMAGE, "guidance_scale": 4.0, **_embeds()}, "conditioned on image embeddings; learned variance"),
    Family("Kandinsky 3", unets.kandinsky3, {**_IMAGE, **_BLURRY, "guidance_scale": 3.0}, "quantised autoencoder; scheduler adds noise"),
    Family("DeepFloyd IF", unets.deepfloyd, {**_PIXELS, **_BLURRY, "guidance_scale": 7.0}, "pixel space; dynamic thresholding", expected="refused"),
    Family("Stable Cascade prior", unets.stable_cascade_prior, {**_IMAGE, **_BLURRY, "guidance_scale": 4.0}, "ratio time; decodes to embeddings", expected="refused"),
    Family("DDPM", unets.ddpm, {"num_inference_steps": 4}, "unconditional, pixel space, scheduler adds noise"),
    Family("DDIM", unets.ddim, {"num_inference_steps": 4}, "unconditional, pixel space"),
    Family("DDIM, clipped", unets.ddim_clipped, {"num_inference_steps": 4}, "scheduler clips its x0 estimate", expected="refused"),
    Family("DiT", dit.dit, {"num_inference_steps": 4, "guidance_scale": 4.0}, "class labels; guidance on half the rows; learned variance", prompts=("207", "3"), expected="refused"),
    Family("Flux Kontext", dit.flux_kontext, {**_IMAGE, "guidance_scale": 3.5, "max_sequence_length": 24, "max_area": 256, "_auto_resize": False},
           "condition tokens behind the state's tokens", images=1, sampled_condition=True),
    Family("Flux Fill", dit.flux_fill, {**_IMAGE, "guidance_scale": 30.0, "max_sequence_length": 24, "mask_image": _mask()},
           "masked image and mask on the channel axis", images=1, sampled_condition=True),
    Family("Flux Control", dit.flux_control, {**_IMAGE, "guidance_scale": 10.0, "max_sequence_length": 24, "control_image": _mask("RGB")},
           "control latents on the channel axis", sampled_condition=True),
    Family("Flux 2 Klein", dit.flux2_klein, {**_IMAGE, "guidance_scale": 4.0, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2)},
           "batch-normalised patched latents"),
    Family("Chroma", dit.chroma, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24}, "modulation from an approximator; attention masks"),
    Family("AuraFlow", dit.aura_flow, {**_IMAGE, **_BLURRY, "guidance_scale": 3.5, "max_sequence_length": 24}, "register tokens"),
    Family("Lumina-Next", dit.lumina, {**_IMAGE, "height": 32, "width": 32, **_BLURRY, "guidance_scale": 4.0, "max_sequence_length": 48, "clean_caption": False},
           "time runs from 0 to 1; guidance on the first channels"),
    Family("Lumina 2", dit.lumina2, {**_IMAGE, **_BLURRY, "guidance_scale": 4.0, "cfg_trunc_ratio": 0.75}, "truncated guidance, rescaled to the conditional norm"),
    Family("HiDream", dit.hidream, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24}, "four text encoders; mixture of experts; negated output"),
    Family("Hunyuan-DiT", dit.hunyuan_dit, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "use_resolution_binning": False}, "two text towers; learned variance"),
    Family("HunyuanImage 2.1", dit.hunyuan_image, {**_IMAGE, **_BLURRY}, "projected guidance with momentum", expected="refused"),
    Family("HunyuanImage 2.1, distilled", dit.hunyuan_image, {**_IMAGE, "distilled_guidance_scale": 3.25}, "guidance as an input tensor",
           options={"guidance_embeds": True}),
    Family("PixArt-sigma", dit.pixart_sigma, {**_IMAGE, **_BLURRY, "guidance_scale": 4.5, "max_sequence_length": 24, "use_resolution_binning": False,
                                              "clean_caption": False}, "learned variance"),
    Family("Sana", dit.sana, {**_IMAGE, "height": 32, "width": 32, **_BLURRY, "guidance_scale": 4.5, "max_sequence_length": 48, "use_resolution_binning": False,
                              "complex_human_instruction": None}, "deep-compression autoencoder; multistep flow solver"),
    Family("CogView 3+", dit.cogview3, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24}, "zero SNR, v-prediction"),
    Family("CogView 4", dit.cogview4, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 48}, "dynamic linear shift; padded text"),
    Family("Kandinsky 5 image", dit.kandinsky5_image, {**_IMAGE, **_BLURRY, "guidance_scale": 3.5, "max_sequence_length": 64}, "channels last"),
    Family("Bria", dit.bria, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24}, "packed tokens, T5 only"),
    Family("OmniGen", dit.omnigen, {**_IMAGE, "height": 64, "width": 64, "guidance_scale": 2.5}, "text and image in one transformer; inverted sigmas"),
    Family("Stable Diffusion 3, PAG", dit.sd3_pag, {**_IMAGE, **_BLURRY, "guidance_scale": 4.5, "pag_scale": 2.0, "max_sequence_length": 24},
           "three rows per sample"),
    Family("Qwen-Image-Edit", dit.qwen_image_edit, {"num_inference_steps": 3, "height": 256, "width": 256, **_BLURRY, "true_cfg_scale": 4.0},
           "condition tokens behind the state's tokens; images in the text encoder", images=1),
    Family("Amused", dit.amused, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0}, "masked tokens, no noise", expected="refused"),
    Family("CogVideoX image to video", videos.cogvideox_image, {**_VIDEO, **_BLURRY, "guidance_scale": 6.0, "max_sequence_length": 24},
           "condition frames on the channel axis", images=1, sampled_condition=True),
    Family("Wan 2.1 image to video", videos.wan_image, {**_VIDEO, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24},
           "mask and condition latents on the channel axis; image encoder", images=1),
    Family("Wan 2.2 image to video", videos.wan22_image, {**_VIDEO, **_BLURRY, "guidance_scale": 3.5, "max_sequence_length": 24},
           "two transformers, condition channels", images=1),
    Family("Wan 2.2 TI2V, with image", videos.wan22_image_tokens, {**_VIDEO, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24},
           "the first frame is replaced by the condition in every step", images=1),
    Family("SkyReels V2", videos.skyreels, {**_VIDEO, **_BLURRY, "guidance_scale": 6.0, "max_sequence_length": 24}, "frame-rate aware Wan"),
    Family("SkyReels V2, diffusion forcing", videos.skyreels_forcing, {**_VIDEO, **_BLURRY, "guidance_scale": 6.0, "max_sequence_length": 24},
           "one noise level per frame, a scheduler per frame", expected="refused"),
    Family("HunyuanVideo", videos.hunyuan_video, {**_VIDEO, "height": 32, "width": 32, "guidance_scale": 6.0, "max_sequence_length": 24, **_TEMPLATE},
           "guidance as an input tensor"),
    Family("HunyuanVideo, true CFG", videos.hunyuan_video, {**_VIDEO, **_BLURRY, "height": 32, "width": 32, "true_cfg_scale": 3.0,
                                                            "max_sequence_length": 24, **_TEMPLATE}, "guidance twice"),
    Family("HunyuanVideo 1.5", videos.hunyuan_video15, {**_VIDEO, **_BLURRY}, "guider object; condition channels; three text streams"),
    Family("LTX-Video", videos.ltx, {**_VIDEO, "height": 32, "width": 32, **_BLURRY, "guidance_scale": 3.0, "max_sequence_length": 24}, "packed tokens"),
    Family("LTX-Video image to video", videos.ltx_image, {**_VIDEO, "height": 32, "width": 32, **_BLURRY, "guidance_scale": 3.0, "max_sequence_length": 24},
           "one timestep per token; the first frame is kept clean", images=1, sampled_condition=True),
    Family("Mochi", videos.mochi, {**_VIDEO, **_BLURRY, "num_frames": 7, "guidance_scale": 4.5, "max_sequence_length": 24}, "inverted sigmas"),
    Family("Allegro", videos.allegro, {**_VIDEO, **_BLURRY, "num_frames": 24, "guidance_scale": 7.5, "max_sequence_length": 24, "clean_caption": False},
           "ancestral scheduler"),
    Family("Latte", videos.latte, {**_IMAGE, **_BLURRY, "video_length": 2, "guidance_scale": 7.5, "clean_caption": False}, "learned variance, video"),
    Family("EasyAnimate", videos.easy_animate, {**_VIDEO, **_BLURRY, "guidance_scale": 5.0}, "Qwen2-VL text"),
    Family("Cosmos 1", videos.cosmos, {**_VIDEO, **_BLURRY, "num_frames": 9, "guidance_scale": 7.0, "max_sequence_length": 24},
           "EDM preconditioning in the scheduler", expected="refused"),
    Family("Cosmos 2 image", videos.cosmos2_image, {**_IMAGE, **_BLURRY, "guidance_scale": 7.0, "max_sequence_length": 24},
           "preconditioning by hand: the state enters the model output"),
    Family("AnimateDiff", videos.animate_diff, {**_IMAGE, **_BLURRY, "num_frames": 3, "guidance_scale": 7.5}, "frames as rows of the batch"),
    Family("Text-to-video SD", videos.text_to_video, {**_IMAGE, **_BLURRY, "num_frames": 3, "guidance_scale": 9.0},
           "scheduler steps on reshaped frames"),
    Family("I2VGen-XL", videos.image_to_video_xl, {**_IMAGE, **_BLURRY, "num_frames": 3, "guidance_scale": 9.0, "clip_skip": None}, "image latents as an argument", images=1, sampled_condition=True),
    Family("Stable Video Diffusion", videos.stable_video, {**_IMAGE, "num_frames": 3, "max_guidance_scale": 3.0}, "guidance differs per frame", images=1, sampled_condition=True),
    Family("Sana Video", videos.sana_video, {**_IMAGE, "height": 32, "width": 32, **_BLURRY, "frames": 5, "guidance_scale": 6.0, "max_sequence_length": 48,
                                             "use_resolution_binning": False, "complex_human_instruction": None}, "linear attention video"),
    Family("Kandinsky 5 video", videos.kandinsky5_video, {**_VIDEO, **_BLURRY, "height": 32, "width": 32, "guidance_scale": 5.0, "max_sequence_length": 64},
           "channels last, video"),
    Family("Ovis-Image", dit.ovis_image, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 160}, "packed tokens, Qwen text"),
    Family("LongCat-Image", dit.longcat_image, {**_IMAGE, **_BLURRY, "guidance_scale": 4.5, "enable_prompt_rewrite": False},
           "guidance renormalised per token", expected="refused"),
    Family("PRX", dit.prx, {**_IMAGE, **_BLURRY, "guidance_scale": 4.0, "use_resolution_binning": False, "skip_text_cleaning": True, "tokenizer_max_length": 64}, "text-query attention"),
    Family("ERNIE-Image", dit.ernie_image, {**_IMAGE, **_BLURRY, "guidance_scale": 4.0}, "ragged text; batch-normalised patched latents"),
    Family("Bria FIBO", dit.bria_fibo, {**_IMAGE, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 64}, "one text state per layer"),
    Family("Sana Sprint", dit.sana_sprint, {**_IMAGE, "height": 32, "width": 32, "guidance_scale": 4.5, "max_sequence_length": 48, "num_inference_steps": 3,
                                            "intermediate_timesteps": None, "use_resolution_binning": False, "complex_human_instruction": None},
           "trigonometric flow: the pipeline converts state and output by hand", expected="refused"),
    Family("Wan VACE", videos.wan_vace, {**_VIDEO, **_BLURRY, "guidance_scale": 5.0, "max_sequence_length": 24}, "control video in a side branch"),
    Family("Consistency model", unets.consistency_model, {"num_inference_steps": 3}, "consistency step: adds noise every step",
           prompts=("207", "3"), expected="refused"),
    Family("LTX-2", videos.ltx2, {**_VIDEO, **_BLURRY, "height": 32, "width": 32, "max_sequence_length": 48, "stg_scale": 0.0, "audio_stg_scale": 0.0},
           "video and audio latents jointly, two schedulers", expected="refused"),
    Family("Shap-E", videos.shap_e, {"num_inference_steps": 4, "guidance_scale": 4.0, "frame_size": 32}, "latents of an implicit function; clipping", expected="refused"),
)


def by_name(name: str) -> Family:
    """The family of this name.

    Raises:
        ValueError: no such family.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"no family {name!r}; there are {', '.join(family.name for family in FAMILIES)}")
