"""VideoScore: five axes of a video, each about 1 to 4, by Idefics2-8B with a linear head.

The head's class is Mantis' ``Idefics2ForSequenceClassification``, which transformers does not have. A video is a row of images, one
``<image>`` each behind the instruction and the prompt; 16 frames for VideoScore, 48 for v1.1. "dynamic degree" trades off with
"temporal consistency": their plain sum rewards neither. Source: arXiv:2406.15252.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visalign.protocols import RewardSpec
from visalign.rewards.scorers.pictures import frames
from visalign.rewards.scorers.upstream import check_vocabulary, upstream
from visalign.types import Media, Prompt, Scores

AXES = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency")


class VideoScore:
    """Scores videos by a weighted mean of the axes; larger is better."""

    def __init__(self, instruction: str, model: str = "TIGER-Lab/VideoScore-v1.1", num_frames: int = 48,
                 weights: Mapping[str, float] | None = None, device: str = "cuda") -> None:
        """
        Args:
            instruction: file with the instruction of the model's card, in which ``{text_prompt}`` stands for the prompt; the wording the
                model was trained with.
            weights: of the axes; by default 1 each but 0 for ``dynamic_degree``.
        Raises:
            ValueError: unknown axes, or an instruction without a place for the prompt.
        """
        self.weights = dict(weights or {axis: float(axis != "dynamic_degree") for axis in AXES})
        if unknown := sorted(self.weights.keys() - set(AXES)) or (["nothing"] if sum(self.weights.values()) <= 0 else []):
            raise ValueError(f"weights name {', '.join(unknown)}; the axes are {', '.join(AXES)}, and weights add up to more than 0")
        self.instruction = read_instruction(instruction)
        mantis = upstream("mantis.models.idefics2", "videoscore")
        transformers = upstream("transformers", "videoscore")
        self.processor: Any = transformers.AutoProcessor.from_pretrained(model)
        check_vocabulary(self.processor.tokenizer, 32_000, "videoscore")
        self.model: Any = mantis.Idefics2ForSequenceClassification.from_pretrained(model, torch_dtype=torch.bfloat16).eval().to(device)
        self.num_frames = num_frames
        self.spec = RewardSpec(name="videoscore", modality=frozenset({"video"}), requires=frozenset({"prompt"}), model_ids=(model,),
                               licence="MIT", version=f"{num_frames}-frames-{sorted(self.weights.items())}")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One video at a time: rows of another number of frames do not share a batch."""
        answers = torch.stack([self._ask(sample, prompt) for sample, prompt in zip(media, prompts, strict=True)])
        details = dict(zip(AXES, answers.T, strict=True))
        weights = torch.tensor([self.weights.get(axis, 0.0) for axis in AXES])
        return Scores.from_values((answers @ weights / weights.sum()).tolist(), details=details)

    def _ask(self, sample: Media, prompt: Prompt) -> torch.Tensor:
        images = frames(sample, self.num_frames)
        text = self.instruction.replace("{text_prompt}", prompt.text) + "<image> " * len(images)
        inputs = self.processor(text=text, images=images, return_tensors="pt").to(self.model.device)
        found: torch.Tensor = self.model(**inputs).logits[0, :len(AXES)].float().cpu()
        return found


def read_instruction(path: str) -> str:
    """The file's text.

    Raises:
        ValueError: there is no such file, or it has no place for the prompt.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ValueError(f"instruction '{path}' cannot be read ({error.strerror}); save the one of the model's card there") from error
    if "{text_prompt}" not in text:
        raise ValueError(f"instruction '{path}' does not say where the prompt goes: write {{text_prompt}} there")
    return text
