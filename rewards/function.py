"""A plain function as a reward: ``f(media, prompts) -> one number or None per sample``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal

import torch

from visalign.protocols import ALL_MEDIA, RewardSpec
from visalign.types import Media, MediaKind, Prompt, Scores

ScoreFunction = Callable[[Sequence[Media], Sequence[Prompt]], Sequence[float | None]]


class FunctionReward:
    """Wraps ``function``, which sees the samples of a call and their prompts, row by row, and returns one number per sample.

    ``None`` marks a sample it could not score ("no score"), NaN and infinity become "nonfinite": both are masked out of every
    statistic. An exception is not a score: it ends the run with the reward's name attached.

        def redness(media, prompts):
            return [sample.data[0].float().mean().item() / 255 for sample in media]
    """

    spec = RewardSpec(name="function", modality=ALL_MEDIA)

    def __init__(self, function: ScoreFunction, name: str | None = None, modality: Sequence[MediaKind] = ("image",),
                 direction: Literal[1, -1] = 1, requires: Sequence[str] = ()) -> None:
        """
        Args:
            function: the scorer; a list, tuple, 1-D tensor or array of its numbers is accepted.
            name: key of its logs, by default the function's name.
            modality: kinds of media it reads.
            direction: -1 when a smaller number is better.
            requires: ``Prompt.metadata`` keys it reads; "prompt" for the text itself.
        """
        if isinstance(modality, str) or isinstance(requires, str):
            raise ValueError('modality and requires are lists of names: write ["image"], not "image"')
        if direction not in (1, -1):
            raise ValueError(f"direction {direction!r} is neither 1 (larger is better) nor -1 (smaller is better)")
        self.function = function
        self.spec = RewardSpec(name=name or str(getattr(function, "__name__", type(function).__name__)),
                               modality=frozenset(modality), direction=direction, requires=frozenset(requires))

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per sample.

        Raises:
            ValueError: the function returned another number of values than it was given samples.
            ValueError: it returned something that is not a sequence of numbers and ``None``.
        """
        returned: Any = self.function(media, prompts)
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise ValueError(f"reward '{self.spec.name}' returned {type(returned).__name__}; expected a list with one number "
                            "or None per sample")
        if len(values) != len(media):
            raise ValueError(f"reward '{self.spec.name}' returned {len(values)} values for {len(media)} samples; return one per "
                             "sample, None where there is no score")
        return Scores.from_values([self._number(row, value) for row, value in enumerate(values)], direction=self.spec.direction)

    def _number(self, row: int, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real):
            raise ValueError(f"reward '{self.spec.name}' returned {type(value).__name__} for sample {row}; "
                            "expected a number or None")
        return float(value)
