"""Combiners without memory. Formulas and sources: ``maths/composition.py`` and ``maths/composition_order.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from visalign.composition.table import Combined, Plain, Table
from visalign.maths import composition
from visalign.maths.composition_order import hierarchical_rank


@dataclass(frozen=True)
class Weighted(Plain):
    """``sum_k w_k z_k``: the reward with the largest spread dominates, unless each becomes an advantage first."""

    linear = True

    def check(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Any weights will do."""

    def combine(self, table: Table) -> Combined:
        weights = table.shares()
        return Combined(composition.weighted_sum(table.values, weights), weights)


@dataclass(frozen=True)
class LogTamed(Plain):
    """``sum_k w_k z'_k`` with ``z' = log(1 + z)`` for rewards whose relative spread over the batch is above ``threshold``.

    Rewards have to be above -1 with a positive mean, which is checked on every batch: map them into [0, 1] with shift and scale.
    """

    threshold: float | Literal["mean", "median"] = "mean"

    def check(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """Any weights will do."""

    def combine(self, table: Table) -> Combined:
        values, tamed = composition.log_tame(table.values, table.present, self.threshold)
        return Combined(composition.weighted_sum(values, table.shares()), None,
                        {f"composition/tamed_{name}": float(was) for name, was in zip(table.names, tamed.tolist(), strict=True)})


@dataclass(frozen=True)
class Mean(Plain):
    """Weighted mean of an ensemble's members."""

    linear = True

    def combine(self, table: Table) -> Combined:
        weights = table.shares() / table.weight.sum()
        return Combined(composition.ensemble_mean(table.values, table.shares()), weights, _disagreement(table))


@dataclass(frozen=True)
class Worst(Plain):
    """The smallest of an ensemble's members, sample by sample (WCO); weights do not matter."""

    def combine(self, table: Table) -> Combined:
        return Combined(composition.worst_case(table.values, table.shares()), None, _disagreement(table))


@dataclass(frozen=True)
class Uncertainty(Plain):
    """Mean minus ``strength`` times the variance over members (UWO)."""

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength must be >= 0, got {self.strength}")

    def combine(self, table: Table) -> Combined:
        return Combined(composition.uncertainty_weighted(table.values, table.shares(), self.strength), None, _disagreement(table))


@dataclass(frozen=True)
class Entropic(Plain):
    """``-T log mean exp(-z / T)``, between the worst case (small T) and the mean (large T)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")

    def combine(self, table: Table) -> Combined:
        return Combined(composition.entropic(table.values, table.shares(), self.temperature), None, _disagreement(table))


@dataclass(frozen=True)
class PowerMean(Plain):
    """Geometric (power 0), harmonic (-1) or another power mean of positive rewards."""

    power: float = 0.0

    def combine(self, table: Table) -> Combined:
        return Combined(composition.power_mean(table.values, table.shares(), self.power), None)


@dataclass(frozen=True)
class Hierarchical(Plain):
    """Share of siblings a sample beats, where the first reward of ``order`` with a difference above its margin decides (HERON).

    Attributes:
        order: all rewards, most important first.
        margins: by reward, 0 where not given; in units of the standardised reward.
    """

    order: tuple[str, ...]
    margins: Mapping[str, float]

    def check(self, names: Sequence[str], weights: Sequence[float]) -> None:
        super().check(names, weights)
        if sorted(self.order) != sorted(names):
            raise ValueError(f"order is {', '.join(self.order) or 'empty'}; put every reward there once: {', '.join(names)}")
        wrong = [name for name, margin in self.margins.items() if name not in names or not margin >= 0]
        if wrong:
            raise ValueError(f"margins: '{wrong[0]}' is {self.margins[wrong[0]]}; give margins >= 0 for rewards of {', '.join(names)}")

    def combine(self, table: Table) -> Combined:
        rows = table.rows(self.order)
        margins = torch.tensor([self.margins.get(name, 0.0) for name in self.order], dtype=torch.float64)
        share, decided = hierarchical_rank(table.values[rows], table.present[rows], margins, table.group)
        total = max(int(decided.sum()), 1)
        by = [*self.order, "by_none"]
        return Combined(share, None, {f"composition/decided_{name}": count / total
                                      for name, count in zip(by, decided.tolist(), strict=True)})


def _disagreement(table: Table) -> dict[str, float]:
    """Mean over samples of the standard deviation between members."""
    shares = table.shares()
    judged = table.present.any(dim=0)
    variance = (composition.ensemble_mean(table.values, shares) - composition.uncertainty_weighted(table.values, shares, 1.0))[judged]
    return {"composition/disagreement": float(variance.clamp(min=0).sqrt().mean())} if bool(judged.any()) else {}
