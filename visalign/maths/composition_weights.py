"""Weights that are not fixed: of the user group that is worst off (MaxMin), of a direction chosen at run time (DPA), of a router."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_FLOOR = 1e-6


def follow_average(average: Tensor, observed: Tensor, decay: float) -> Tensor:
    """``decay average + (1 - decay) observed`` entry by entry, (K,).

    An average that is still NaN starts at what is observed; where nothing is observed (NaN) it stays.

    Raises:
        ValueError: decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")
    moved = torch.where(average.isnan(), observed, decay * average + (1 - decay) * observed)
    return torch.where(observed.isnan(), average, moved)


def maxmin_weights(weights: Tensor, average: Tensor, rate: float | None = 1.0) -> Tensor:
    """Weights of user groups, (K,), sum 1, moved towards the one that is worst off.

        p_u <- max(p_u, 1e-6) exp(-rate R_u) / Z           the mirror step of  max_policy min_u E[r_u]

    The minimum is over *expectations*: ``average`` holds each group's running mean reward, on comparable scales such as regret to the
    initial policy. The minimum per sample is ``composition.worst_case``, another objective. Without the floor, which the paper does not
    have, a group that was well off for long would need as long to be heard again, or forever, once its weight is 0 in floating point.

    Args:
        weights: p, >= 0, sum 1.
        average: R; a group without any observation (NaN) counts as average among the others.
        rate: > 0; ``None`` gives all weight to the worst group at once (ties share it).
    Raises:
        ValueError: rate <= 0.
    Source: MaxMin-RLHF, arXiv:2402.08925.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"rate must be > 0, or None to give all weight to the worst group, got {rate}")
    seen = torch.isfinite(average)
    if not bool(seen.any()):
        return weights
    known = torch.where(seen, average, average[seen].mean())
    if rate is None:
        worst = (known == known.min()) & seen
        return worst.to(weights) / worst.sum()
    return torch.softmax(weights.clamp(min=_FLOOR).log() - rate * known, dim=0)


def arc_directions(num: int, low: float = 0.0, high: float = 90.0) -> Tensor:
    """``num`` unit vectors (num, 2) at equal angles from ``low`` to ``high`` degrees off the first reward's axis, ends included.

    Raises:
        ValueError: num < 1, or low > high.
    """
    if num < 1 or low > high:
        raise ValueError(f"directions need num >= 1 and low <= high, got {num}, {low} and {high}")
    angle = torch.deg2rad(torch.linspace(low, high, num, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def normalise_weights(weights: Tensor, kind: Literal["none", "sum", "unit"] = "unit") -> Tensor:
    """Weights (K, N) of N samples as they are, with absolute sum 1, or with Euclidean norm 1 (directions); all zeros stay zeros.

    With norm 1 the value ``<v, r>`` of standardised rewards has one scale whatever the trade-off.
    Source of the unit norm: directional preference alignment, arXiv:2402.18571.
    """
    if kind == "none":
        return weights
    if kind not in ("sum", "unit"):
        raise ValueError(f"weights are normalised to 'sum' or 'unit', or not at all ('none'), got {kind!r}")
    size = weights.abs().sum(dim=0) if kind == "sum" else weights.square().sum(dim=0).sqrt()
    return weights / torch.where(size > 0, size, 1.0)
