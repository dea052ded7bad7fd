"""Pipelines as a user of diffusers has them: loaded from disk, called, their output turned into media."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visalign.commands.plan import model_folder
from visalign.config import resolve_path
from visalign.settings import ConfigError, apply_overrides, did_you_mean
from visalign.types import Media, Prompt


def choose_device(device: str, setting: str = "--device") -> str:
    """``auto`` as the device it stands for, any other as it is; ``setting`` is what messages call it.

    Raises:
        ValueError: not ``cpu``, ``cuda``, ``cuda:N`` or ``auto``, or torch sees no such GPU.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if not match:
        hint = "; NVIDIA and AMD GPUs are both called cuda" if device.startswith("gpu") else ""
        raise ValueError(f"{setting} '{device}': use cpu, cuda, cuda:N or auto{hint}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"{setting} '{device}': torch {torch.__version__} sees no GPU; use cpu or auto, or check nvidia-smi and that "
                         "torch was installed for this GPU")
    if match[1] and int(match[1]) >= torch.cuda.device_count():
        raise ValueError(f"{setting} '{device}': torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0")
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
        ValueError: the folder or the adapter is missing or damaged, the hub cannot be reached, or there is no such device.
    """
    from safetensors import SafetensorError

    device = choose_device(device)
    try:
        pipeline = read_pipeline(model, dtype)
        if adapter is not None:
            load_adapter(pipeline, adapter)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if damaged := damaged_weights(folder for folder in (model_folder(model), adapter) if folder is not None):
            raise ValueError(f"weights file {damaged} is damaged: copy or download it again") from error
        raise
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def read_pipeline(model: str, dtype: str) -> Any:
    """A diffusers pipeline from a folder or the hub.

    Raises:
        ValueError: there is none.
    """
    from diffusers import DiffusionPipeline

    path = str(resolve_path(model))
    local = path != model or Path(path).exists() or path.startswith((".", "/", "~"))
    if local and not (Path(path) / "model_index.json").is_file():
        raise ValueError(f"'{model}' is not a diffusers pipeline: no model_index.json in {Path(path).resolve()}")
    try:
        return DiffusionPipeline.from_pretrained(path, dtype=torch_dtype(dtype))
    except OSError as error:
        if local or model_folder(model) is not None:
            raise
        raise ValueError(f"'{model}' is not on disk and could not be fetched from the hub (offline, misspelt or gated?): give a folder "
                         "with model_index.json, or org/name of a model this machine can download") from error


def damaged_weights(folders: Iterable[Path]) -> Path | None:
    """The first safetensors file whose header cannot be read or does not match its length."""
    from safetensors import SafetensorError, safe_open

    for folder in folders:
        for file in sorted(folder.rglob("*.safetensors")):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError):
                return file
    return None


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

            PeftModel.from_pretrained(module, str(adapter / name))  # adapts the module's layers in place; the pipeline keeps its module
            found = True
        elif (adapter / name / "config.json").is_file():
            setattr(pipeline, name, type(module).from_pretrained(adapter / name, dtype=module.dtype))
            found = True
    if not found and not (adapter / "users.json").is_file():  # users alone
        raise ValueError(f"adapter '{adapter}': nothing in this folder fits the pipeline; a finished run's is RUN/adapter")


def check_call(pipeline: Any, names: Iterable[str]) -> None:
    """Refuse arguments that the pipeline's call does not take, before anything is computed.

    Raises:
        ConfigError: there are some.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name != "self"]
    if unknown := [name for name in names if name not in known]:
        takes = f"; it takes {', '.join(known)}"
        raise ConfigError([f"{name}: no such argument{did_you_mean(name, known) or takes}" for name in unknown],
                          f"the call of {type(pipeline).__name__}")


def call_pipeline(pipeline: Any, prompt: Prompt, seed: int, call: Mapping[str, Any]) -> Media:
    """One sample. The generator is on the CPU, so that a seed means the same on every machine.

    Raises:
        ValueError: the call refuses the type of an argument.
    """
    arguments: dict[str, Any] = {"prompt": prompt.text, **call, "generator": torch.Generator("cpu").manual_seed(seed)}
    if prompt.negative is not None:
        arguments["negative_prompt"] = prompt.negative
    if prompt.images:
        from diffusers.utils import load_image

        images = [load_image(path) for path in prompt.images]
        arguments["image"] = images[0] if len(images) == 1 else images
    with torch.no_grad():
        try:
            output = pipeline(**arguments)
        except TypeError as error:
            given = ", ".join(f"{key}={value!r}" for key, value in call.items()) or "no arguments of yours"
            raise ValueError(f"{type(pipeline).__name__} cannot be called with {given}: {error}") from error
    return output_media(output, rate=_rate(pipeline, call))


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
