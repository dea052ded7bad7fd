"""The embedded world's exact verifier as a reward: does the picture show what its caption says, skill by skill?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from visalign.playground import verifier, world
from visalign.protocols import RewardSpec
from visalign.types import Media, Prompt, Scores


class CaptionVerifier:
    """Share of the skills a caption names (colour, count, shape, size, relation) that the picture gets right.

    Details: each skill, 1 or 0, NaN where the caption does not test it; and both summaries, ``mean`` and ``strict``, since ``mean``
    can rise alone.
    """

    spec = RewardSpec(name="captions", requires=frozenset({"prompt"}), raw_range=(0.0, 1.0))

    def __init__(self, metric: Literal["mean", "strict"] = "mean") -> None:
        """
        Args:
            metric: "mean" of the skills, or "strict": 1 if all of them are right, else 0.
        """
        if metric not in ("mean", "strict"):
            raise ValueError(f"metric {metric!r} is neither 'mean' nor 'strict'")
        self.metric = metric
        self.spec = replace(self.spec, version=metric)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse captions outside the world's grammar.

        Raises:
            ValueError: names the row and the forms the grammar has.
        """
        for row, prompt in enumerate(prompts):
            try:
                world.parse(prompt.text)
            except ValueError as error:
                raise ValueError(f"reward 'captions', prompt {row}: {error}; for free prompts use another reward, such as clip") from error

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Verdicts on all samples, square images of one size."""
        self.check_prompts(prompts)
        sizes = {tuple(sample.data.shape) for sample in media}
        if len(sizes) > 1:
            raise ValueError(f"reward 'captions' judges images of one size per call, got {sorted(sizes)}")
        verdict = verifier.verify(torch.stack([sample.data.cpu() for sample in media]), [prompt.text for prompt in prompts])
        raw = verdict.mean if self.metric == "mean" else verdict.strict
        return Scores(raw=raw, value=raw.clone(), valid=torch.ones(len(media), dtype=torch.bool), reasons=(None,) * len(media),
                      details={**verdict.skills, "mean": verdict.mean, "strict": verdict.strict})
