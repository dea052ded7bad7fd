"""Losses of ranked lists of K >= 2 candidates, best first; with K = 2 each is a pair loss. Symbols: ``preference_inputs.py``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from visalign.maths.preference_declaration import Positive, preference_loss
from visalign.maths.preference_inputs import LossInput
from visalign.maths.reward_losses import plackett_luce_loss


@preference_loss(group="list")
def plackett_luce(inputs: LossInput) -> Tensor:
    """``-sum_k [u_k - log sum_{j >= k} exp u_j]``: the likelihood of the whole ranking; K = 2 is :func:`dpo`.

    Sources: PRO, arXiv:2306.17492; Diffusion-LPO, arXiv:2510.01540.
    """
    return plackett_luce_loss(inputs.u)


@preference_loss(group="list", reward=True)
def rankdpo(inputs: LossInput, *, rank: Literal["true", "policy"] = "true") -> Tensor:
    """``sum_{i<j} |G_i - G_j| |1/D_i - 1/D_j| softplus(-(u_i - u_j))``, ``G = 2^reward - 1``, ``D = log2(1 + rank)``.

    Pairs count by how much swapping them would change the discounted gain. Rewards belong in [0, 1] or a similar range, for ``G`` grows
    exponentially. ``rank`` is the candidate's place by reward, or ("policy") by the policy's own ``u``, as LambdaRank has it.
    With K = 2 it is :func:`dpo` times ``|2^r_w - 2^r_l| (1 - 1 / log2 3)``.

    Raises:
        ValueError: the candidates are not ordered best first.
    Source: RankDPO, arXiv:2410.18013.
    """
    u, reward = inputs.u, inputs.given("reward")
    if (reward[:, 1:] > reward[:, :-1]).any():
        raise ValueError("rankdpo needs the candidates of each group ordered by reward, best first; sort errors and rewards together")
    order = reward if rank == "true" else u.detach()
    place = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    gain, discount = reward.exp2(), 1 / torch.log2(2.0 + place)
    weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
    # Entry [i, j] is the pair in which i is better than j: the strict upper triangle.
    return (weight * softplus(u[:, None, :] - u[:, :, None])).triu(diagonal=1).sum(dim=(1, 2))


@preference_loss(group="list", reward=True)
def gpo(inputs: LossInput, *, eta: Positive = 1.0) -> Tensor:
    """``sum_i (u_i - eta s_i)^2`` with ``s_i`` the mean score of i against the group, ``LossInput.reward`` minus its group mean.

    For a general preference model ``s_i = mean_j s(i > j)`` (``preference_models.py``), which has mean 0 already; a Bradley-Terry
    reward has ``s(i > j) = r_i - r_j``. The reference is the policy that generated the group.
    Source: general preference optimisation, arXiv:2410.02197.
    """
    reward = inputs.given("reward")
    return (inputs.u - eta * (reward - reward.mean(dim=1, keepdim=True))).square().sum(dim=1)
