"""HPSv3, the preference model on Qwen2-VL-7B, from the package ``hpsv3`` 1.0.0.

Its ``reward`` takes (images, prompts) in the package and (prompts, images) in later sources: it is called by keyword. It answers with mean
and standard deviation; the score is the mean, the other a detail. Source: arXiv:2508.03789.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from visalign.protocols import RewardSpec
from visalign.rewards.scorers.pictures import pil
from visalign.rewards.scorers.upstream import check_vocabulary, upstream
from visalign.types import Media, Prompt, Scores


class HPSv3:
    """Scores images, roughly -5 to 15; larger is better."""

    def __init__(self, checkpoint: str | None = None, config: str | None = None, device: str = "cuda", batch_size: int = 8) -> None:
        """
        Args:
            checkpoint, config: paths; by default MizzenAI/HPSv3 from the hub, and the package's own configuration.
        """
        module = upstream("hpsv3", "hpsv3")
        self.model = module.HPSv3RewardInferencer(config_path=config, checkpoint_path=checkpoint, device=device)
        check_vocabulary(self.model.processor.tokenizer, 150_000, "hpsv3")
        self.batch_size = batch_size
        self.spec = RewardSpec(name="hpsv3", requires=frozenset({"prompt"}), model_ids=(checkpoint or "MizzenAI/HPSv3",), licence="MIT",
                               version="1.0.0")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """The predicted mean of every image; ``sigma`` is the model's own uncertainty as it comes, before any activation."""
        answers = []
        for start in range(0, len(media), self.batch_size):
            part = slice(start, start + self.batch_size)
            answers.append(self.model.reward(image_paths=[pil(sample.data) for sample in media[part]],
                                             prompts=[prompt.text for prompt in prompts[part]]).float().cpu())
        found = torch.cat(answers)
        return Scores.from_values(found[:, 0].tolist(), details={"sigma": found[:, 1]})
