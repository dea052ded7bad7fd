"""VQAScore from ``t2v_metrics``: P("Yes" | image, 'Does this figure show "{text}"? Please answer yes or no.').

This is P(Yes), not P(Yes) / (P(Yes) + P(No)), which others call by the same name. The package takes paths, and with m images and n texts
answers all m x n; images are asked one by one with their own text. Source: arXiv:2404.01291.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from visalign.protocols import RewardSpec
from visalign.rewards.scorers.pictures import pil
from visalign.rewards.scorers.upstream import upstream
from visalign.types import Media, Prompt, Scores


class VQAScore:
    """Scores images in [0, 1]; larger is better."""

    def __init__(self, model: str = "clip-flant5-xxl", device: str = "cuda") -> None:
        """
        Args:
            model: one of the package's names.
        """
        self.model: Any = upstream("t2v_metrics", "vqascore").VQAScore(model=model, device=device)
        self.spec = RewardSpec(name="vqascore", requires=frozenset({"prompt"}), raw_range=(0.0, 1.0), model_ids=(model,), version="3.0")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One number per image."""
        values = []
        with TemporaryDirectory(prefix="visalign-") as folder:
            for row, (sample, prompt) in enumerate(zip(media, prompts, strict=True)):
                path = Path(folder) / f"{row}.png"
                pil(sample.data).save(path)
                values.append(float(self.model(images=[str(path)], texts=[prompt.text]).reshape(())))
        return Scores.from_values(values)
