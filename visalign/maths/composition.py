"""Several rewards of one sample to one number: ensembles, means of positive scores, log-taming.

K members judge N samples; ``values`` is float64 (K, N), larger is better, all on a common scale: standardise with *frozen* statistics
first. ``weights`` (K, N) are >= 0 and 0 where a member gave nothing; what stands in ``values`` there, NaN included, is never read. A
sample without a single member is NaN. With weights ``w`` and ``p_k = w_k / sum_j w_j``:

    mean         sum_k p_k v_k
    worst        min_k v_k
    uncertainty  mean - strength sum_k p_k (v_k - mean)^2
    entropic     -T log sum_k p_k exp(-v_k / T)     T -> inf: mean;  T -> 0: worst;  to second order mean - var / (2 T)

Sources: worst case and uncertainty-weighted optimisation: Coste et al., arXiv:2310.02743; log-taming: PaCo-RL, arXiv:2512.04784.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """``sum_k w_k v_k``, (N,); weights of either sign. The member with the largest spread dominates."""
    _check_shapes(values, weights)
    return _without(torch.where(weights != 0, weights * values, 0.0).sum(dim=0), weights)


def ensemble_mean(values: Tensor, weights: Tensor) -> Tensor:
    """``sum_k p_k v_k``, (N,)."""
    shares, known = _shares(values, weights)
    return _without((shares * known).sum(dim=0), weights)


def worst_case(values: Tensor, weights: Tensor) -> Tensor:
    """``min_k v_k`` over the members with a weight, (N,)."""
    _shares(values, weights)
    return _without(torch.where(weights != 0, values, torch.inf).amin(dim=0), weights)


def uncertainty_weighted(values: Tensor, weights: Tensor, strength: float = 0.5) -> Tensor:
    """``mean - strength var`` with the population variance over members, (N,).

    Raises:
        ValueError: strength < 0, which would reward disagreement.
    """
    if not strength >= 0:
        raise ValueError(f"strength must be >= 0, got {strength}: a negative one rewards samples the members disagree on")
    shares, known = _shares(values, weights)
    mean = (shares * known).sum(dim=0)
    return _without(mean - strength * (shares * (known - mean).square()).sum(dim=0), weights)


def entropic(values: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """``-T log sum_k p_k exp(-v_k / T)``, (N,), between the worst case and the mean.

    Raises:
        ValueError: temperature <= 0; the limits are :func:`worst_case` and :func:`ensemble_mean`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; worst_case is the limit 0, ensemble_mean the limit infinity")
    shares, known = _shares(values, weights)
    return _without(-temperature * (shares.log() - known / temperature).logsumexp(dim=0), weights)


def power_mean(values: Tensor, weights: Tensor, power: float = 0.0) -> Tensor:
    """``(sum_k p_k v_k^power)^(1 / power)``, (N,); 0 is the geometric mean ``exp sum_k p_k log v_k``, -1 the harmonic one.

    Raises:
        ValueError: a member's value is not positive.
    """
    shares, known = _shares(values, weights)
    used = values[weights != 0]
    if bool((used <= 0).any()):
        raise ValueError(f"a power mean needs positive values, the smallest is {float(used.min()):.4g}; map the rewards into (0, 1] first")
    positive = torch.where(weights != 0, known, 1.0)
    if power == 0:
        return _without((shares * positive.log()).sum(dim=0).exp(), weights)
    return _without((shares * positive.pow(power)).sum(dim=0).pow(1 / power), weights)


def log_tame(values: Tensor, present: Tensor, threshold: float | Literal["mean", "median"] = "mean") -> tuple[Tensor, Tensor]:
    """``log(1 + v_k)`` in place of every reward k whose relative spread ``h_k = std(v_k) / mean(v_k)`` is above the threshold.

    Mean and population standard deviation are over the samples that have the reward; a reward that nobody has is left out.

    Args:
        values: (K, N), for rewards in [0, 1] or a similar range.
        present: bool (K, N).
        threshold: of h; "mean" and "median" are those of the K relative spreads themselves.
    Returns:
        The tamed values (K, N), and which rewards were tamed, bool (K,).
    Raises:
        ValueError: a value <= -1, which has no logarithm, or a reward that varies around a mean that is not positive.
    """
    _check_shapes(values, present)
    known = torch.where(present, values, 0.0)
    count = present.sum(dim=1).clamp(min=1)
    seen = present.any(dim=1)
    mean = known.sum(dim=1) / count
    spread = (torch.where(present, known - mean[:, None], 0.0).square().sum(dim=1) / count).sqrt()
    if bool((known <= -1).any()) or bool((seen & (mean <= 0) & (spread > 0)).any()):
        means = ", ".join(f"{value:.4g}" for value in mean[seen].tolist())
        raise ValueError(f"log-taming needs rewards above -1 with a positive mean; the smallest value is {float(known.min()):.4g}, the "
                         f"means are {means}; map the rewards into [0, 1] with shift and scale")
    if not bool(seen.any()):
        return values, seen
    relative = spread / torch.where(mean > 0, mean, 1.0)  # a reward that is 0 for everybody has no spread
    if isinstance(threshold, str):
        if threshold not in ("mean", "median"):
            raise ValueError(f"threshold must be a number, 'mean' or 'median', got {threshold!r}")
        limit = relative[seen].mean() if threshold == "mean" else relative[seen].quantile(0.5)
    else:
        limit = relative.new_tensor(threshold)
    # Equal spreads are not above their own mean; rounding must not say otherwise.
    tamed = seen & (relative > limit + 1e-12 * limit.abs())
    return torch.where(tamed[:, None] & present, known.log1p(), values), tamed


def _shares(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that sum to 1 over the members of each sample, and values that are 0 where there is none."""
    _check_shapes(values, weights)
    if bool((weights < 0).any()):
        raise ValueError("the members of an ensemble need weights >= 0; a reward that is better when smaller declares direction=-1")
    total = weights.sum(dim=0)
    return weights / torch.where(total > 0, total, 1.0), torch.where(weights != 0, values, 0.0)


def _without(combined: Tensor, weights: Tensor) -> Tensor:
    return torch.where((weights != 0).any(dim=0), combined, torch.nan)


def _check_shapes(values: Tensor, weights: Tensor) -> None:
    if values.dim() != 2 or values.shape != weights.shape:
        raise ValueError(f"values and weights need one shape (K, N), got {tuple(values.shape)} and {tuple(weights.shape)}")
    if not bool(torch.isfinite(values[weights != 0]).all()):
        raise ValueError("a value that counts is NaN or infinite; give it weight 0, so that it is left out")
