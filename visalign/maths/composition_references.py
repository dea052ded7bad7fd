"""Rewards measured against reference samples of the same prompt: log-sigmoid (LSC) and sigmoid (PAR) of the difference.

Rewards must be Bradley-Terry log-odds: PickScore before any division, HPSv3's mean, ImageReward. A cosine needs a temperature first, see
``calibration.fit_temperature``. References come from the *initial* policy and stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def log_sigmoid_centred(reward: Tensor, reference: Tensor) -> Tensor:
    """``log sigmoid(r - r_ref)``, <= 0, (N,): the log-probability of being better than the reference.

    Summed over rewards it is the log-probability of being good on *all* of them (a logical AND): progress where a reward is already far
    above its reference earns little, whatever falls behind pulls with slope 1.

    Source: Wang et al. (2024), arXiv:2402.00742.
    """
    return logsigmoid(reward - reference)


def preference_as_reward(reward: Tensor, references: Tensor) -> Tensor:
    """``(1 / M) sum_m sigmoid(r - r_ref_m)`` over the references that are there, in (0, 1), (N,).

    Args:
        reward: (N,).
        references: (N, M), NaN where a prompt has fewer; a sample without any is NaN.
    Source: PAR, arXiv:2502.18770.
    """
    present = torch.isfinite(references)
    won = torch.where(present, torch.sigmoid(reward[:, None] - torch.where(present, references, 0.0)), 0.0)
    count = present.sum(dim=1)
    return torch.where(count > 0, won.sum(dim=1) / count.clamp(min=1), torch.nan)


def reference_quantile(references: Tensor, quantile: float = 0.85) -> Tensor:
    """Quantile of each row's references, linear between neighbours, (N,); NaN for rows without any.

    Args:
        references: (N, M), NaN where a prompt has fewer.
        quantile: in [0, 1]; at 0.85 a sample is "good" when it beats 85 % of what the initial policy makes.
    Raises:
        ValueError: quantile outside [0, 1], or no column.
    Source: the percentile reference of arXiv:2402.00742.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"a quantile lies in [0, 1], got {quantile}")
    if references.dim() != 2 or references.shape[1] == 0:
        raise ValueError(f"references need the shape (N, M) with M >= 1, got {tuple(references.shape)}")
    return torch.where(torch.isfinite(references), references, torch.nan).nanquantile(quantile, dim=1)
