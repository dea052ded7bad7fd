"""Audiobox aesthetics from the package ``audiobox_aesthetics`` 0.0.4: enjoyment (CE), usefulness (CU), complexity (PC), quality (PQ).

Each axis is about 1 to 10. Complexity is not better when it is larger: the score is the mean of the other three unless asked otherwise.
The package resamples to 16 kHz mono and averages windows of 10 s by their length. It needs torchaudio, which ends at 2.11 and fails on
torch 2.15; with torch up to 2.13 it works in a run's own process, too. Source: arXiv:2502.05139.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from visalign.protocols import RewardSpec
from visalign.rewards.scorers.upstream import upstream
from visalign.types import Media, Prompt, Scores

AXES = ("CE", "CU", "PC", "PQ")


class AudioboxAesthetics:
    """Scores sound by the mean of some axes; larger is better."""

    def __init__(self, checkpoint: str | None = None, axes: Sequence[str] = ("CE", "CU", "PQ"), batch_size: int = 8) -> None:
        """
        Args:
            checkpoint: path; by default facebook/audiobox-aesthetics from the hub.
        Raises:
            ValueError: unknown axes.
        """
        if not axes or (unknown := sorted(set(axes) - set(AXES))):
            raise ValueError(f"axes {', '.join(unknown) if axes else 'none'}: choose of {', '.join(AXES)}")
        # The predictor takes the GPU if there is one.
        self.model: Any = upstream("audiobox_aesthetics.infer", "audiobox").AesPredictor(checkpoint_pth=checkpoint)
        self.axes, self.batch_size = tuple(axes), batch_size
        self.spec = RewardSpec(name="audiobox", modality=frozenset({"audio"}), raw_range=(1.0, 10.0), licence="CC-BY-4.0",
                               model_ids=(checkpoint or "facebook/audiobox-aesthetics",), version=f"0.0.4-{'-'.join(axes)}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per sound, and every axis as a detail; prompts are not read."""
        answers: list[dict[str, float]] = []
        for start in range(0, len(media), self.batch_size):
            answers += self.model.forward([{"path": sample.data, "sample_rate": round(sample.rate or 0)}
                                           for sample in media[start:start + self.batch_size]])
        details = {axis: torch.tensor([answer[axis] for answer in answers]) for axis in AXES}
        return Scores.from_values([sum(answer[axis] for axis in self.axes) / len(self.axes) for answer in answers], details=details)
