"""How a pipeline is asked for prompts: its own keyword arguments, for one prompt, several, or one prompt repeated."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from visalign.samplers.observe import CaptureError
from visalign.types import Prompt

_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class PipelineCall:
    """Builds keyword arguments for a pipeline's call.

    Args:
        pipe: the pipeline; its ``__call__`` signature says what it understands.
        fixed: what the user passes on every call (``num_inference_steps``, ``guidance_scale``, ``height``, ...).
    Raises:
        ValueError: ``fixed`` names an argument that the pipeline's call does not have.
    """

    def __init__(self, pipe: Any, fixed: Mapping[str, Any]) -> None:
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        self.name = type(pipe).__name__
        self.fixed = dict(fixed)
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self.parameters.values())
        unknown = [key for key in fixed if key not in self.parameters and not takes_any]
        if unknown:
            known = sorted(name for name in self.parameters if name not in ("self", "prompt", "negative_prompt"))
            raise ValueError(f"{self.name} has no call argument {', '.join(unknown)}; it takes {', '.join(known)}")

    def understands(self, argument: str) -> bool:
        return argument in self.parameters

    def one(self, prompt: Prompt, seed: int = 0, **more: Any) -> dict[str, Any]:
        """Arguments for a single sample of one prompt."""
        return self._build([prompt], [seed], listed=False, more=more)

    def batch(self, prompts: Sequence[Prompt], seeds: Sequence[int], **more: Any) -> dict[str, Any]:
        """Arguments for one sample of each of several prompts."""
        return self._build(prompts, seeds, listed=True, more=more)

    def repeat(self, prompt: Prompt, seeds: Sequence[int], **more: Any) -> dict[str, Any]:
        """Arguments for ``len(seeds)`` samples of one prompt, by the pipeline's own repeat argument where it has one."""
        for name in _PER_PROMPT:
            if self.understands(name):
                return self._build([prompt], seeds, listed=False, more={name: len(seeds), **more})
        return self._build([prompt] * len(seeds), seeds, listed=len(seeds) > 1, more=more)

    def repeat_prompts(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> dict[str, Any]:
        """`repeat` of the first prompt, with the signature of `batch`."""
        return self.repeat(prompts[0], seeds)

    def _build(self, prompts: Sequence[Prompt], seeds: Sequence[int], listed: bool, more: Mapping[str, Any]) -> dict[str, Any]:
        call: dict[str, Any] = dict(self.fixed)
        if self.understands("prompt"):
            texts = [prompt.text for prompt in prompts]
            call["prompt"] = texts if listed else texts[0]
        elif self.understands("class_labels"):
            call["class_labels"] = [_class_label(prompt, self.name) for prompt in prompts]
        elif self.understands("batch_size"):
            call["batch_size"] = len(seeds)
        if listed:
            call = {key: [value] * len(prompts) if "prompt" in key and isinstance(value, str) else value for key, value in call.items()}
        negatives = [prompt.negative for prompt in prompts]
        if any(negative is not None for negative in negatives):
            if not self.understands("negative_prompt"):
                raise ValueError(f"{self.name} takes no negative_prompt, but a prompt has one ({negatives[0]!r}); remove it from the data")
            default = self.fixed.get("negative_prompt") or ""
            filled = [default if negative is None else negative for negative in negatives]
            call["negative_prompt"] = filled if listed else filled[0]
        if any(prompt.images for prompt in prompts):
            if not self.understands("image"):
                raise ValueError(f"{self.name} takes no image, but a prompt names {prompts[0].images}; use an image-conditioned pipeline")
            images = [_load(prompt.images) for prompt in prompts]
            call["image"] = images if listed else images[0]
        if self.understands("generator"):
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            call["generator"] = generators if len(generators) > 1 else generators[0]
        call.update(more)
        return call


def _class_label(prompt: Prompt, name: str) -> int:
    if not prompt.text.strip().isdigit():
        raise ValueError(f"{name} is conditioned on class labels; its prompts are numbers such as '207', got {prompt.text!r}")
    return int(prompt.text)


def _load(paths: Sequence[str]) -> Any:
    try:
        images = [Image.open(path).convert("RGB") for path in paths]
    except OSError as error:
        raise CaptureError(f"condition image could not be read: {error}; give a path to a PNG, JPEG or WebP file") from error
    return images if len(images) > 1 else images[0]
