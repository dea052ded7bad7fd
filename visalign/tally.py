"""Metrics of many micro-batches and processes become one number each: sums over counts, and maxima."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visalign.distributed import Processes
from visalign.protocols import LossTerms
from visalign.types import Scores


@dataclass
class Tally:
    """Running sums, counts and maxima by metric name, and the summed loss."""

    loss: float = 0.0
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, terms: LossTerms) -> None:
        """One micro-batch."""
        self.merge(Tally(float(terms.loss.detach()), dict(terms.metrics), dict(terms.maxima)))

    def merge(self, other: Tally) -> None:
        self.loss += other.loss
        for name, (value, count) in other.sums.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + value, before[1] + count)
        for name, value in other.maxima.items():
            before_max = self.maxima.get(name, -math.inf)
            self.maxima[name] = value if math.isnan(value) or math.isnan(before_max) or value > before_max else before_max

    def over(self, processes: Processes) -> Tally:
        """The tally of all processes together."""
        whole = Tally()
        for part in processes.gather_objects(self):
            whole.merge(part)
        return whole

    def metrics(self) -> dict[str, float]:
        """Means where something was counted, and maxima under their own names."""
        means = {name: value / count for name, (value, count) in self.sums.items() if count > 0}
        return {**means, **self.maxima}


def concatenate_scores(parts: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    """Scores of several parts (processes, in rank order) as those of one; a detail that a part lacks is NaN there."""

    def joined(name: str) -> Scores:
        ones = [part[name] for part in parts]
        axes = dict.fromkeys(axis for one in ones for axis in one.details)
        details = {axis: torch.cat([one.details.get(axis, torch.full_like(one.raw, torch.nan)) for one in ones]) for axis in axes}

        def cat(field_name: str) -> Tensor:
            return torch.cat([getattr(one, field_name) for one in ones])

        reasons = tuple(reason for one in ones for reason in one.reasons)
        return Scores(raw=cat("raw"), value=cat("value"), valid=cat("valid"), reasons=reasons, details=details,
                      features=None if ones[0].features is None else cat("features"))

    return {name: joined(name) for name in parts[0]}
