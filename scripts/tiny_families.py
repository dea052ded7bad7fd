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
        prompts: two texts of different length, or class labels for class-conditional models.
        expected: "passed", or "refused" for families that no capture can express.
    """

    name: str
    builder: Callable[[], Any]
    call: Mapping[str, Any]
    special: str
    images: int = 0
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


_IMAGE = {"num_inference_steps": 4, "height": 16, "width": 16}
_VIDEO = {**_IMAGE, "num_frames": 5}
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
