"""Shapes of single rewards: LSC and PAR, against one number or against what the initial policy gets for the same prompt.

    {"prompt": "a red circle", "reference_scores": {"pickscore": [21.3, 20.8, 22.1]}}

Reference scores are raw, as ``visalign score`` prints them; direction and standardisation are applied to them as to any score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from visalign.maths.composition_references import log_sigmoid_centred, preference_as_reward, reference_quantile
from visalign.types import Prompt

KEY = "reference_scores"


class Shape(Protocol):
    """A monotone map of standardised values."""

    @property
    def reads_prompts(self) -> bool:
        """Whether ``apply`` needs the prompts' references."""

    def apply(self, values: Tensor, references: Tensor | None) -> Tensor:
        """(N,) to (N,); ``references`` are (N, M) in the same units, NaN where a prompt has fewer than M."""


@dataclass(frozen=True)
class LogSigmoid:
    """LSC, ``log sigmoid(z - reference)``: weighted sums of it are a logical AND.

    Attributes:
        reference: one number for all prompts in standardised units; ``None`` takes each prompt's ``quantile`` of reference scores.
    """

    reference: float | None = None
    quantile: float = 0.85

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must lie in [0, 1], got {self.quantile}")

    @property
    def reads_prompts(self) -> bool:
        return self.reference is None

    def apply(self, values: Tensor, references: Tensor | None) -> Tensor:
        if self.reference is not None:
            return log_sigmoid_centred(values, values.new_tensor(self.reference))
        assert references is not None, "a shape that reads prompts is given their references"
        return log_sigmoid_centred(values, reference_quantile(references, self.quantile))


@dataclass(frozen=True)
class PreferenceAsReward:
    """PAR, the mean of ``sigmoid(z - reference)``: bounded in (0, 1).

    Attributes:
        reference: one number for all prompts in standardised units; ``None`` takes all of each prompt's reference scores.
    """

    reference: float | None = None

    @property
    def reads_prompts(self) -> bool:
        return self.reference is None

    def apply(self, values: Tensor, references: Tensor | None) -> Tensor:
        if self.reference is not None:
            return preference_as_reward(values, values.new_full((len(values), 1), self.reference))
        assert references is not None, "a shape that reads prompts is given their references"
        return preference_as_reward(values, references)


def reference_scores(name: str, prompts: Sequence[Prompt]) -> Tensor:
    """Raw reference scores of every prompt, float64 (P, M), padded with NaN.

    Raises:
        ValueError: a prompt has none for this reward, or one that is not a finite number.
    """
    rows = []
    for row, prompt in enumerate(prompts):
        given = prompt.metadata.get(KEY)
        values = given.get(name) if isinstance(given, dict) else None
        if not isinstance(values, list | tuple) or not values or not all(isinstance(v, Real) and math.isfinite(v) for v in values):
            raise ValueError(f"reward '{name}', prompt {row} ({prompt.text[:60]!r}): its shape compares with the initial policy, and "
                             f"metadata '{KEY}' holds no list of finite scores for it; sample the initial policy, score it with "
                             f'visalign score and add "{KEY}": {{"{name}": [...]}} to the prompt, or give the shape one number for all '
                             "prompts, reference: 0.0")
        rows.append(torch.tensor([float(v) for v in values], dtype=torch.float64))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
