"""Pairwise judgements inside one group to a win rate per sample.

    w_i = mean over the valid comparisons of i of  P(i beats the other)

With all pairs compared the win rates of a group sum to G / 2. Published code rounds them to 3 decimals; here they are exact.

Source: Pref-GRPO, arXiv:2508.20751.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WinRates:
    """Win rates of one group.

    Attributes:
        value: (G,) in [0, 1], dtype of the judgements; NaN where invalid.
        valid: bool (G,), False for samples without one valid comparison.
        num_comparisons: valid comparisons per sample, int64 (G,).
    """

    value: Tensor
    valid: Tensor
    num_comparisons: Tensor


def win_rates(pairs: Sequence[tuple[int, int]], prob_first: Tensor, valid: Tensor, num_samples: int) -> WinRates:
    """Win rate of every sample of a group.

    Args:
        pairs: n ordered index pairs (i, j), 0 <= i, j < num_samples, i != j.
        prob_first: probability that i beats j, (n,) in [0, 1], 0.5 a tie; ignored (NaN allowed) where invalid.
        valid: bool (n,).
        num_samples: G.
    Raises:
        ValueError: shapes, indices or probabilities out of range.
    """
    if prob_first.shape != (len(pairs),) or valid.shape != (len(pairs),):
        raise ValueError(f"{len(pairs)} pairs need as many judgements, got {tuple(prob_first.shape)} and {tuple(valid.shape)}")
    if any(i == j or not (0 <= i < num_samples and 0 <= j < num_samples) for i, j in pairs):
        raise ValueError(f"pairs must join two different samples of 0 .. {num_samples - 1}, got {list(pairs)}")
    judged = prob_first[valid].double()
    if not bool(((judged >= 0) & (judged <= 1)).all()):
        raise ValueError("a valid judgement must be a probability in [0, 1]; mark refusals and parse failures invalid")
    index = torch.tensor(list(pairs), dtype=torch.int64, device=prob_first.device).reshape(-1, 2)[valid]
    wins = torch.zeros(num_samples, dtype=torch.float64, device=prob_first.device)
    wins = wins.index_add(0, index[:, 0], judged).index_add(0, index[:, 1], 1 - judged)
    count = torch.bincount(index.flatten(), minlength=num_samples)
    rate = torch.where(count > 0, wins / count.clamp(min=1), float("nan"))
    return WinRates(value=rate.to(prob_first.dtype), valid=count > 0, num_comparisons=count)


def cyclic_triads(pairs: Sequence[tuple[int, int]], prob_first: Tensor, valid: Tensor, num_samples: int) -> Tensor:
    """Share of a sample's triads that are circles (a beats b beats c beats a), which no ranking can satisfy, (G,), dtype of the judgements.

    Of the triads whose three comparisons are all valid; NaN for samples without one. A judge that answers at random gives 1/4.

    Args:
        pairs, prob_first, valid, num_samples: as for :func:`win_rates`; 0.5 beats nobody.
    Source: Kendall & Babington Smith, "On the method of paired comparisons", Biometrika 1940.
    """
    beats, judged = (torch.zeros(num_samples, num_samples, dtype=torch.float64) for _ in range(2))
    for (i, j), prob, ok in zip(pairs, prob_first.tolist(), valid.tolist(), strict=True):
        if ok:
            judged[i, j] = judged[j, i] = 1.0
            beats[i, j], beats[j, i] = float(prob > 0.5), float(prob < 0.5)
    # A walk i -> j -> k -> i along wins meets every circle through i once; along comparisons it meets every triad in both directions.
    circles, triads = (torch.einsum("ij,jk,ki->i", matrix, matrix, matrix) for matrix in (beats, judged))
    return torch.where(triads > 0, 2 * circles / triads.clamp(min=1), torch.nan).to(prob_first.dtype)


def combine_orders(prob_ij: Tensor, prob_ji: Tensor) -> Tensor:
    """``(y_ij + 1 - y_ji) / 2``: P(i beats j) from the judgement in both orders, (n,).

    A judge that always prefers the first position gives 0.5. Only combine pairs valid in *both* orders: half a swap is the bias.
    """
    return (prob_ij + 1 - prob_ji) / 2


def bradley_terry(reward_i: Tensor, reward_j: Tensor, scale: float = 1.0) -> Tensor:
    """``sigmoid(scale (r_i - r_j))``: the preference that pointwise rewards imply. Source: Bradley & Terry, Biometrika 1952."""
    return torch.sigmoid(scale * (reward_i - reward_j))


def all_pairs(num_samples: int) -> tuple[tuple[int, int], ...]:
    """Every i < j: G (G - 1) / 2 comparisons."""
    _check_group(num_samples)
    return tuple((i, j) for i in range(num_samples) for j in range(i + 1, num_samples))


def ring(num_samples: int) -> tuple[tuple[int, int], ...]:
    """Each sample against its successor: G comparisons, two per sample, once in each position (a single one for G = 2)."""
    _check_group(num_samples)
    return ((0, 1),) if num_samples == 2 else d_regular(num_samples, degree=2)


def d_regular(num_samples: int, degree: int) -> tuple[tuple[int, int], ...]:
    """Each sample in exactly ``degree`` comparisons: i against i + 1, ..., i + degree // 2, and its opposite for odd degrees.

    Raises:
        ValueError: no such graph exists: ``degree`` must be in 1 .. G - 1, and G even if it is odd.
    """
    _check_group(num_samples)
    if not 1 <= degree < num_samples or (degree % 2 and num_samples % 2):
        raise ValueError(
            f"{num_samples} samples cannot each have {degree} comparisons; use a degree from 1 to {num_samples - 1}"
            + (", even because the group size is odd" if num_samples % 2 else "")
        )
    around = [(i, (i + k) % num_samples) for k in range(1, degree // 2 + 1) for i in range(num_samples)]
    across = [(i, i + num_samples // 2) for i in range(num_samples // 2)] if degree % 2 else []
    return tuple(around + across)


def _check_group(num_samples: int) -> None:
    if num_samples < 2:
        raise ValueError(f"comparisons need at least 2 samples, got {num_samples}")
