"""What a combiner sees and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from visalign.types import Prompt


@dataclass(frozen=True)
class Table:
    """K rewards of N gathered samples, larger is better, standardised and shaped.

    Attributes:
        names: of the rewards, length K.
        weight: of the rewards, float64 (K,), none 0; negative to punish.
        values: float64 (K, N), 0 where absent.
        present: bool (K, N); false for invalid samples, and for a reward that some valid member of the group lacks: siblings are judged
            alike.
        group: int64 (N,), 0..P-1.
        prompts: the prompt of every group, length P; empty where they are not known.
    """

    names: tuple[str, ...]
    weight: Tensor
    values: Tensor
    present: Tensor
    group: Tensor
    prompts: tuple[Prompt, ...] = ()

    def shares(self) -> Tensor:
        """Weights (K, N), 0 where absent, enlarged so that every sample's absolute weights have the same total."""
        weight = self.weight[:, None] * self.present
        total = weight.abs().sum(dim=0)
        return weight * self.weight.abs().sum() / torch.where(total > 0, total, 1.0)

    def means(self) -> Tensor:
        """Mean of each reward over the samples that have it, (K,); NaN where none has."""
        count = self.present.sum(dim=1)
        return torch.where(count > 0, torch.where(self.present, self.values, 0.0).sum(dim=1) / count.clamp(min=1), torch.nan)

    def rows(self, names: Sequence[str]) -> list[int]:
        """Positions of rewards by name."""
        return [self.names.index(name) for name in names]


@dataclass(frozen=True)
class Combined:
    """The combination of a table.

    Attributes:
        value: float64 (N,), larger is better; what stands there for samples without a reward is not read.
        weights: (K, N) with ``value = sum_k weights_k values_k`` up to a constant per group, 0 where absent; ``None`` if there are none.
            With them every reward may become an advantage before it is weighed.
        metrics: numbers worth logging, by ``area/name``.
    """

    value: Tensor
    weights: Tensor | None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Combiner(Protocol):
    """Turns K rewards into one. One that remembers (``protocols.Remembers``) moves on with every call, once per iteration; its memory is a
    function of gathered samples, so that all processes hold the same."""

    @property
    def linear(self) -> bool:
        """Whether ``combine`` gives weights."""

    @property
    def reads_prompts(self) -> bool:
        """Whether ``Table.prompts`` must be there."""

    def check(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Refuse rewards it cannot combine with a ValueError."""

    def check_prompts(self, names: Sequence[str], prompts: Sequence[Prompt]) -> None:
        """Refuse prompts it cannot use with a ValueError that names the row."""

    def combine(self, table: Table) -> Combined:
        """The combination."""


class Plain:
    """What most combiners have in common: no weights, no prompts, any positive weights."""

    linear: bool = False
    reads_prompts: bool = False

    def check(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Refuse negative weights: the members of an ensemble agree on what is better.

        Raises:
            ValueError: names the reward.
        """
        for name, weight in zip(names, weights, strict=True):
            if weight < 0:
                raise ValueError(f"reward '{name}' has the weight {weight}, and {type(self).__name__} needs positive ones; a reward that "
                                 "is better when smaller declares direction=-1, to punish one combine as a weighted sum")

    def check_prompts(self, names: Sequence[str], prompts: Sequence[Prompt]) -> None:
        """Every prompt will do."""
