"""Combiners that remember: Lagrange multipliers of constraints, and the weights of user groups. Their memory is checkpointed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from visalign.composition.table import Combined, Plain, Table
from visalign.maths.composition import weighted_sum
from visalign.maths.composition_weights import follow_average, maxmin_weights
from visalign.maths.confidence import Bound, Verdict, judge_constraints, lower_bound
from visalign.maths.constraints import Controller, Multipliers, follow, lagrangian, lagrangian_weights


@dataclass(eq=False)
class Constrained(Plain):
    """The weighted sum of the other rewards, subject to ``E[z_k] >= thresholds[k]``, by multipliers that follow the violation.

    Attributes:
        thresholds: by reward, in its standardised (and shaped) units; those rewards are constraints, their weights do not matter.
        rate, proportional, decay, cap, space: see ``maths.constraints.Controller``.
        initial: multiplier of every constraint at the start.
        pessimism: confidence in (0.5, 1): steer by a lower bound of the constraint's mean over prompts instead of the mean itself, so that
            the held-out test is likely to pass; ``None`` steers by the mean.
        confidence, bound: of the held-out test, see ``maths.confidence``; "hoeffding" and "bernstein" need ``support``.
    """

    thresholds: Mapping[str, float]
    rate: float = 0.1
    proportional: float = 0.0
    decay: float = 0.9
    cap: float = 10.0
    space: Literal["linear", "log"] = "linear"
    initial: float = 0.0
    pessimism: float | None = None
    confidence: float = 0.95
    bound: Bound = "student"
    support: tuple[float, float] | None = None
    state: Multipliers = field(init=False)

    linear = True

    def __post_init__(self) -> None:
        self._controller = Controller(self.rate, self.proportional, self.decay, self.cap, self.space)
        self.state = Multipliers.start(torch.full((len(self.thresholds),), self.initial, dtype=torch.float64))
        for name, confidence in (("pessimism", self.pessimism), ("confidence", self.confidence)):
            if confidence is not None and not 0.5 < confidence < 1:
                raise ValueError(f"{name} must lie in (0.5, 1), got {confidence}")
        if self.bound != "student" and self.support is None:
            raise ValueError(f"bound '{self.bound}' needs support: [smallest, largest] value of the constraints")

    def check(self, names: Sequence[str], weights: Sequence[float]) -> None:
        unknown = [name for name in self.thresholds if name not in names]
        if unknown or not self.thresholds or len(self.thresholds) == len(names):
            given = ", ".join(unknown or self.thresholds) or "no reward"
            raise ValueError(f"thresholds names {given}; there are {', '.join(names)}, of which at least one needs a threshold and at "
                             "least one is maximised")

    def combine(self, table: Table) -> Combined:
        rows = table.rows(list(self.thresholds))
        rest = [k for k in range(len(table.names)) if k not in rows]
        thresholds, multipliers = self._thresholds(), self.state.value
        objective = Table(tuple(table.names[k] for k in rest), table.weight[rest], table.values[rest], table.present[rest], table.group)
        shares, present = objective.shares(), table.present[rows]
        value = lagrangian(weighted_sum(objective.values, shares), table.values[rows], present, multipliers, thresholds)
        each = lagrangian_weights(present, multipliers)
        weights = torch.zeros_like(table.values)
        weights[rest], weights[rows] = each[0] * shares, each[1:]
        means = self._observed(table, rows)
        self.state = follow(self.state, means, thresholds, self._controller)
        metrics = {}
        for k, name in enumerate(self.thresholds):
            metrics[f"composition/multiplier_{name}"] = float(multipliers[k])
            if torch.isfinite(means[k]):
                metrics[f"composition/slack_{name}"] = float(means[k] - thresholds[k])
        return Combined(value, weights, metrics)

    def held_out(self, values: Mapping[str, Tensor]) -> dict[str, Verdict]:
        """Whether the constraints are shown on held-out prompts, jointly with ``confidence``.

        Args:
            values: by reward, one per prompt, in the units of the thresholds; not finite where invalid.
        """
        return judge_constraints(values, self.thresholds, self.confidence, self.bound, self.support)

    def state_dict(self) -> dict[str, Tensor]:
        return {"integral": self.state.integral, "average": self.state.average, "value": self.state.value}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError if it belongs to another number of constraints."""
        if state:
            _same_size(len(self.thresholds), state["value"], "constraints")
            self.state = Multipliers(state["integral"], state["average"], state["value"])

    def _thresholds(self) -> Tensor:
        return torch.tensor(list(self.thresholds.values()), dtype=torch.float64)

    def _observed(self, table: Table, rows: Sequence[int]) -> Tensor:
        if self.pessimism is None:
            return table.means()[rows]
        num_groups = int(table.group.max()) + 1
        bounds = []
        for k in rows:
            total = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, table.group, table.values[k] * table.present[k])
            count = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, table.group, table.present[k].double())
            by_prompt = total / count  # NaN for prompts without this constraint
            known = int(torch.isfinite(by_prompt).sum())
            if known == 1:
                raise ValueError("pessimism needs at least two prompts per iteration to know how much they differ, this one had one; raise "
                                 "train.groups, or steer by the mean with pessimism: null")
            bounds.append(lower_bound(by_prompt, self.pessimism, self.bound, self.support) if known else torch.nan)
        return torch.tensor(bounds, dtype=torch.float64)


@dataclass(eq=False)
class MaxMin(Plain):
    """Every reward is one user group's; the weight moves to the group that is worst off in expectation.

    Attributes:
        rate: of the weights' mirror steps; ``None`` follows the worst group alone.
        decay: of the groups' running mean rewards.
        state: ``weights`` and ``average``, (K,) each once the groups are known.
    """

    rate: float | None = 1.0
    decay: float = 0.9
    state: dict[str, Tensor] = field(init=False, default_factory=dict)

    linear = True

    def __post_init__(self) -> None:
        if (self.rate is not None and not self.rate > 0) or not 0 <= self.decay < 1:
            raise ValueError(f"rate must be > 0 (or null) and decay lie in [0, 1), got {self.rate} and {self.decay}")

    def check(self, names: Sequence[str], weights: Sequence[float]) -> None:
        """The groups' weights are found, not given."""
        if len(set(weights)) > 1:
            raise ValueError(f"the weights {', '.join(f'{weight:g}' for weight in weights)} differ; MaxMin finds the weights of user "
                             "groups itself, leave weight out; put rewards on comparable scales with shift and scale")

    def combine(self, table: Table) -> Combined:
        num = len(table.names)
        weights = self.state.get("weights", torch.full((num,), 1 / num, dtype=torch.float64))
        average = self.state.get("average", torch.full((num,), torch.nan, dtype=torch.float64))
        _same_size(num, weights, "user groups")
        average = follow_average(average, table.means(), self.decay)
        weights = maxmin_weights(weights, average, self.rate)
        self.state = {"weights": weights, "average": average}
        each = weights[:, None] * table.present
        total = each.sum(dim=0)
        each = each / torch.where(total > 0, total, 1.0)
        metrics = {f"composition/weight_{name}": float(weight) for name, weight in zip(table.names, weights, strict=True)}
        metrics |= {f"composition/average_{name}": float(mean) for name, mean in zip(table.names, average, strict=True) if mean == mean}
        return Combined((each * table.values).sum(dim=0), each, metrics)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What ``state_dict`` gave; ``combine`` refuses the state of other groups."""
        self.state = dict(state)


def _same_size(expected: int, saved: Tensor, what: str) -> None:
    if len(saved) != expected:
        raise ValueError(f"the checkpoint holds {len(saved)} {what}, this run has {expected}; resume with the combine section the run was "
                         "started with")
