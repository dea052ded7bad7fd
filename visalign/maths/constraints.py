"""Constrained maximisation by Lagrange multipliers with a proportional-integral controller.

    maximise E[r_0]  subject to  E[r_k] >= t_k            r = (r_0 + sum_k lambda_k (r_k - t_k)) / (1 + sum_k lambda_k)

    integral_k <- clamp(integral_k + rate (t_k - EMA(r_k)), 0, cap)          or, in log space, integral_k exp(rate (t_k - EMA(r_k)))
    lambda_k    = clamp(integral_k + proportional (t_k - mean r_k), 0, cap)

Dividing by ``1 + sum lambda`` keeps the reward's scale while multipliers grow. The means are of *all* processes' valid samples, so that
every process holds the same multipliers.
Sources: safe RLHF, arXiv:2310.12773; PID control of multipliers: Stooke et al., arXiv:2007.03964.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visalign.maths.composition_weights import follow_average

SMALLEST = 1e-3  # log space has no way back from 0


@dataclass(frozen=True)
class Controller:
    """How multipliers follow their constraints.

    Attributes:
        rate: of the integral part, >= 0, per update.
        proportional: answers the current violation at once and dampens the integral's oscillation, >= 0.
        decay: of the running mean the integral part sees, in [0, 1); 0 looks at the current mean alone.
        cap: largest multiplier, > 0.
        space: "linear" adds, "log" multiplies (a multiplier then never falls below 1e-3).
    """

    rate: float = 0.1
    proportional: float = 0.0
    decay: float = 0.9
    cap: float = 10.0
    space: Literal["linear", "log"] = "linear"

    def __post_init__(self) -> None:
        if not (self.rate >= 0 and self.proportional >= 0 and self.rate + self.proportional > 0):
            raise ValueError(f"rate and proportional must be >= 0 and not both 0, got {self.rate} and {self.proportional}")
        if not 0 <= self.decay < 1 or not self.cap > SMALLEST:
            raise ValueError(f"decay must lie in [0, 1) and cap be above {SMALLEST}, got {self.decay} and {self.cap}")
        if self.space not in ("linear", "log"):
            raise ValueError(f"space must be 'linear' or 'log', got {self.space!r}")


@dataclass(frozen=True)
class Multipliers:
    """State of K constraints, float64 (K,): ``integral``, the running mean ``average`` (NaN before the first observation), and the
    multipliers ``value`` in force."""

    integral: Tensor
    average: Tensor
    value: Tensor

    @staticmethod
    def start(initial: Tensor) -> Multipliers:
        """Multipliers at ``initial`` (K,), >= 0, nothing observed."""
        if not bool((initial >= 0).all()):
            raise ValueError(f"multipliers are >= 0, got {initial.tolist()}")
        return Multipliers(initial.double(), torch.full_like(initial, torch.nan, dtype=torch.float64), initial.double())


def follow(state: Multipliers, mean: Tensor, thresholds: Tensor, controller: Controller) -> Multipliers:
    """The multipliers after one more observation.

    Args:
        mean: of each constraint's reward over this update's samples, (K,); NaN where there was none: that multiplier stays.
        thresholds: t, (K,).
    """
    average = follow_average(state.average, mean, controller.decay)
    seen = torch.isfinite(mean)
    push = torch.where(seen, controller.rate * (thresholds - average), 0.0)
    if controller.space == "log":
        moved = (state.integral.clamp(min=SMALLEST).log() + push).exp().clamp(SMALLEST, controller.cap)
    else:
        moved = (state.integral + push).clamp(0, controller.cap)
    integral = torch.where(seen, moved, state.integral)
    value = (integral + controller.proportional * torch.where(seen, thresholds - mean, 0.0)).clamp(0, controller.cap)
    return Multipliers(integral, average, torch.where(seen, value, state.value))


def lagrangian(objective: Tensor, constraints: Tensor, present: Tensor, multipliers: Tensor, thresholds: Tensor) -> Tensor:
    """``(r_0 + sum_k lambda_k (r_k - t_k)) / (1 + sum_k lambda_k)`` over the constraints that a sample has, (N,).

    Args:
        objective: r_0, (N,).
        constraints: r_k, (K, N), never read where ``present`` (bool, (K, N)) is false.
        multipliers, thresholds: (K,).
    """
    if constraints.shape != present.shape or constraints.shape[1:] != objective.shape or len(constraints) != len(multipliers):
        raise ValueError(f"{len(multipliers)} multipliers need constraints and present of shape (K, N) = ({len(multipliers)}, "
                         f"{len(objective)}), got {tuple(constraints.shape)} and {tuple(present.shape)}")
    weights = lagrangian_weights(present, multipliers)
    slack = torch.where(present, constraints - thresholds[:, None], 0.0)
    return weights[0] * objective + (weights[1:] * slack).sum(dim=0)


def lagrangian_weights(present: Tensor, multipliers: Tensor) -> Tensor:
    """``1 / (1 + sum lambda)`` and ``lambda_k / (1 + sum lambda)``, (1 + K, N), each column of sum 1; 0 for absent constraints."""
    each = multipliers[:, None] * present
    return torch.cat([torch.ones_like(each[:1]) if len(each) else torch.ones(1, present.shape[1], dtype=torch.float64), each]) \
        / (1 + each.sum(dim=0))
