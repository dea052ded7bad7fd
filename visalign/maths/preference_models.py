"""How preferences are thought to arise: Bradley-Terry with ties, and preferences that need not be transitive."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class TieLogProbs:
    """Log-probabilities, each of the shape of the reward differences: the first wins, a tie, the second wins."""

    first: Tensor
    tie: Tensor
    second: Tensor


def bradley_terry_ties(difference: Tensor, k: float = 5.0) -> TieLogProbs:
    """Bradley-Terry with ties (Rao-Kupper) for ``difference = r_first - r_second``.

        log P(first) = log sigmoid(d - ln k)
        log P(tie)   = log sigmoid(d - ln k) + log sigmoid(-d - ln k) + ln(k^2 - 1)

    Args:
        k: > 1, larger for more ties; 5 in VideoReward.
    Raises:
        ValueError: k <= 1, where a tie has no probability.
    Sources: Rao & Kupper (1967); VideoReward, arXiv:2501.13918.
    """
    if not k > 1:
        raise ValueError(f"ties need k > 1, got {k}; without ties use log sigmoid of the difference")
    first, second = logsigmoid(difference - math.log(k)), logsigmoid(-difference - math.log(k))
    return TieLogProbs(first=first, tie=first + second + math.log(k * k - 1), second=second)


def skew_scores(embedding: Tensor) -> Tensor:
    """General preference scores ``s[i, j] = <R v_i, v_j>``, ``P(i > j) = sigmoid(s[i, j])``; antisymmetric, cycles allowed.

    ``R`` rotates each consecutive pair of coordinates by 90 degrees, ``(a, b) -> (-b, a)``. The mean over the last axis is the score
    against the group that ``gpo`` regresses on.

    Args:
        embedding: (..., n, 2 m).
    Returns:
        (..., n, n).
    Raises:
        ValueError: an odd number of coordinates.
    Source: general preference model, arXiv:2410.02197.
    """
    if embedding.shape[-1] % 2:
        raise ValueError(f"skew scores need an even number of coordinates, got {embedding.shape[-1]}")
    a, b = embedding.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-b, a], dim=-1).flatten(-2)
    return rotated @ embedding.transpose(-1, -2)
