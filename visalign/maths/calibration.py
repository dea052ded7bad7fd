"""How good a reward model's preferences are: ranking accuracy, calibration error, temperature.

``difference = r_first - r_second`` and ``label``: 1 the first is better, -1 the second, 0 a tie; swapping all pairs changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


def ranking_accuracy(difference: Tensor, label: Tensor, weight: Tensor | None = None) -> float:
    """Share of comparisons with a winner that are ranked right; equal rewards count half. Ties in the label are left out.

    Raises:
        ValueError: shapes do not fit, labels are not 1, 0 or -1, a difference is not finite, or no comparison has a winner.
    """
    difference, label, weight = _checked(difference, label, weight)
    right = 0.5 * (1 + torch.sign(difference) * label)
    return float((weight * right).sum() / weight.sum())


def log_loss(difference: Tensor, label: Tensor, weight: Tensor | None = None) -> float:
    """Mean of ``-log sigmoid(difference)`` with the winner first, nats; log 2 says nothing. Ties in the label are left out.

    Raises:
        ValueError: as :func:`ranking_accuracy`.
    """
    difference, label, weight = _checked(difference, label, weight)
    return float((weight * softplus(-difference * label)).sum() / weight.sum())


@dataclass(frozen=True)
class Calibration:
    """A reliability table.

    Attributes:
        error: expected calibration error, ``sum_b (n_b / n) |accuracy_b - confidence_b|``, in [0, 1].
        confidence, accuracy: mean per bin, (B,), NaN for empty bins.
        count: comparisons per bin, (B,).
    """

    error: float
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def calibration(difference: Tensor, label: Tensor, weight: Tensor | None = None, num_bins: int = 10) -> Calibration:
    """Whether preferences stated with confidence c are right in a share c of cases.

    The confidence is ``max(p, 1 - p)`` with ``p = sigmoid(difference)``, so that bins divide [0.5, 1].

    Raises:
        ValueError: as :func:`ranking_accuracy`, or num_bins < 1.
    Source: Naeini et al. (2015); Guo et al., arXiv:1706.04599.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins}")
    difference, label, weight = _checked(difference, label, weight)
    confidence = torch.sigmoid(difference.abs())
    right = 0.5 * (1 + torch.sign(difference) * label)
    bins = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, values)

    count = total(weight)
    stated, found = total(weight * confidence) / count, total(weight * right) / count  # NaN for empty bins
    gap = torch.where(count > 0, count * (stated - found).abs(), 0.0)
    return Calibration(float(gap.sum() / count.sum()), stated, found, count)


def fit_temperature(difference: Tensor, label: Tensor) -> float:
    """T > 0 that makes ``sigmoid(difference / T)`` most likely: how far a cosine must be stretched to be log-odds.

    Raises:
        ValueError: the reward ranks worse than chance, or all comparisons right, which no finite temperature explains.
    Source: temperature scaling, Guo et al., arXiv:1706.04599, without bias, for preferences have no side.
    """
    difference, label, _ = _checked(difference, label, None)
    margin = difference * label
    if not bool((margin < 0).any()):
        raise ValueError(f"all {len(margin)} comparisons are ranked right, so that any smaller temperature is likelier; use more of them")
    if not float(margin.sum()) > 0:  # the slope of the log-likelihood at 1 / T = 0
        raise ValueError("the reward prefers what loses as often as what wins; it needs another direction, not a temperature")
    low, high = 0.0, 1 / float(margin.abs().mean())

    def slope(scale: float) -> float:
        return float((margin * torch.sigmoid(-scale * margin)).sum())

    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 2 / (low + high)


def _checked(difference: Tensor, label: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Comparisons with a winner, float64."""
    weight = torch.ones(len(label), dtype=torch.float64) if weight is None else weight.double()
    if not difference.shape == label.shape == weight.shape or difference.dim() != 1:
        raise ValueError(f"difference, label and weight need one shape (n,), got {tuple(difference.shape)}, {tuple(label.shape)} and "
                         f"{tuple(weight.shape)}")
    if not bool(((label == 0) | (label.abs() == 1)).all()):
        raise ValueError(f"labels are 1, 0 or -1, got {label.unique().tolist()[:5]}")
    decided = label != 0
    if not bool(torch.isfinite(difference[decided]).all()):
        raise ValueError("a difference is NaN or infinite; leave comparisons of samples that could not be scored out, and report how many")
    if not float(weight[decided].sum()) > 0:
        raise ValueError("no comparison has a winner")
    return difference[decided].double(), label[decided].double(), weight[decided]
