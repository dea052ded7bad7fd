"""Pipelines as a user of diffusers has them: loaded from disk, called, their output turned into media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visalign.config import resolve_path
from visalign.settings import ConfigError, apply_overrides
from visalign.types import Media, Prompt


def choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def torch_dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"dtype '{name}': use {', '.join(dtypes)}")
    return dtypes[name]


def call_arguments(words: Sequence[str]) -> dict[str, Any]:
    """``key=value`` words as keyword arguments of a pipeline's call.

    Raises:
        ConfigError: a word is not ``key=value``.
    """
    call = apply_overrides({}, words)
    if nested := [key for key, value in call.items() if isinstance(value, dict)]:
        raise ConfigError([f"{key}: arguments of the call are flat, key=value" for key in nested], "the call's arguments")
    return call


def load_pipeline(model: str, dtype: str, device: str, adapter: Path | None = None) -> Any:
    """A diffusers pipeline, with an adapter folder loaded as any diffusers user would.

    Raises:
        ValueError: the folder or the adapter is missing.
    """
    from diffusers import DiffusionPipeline

    path = str(resolve_path(model))
    local = path != model or Path(path).exists() or path.startswith((".", "/", "~"))
    if local and not (Path(path) / "model_index.json").is_file():
        raise ValueError(f"'{model}' is not a diffusers pipeline: no model_index.json in {Path(path).resolve()}")
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch_dtype(dtype))
    if adapter is not None:
        load_adapter(pipeline, adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(choose_device(device))


def load_adapter(pipeline: Any, adapter: Path) -> None:
    """What a run trained, into its pipeline: LoRA through the pipeline or peft, or whole components.

    Raises:
        ValueError: the folder holds nothing that fits.
    """
    found = False
    if (adapter / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(str(adapter))
        found = True
    for name, module in pipeline.components.items():
        if (adapter / name / "adapter_config.json").is_file():
            from peft import PeftModel

            setattr(pipeline, name, PeftModel.from_pretrained(module, str(adapter / name)))
            found = True
        elif (adapter / name / "config.json").is_file():
            setattr(pipeline, name, type(module).from_pretrained(adapter / name, dtype=module.dtype))
            found = True
    if not found:
        raise ValueError(f"adapter '{adapter}': nothing in this folder fits the pipeline; a finished run's is RUN/adapter")


def call_pipeline(pipeline: Any, prompt: Prompt, seed: int, call: Mapping[str, Any]) -> Media:
    """One sample. The generator is on the CPU, so that a seed means the same on every machine."""
    arguments: dict[str, Any] = {"prompt": prompt.text, **call, "generator": torch.Generator("cpu").manual_seed(seed)}
    if prompt.negative is not None:
        arguments["negative_prompt"] = prompt.negative
    if prompt.images:
        from diffusers.utils import load_image

        images = [load_image(path) for path in prompt.images]
        arguments["image"] = images[0] if len(images) == 1 else images
    with torch.no_grad():
        return output_media(pipeline(**arguments), rate=_rate(pipeline, call))


def output_media(output: Any, rate: float | None = None) -> Media:
    """The first sample of a pipeline's output.

    Raises:
        ValueError: the output has neither images, frames nor audios.
    """
    if hasattr(output, "images"):
        return Media("image", _pixels(output.images[0]))
    if hasattr(output, "frames"):
        return Media("video", torch.stack([_pixels(frame) for frame in output.frames[0]]), rate=rate or 8.0)
    if hasattr(output, "audios"):
        audio = torch.as_tensor(np.asarray(output.audios[0]), dtype=torch.float32)
        return Media("audio", (audio if audio.ndim == 2 else audio[None]).clamp(-1, 1), rate=rate or 16000.0)
    raise ValueError(f"the pipeline returned {type(output).__name__} without images, frames or audios; it is not supported here")


def _pixels(image: Any) -> torch.Tensor:
    """PIL or float array in [0, 1], height first, as uint8 (3, H, W)."""
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.dtype != np.uint8:
        array = (array.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def _rate(pipeline: Any, call: Mapping[str, Any]) -> float | None:
    """Frames or samples per second, from the call or from where pipelines keep it."""
    if call.get("frame_rate") or call.get("fps"):
        return float(call.get("frame_rate") or call["fps"])
    for part, name in (("vae", "sampling_rate"), ("vocoder", "sampling_rate")):
        config = getattr(getattr(pipeline, part, None), "config", None)
        if config is not None and name in config:
            return float(config[name])
    return None
