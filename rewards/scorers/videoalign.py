"""VideoReward of VideoAlign: visual quality, motion quality and text alignment of videos by Qwen2-VL-2B.

The project is no package: clone it, download ``KwaiVGI/VideoReward`` into a folder, and give both. It takes files only, which are written
without loss. Its chat template puts the prompt behind the tokens of the first two axes, so that only text alignment reads it; a prompt
that holds one of its special tokens would break the batch and is refused. Source: arXiv:2501.13918.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from visalign.protocols import RewardSpec
from visalign.rewards.scorers.pictures import lossless_mp4
from visalign.rewards.scorers.upstream import check_vocabulary, upstream
from visalign.types import Media, Prompt, Scores

AXES = ("VQ", "MQ", "TA")
SPECIAL = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")


class VideoReward:
    """Scores videos: the sum of the normalised axes, roughly -4 to 4, or one of them; larger is better."""

    def __init__(self, project: str, checkpoints: str, axis: str = "Overall", device: str = "cuda", batch_size: int = 4) -> None:
        """
        Args:
            project: the clone's folder.
            checkpoints: folder with ``model_config.json``.
            axis: "Overall", or VQ, MQ or TA alone.
        Raises:
            ValueError: an unknown axis, or a folder that is not there.
        """
        if axis not in ("Overall", *AXES):
            raise ValueError(f"axis '{axis}' is none of Overall, {', '.join(AXES)}")
        module = upstream("inference", "videoalign", project)
        self.model: Any = module.VideoVLMRewardInference(checkpoints, device=device, dtype=torch.bfloat16)
        check_vocabulary(self.model.processor.tokenizer, 150_000, "videoalign")
        self.axis, self.batch_size = axis, batch_size
        self.spec = RewardSpec(name="videoalign", modality=frozenset({"video"}), requires=frozenset({"prompt"}), licence="MIT",
                               model_ids=(checkpoints,), version=axis)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse, naming the row, a prompt that holds a token the model answers at."""
        check_special_tokens(prompts, self.spec.name)

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per video, and every axis as a detail."""
        answers: list[dict[str, float]] = []
        with TemporaryDirectory(prefix="visalign-") as folder:
            for start in range(0, len(media), self.batch_size):
                part = range(start, min(start + self.batch_size, len(media)))
                paths = [Path(folder) / f"{row}.mp4" for row in part]
                for path, row in zip(paths, part, strict=True):
                    lossless_mp4(media[row], path)
                answers += self.model.reward(video_paths=[str(path) for path in paths], prompts=[prompts[row].text for row in part],
                                             use_norm=True)
        details = {axis: torch.tensor([answer[axis] for answer in answers]) for axis in AXES}
        return Scores.from_values([answer[self.axis] for answer in answers], details=details)


def check_special_tokens(prompts: Sequence[Prompt], name: str) -> None:
    """Raise ValueError, naming the row, for a prompt that holds one of the tokens at which the model answers."""
    for row, prompt in enumerate(prompts):
        if found := [token for token in SPECIAL if token in prompt.text]:
            raise ValueError(f"reward '{name}', prompt {row} ({prompt.text[:60]!r}): it contains {found[0]}, at which the model answers; "
                             "remove it")
