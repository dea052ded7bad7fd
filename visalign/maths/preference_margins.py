"""Losses of pairs that also read how much better the chosen sample is, and weights of whole pairs.

Symbols as in ``preference_inputs.py``; ``r_w``, ``r_l`` are the pair's rewards. A weight per pair is ``LossInput.weight``: it multiplies
any loss.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import softplus

from visalign.maths.preference_declaration import Finite, Positive, Range, preference_loss
from visalign.maths.preference_inputs import LossInput

PICKSCORE_RANGE = (0.11543526500463486, 0.28201571106910706)
"""Smallest and largest PickScore cosine (before the factor 100) of SmPO's training set."""


@preference_loss(group="pair", reward=True)
def smpo(inputs: LossInput, *, low: Finite, high: Finite, gamma: Positive = 10.0) -> Tensor:
    """Smoothed preferences, ``softplus(-s u)`` with ``s = gamma (2 p - 1)``, ``p = sigmoid((r_w - r_l) / (high - low))``.

    ``p`` is the softmax over the pair's min-max normalised rewards, so ``|s| <= gamma tanh(1/2)`` inside the range. Equal rewards have
    no gradient; a pair whose order contradicts the reward is followed the other way round.

    Args:
        low, high: the reward's range over the data set, fixed before training (:data:`PICKSCORE_RANGE` for that reward alone).
    Source: SmPO-Diffusion, arXiv:2506.02698.
    """
    if not high > low:
        raise ValueError(f"smpo needs high > low, the reward's range over the data set; got low {low} and high {high}")
    reward = inputs.given("reward")
    smoothness = gamma * torch.tanh((reward[:, 0] - reward[:, 1]) / (2 * (high - low)))
    return softplus(-smoothness * inputs.margin)


@preference_loss(group="pair", reward=True)
def odpo(inputs: LossInput, *, alpha: Positive = 1.0) -> Tensor:
    """DPO with an offset, ``softplus(-(u - alpha (r_w - r_l)))``: the margin has to reach the reward gap, in units of ``alpha``.

    Source: arXiv:2402.10571, with the offset linear in the gap (the paper's default is ``alpha log(r_w - r_l)``).
    """
    reward = inputs.given("reward")
    return softplus(alpha * (reward[:, 0] - reward[:, 1]) - inputs.margin)


@preference_loss(group="pair", reward=True)
def modpo(inputs: LossInput, *, own_weight: Annotated[float, Range(0.0, 1.0, exclude=(0.0,))] = 0.5) -> Tensor:
    """Several objectives, ``softplus(-(u - [R_w - R_l]) / own_weight)``: ``R`` is the weighted sum of the *other* rewards.

    The order of the pair is the label of one objective with weight ``own_weight``; the optimum maximises the weighted sum of all.
    Source: MODPO, arXiv:2310.03708.
    """
    reward = inputs.given("reward")
    return softplus((reward[:, 0] - reward[:, 1] - inputs.margin) / own_weight)


def rarity_weights(probability: Tensor, power: float = 1.0, constant: float = 0.72) -> Tensor:
    """Pair weights ``(constant / probability)^power`` that raise the share of rare scores.

    Args:
        probability: share of the pairs with such a score, in (0, 1], see :func:`histogram_probability`.
        power: 0 weighs all pairs alike.
        constant: the published one; a factor common to all pairs.
    Raises:
        ValueError: a probability outside (0, 1].
    Source: VideoDPO, arXiv:2412.14167.
    """
    if not ((probability > 0) & (probability <= 1)).all():
        raise ValueError("probabilities must lie in (0, 1]; use histogram_probability of the same scores")
    return (constant / probability).pow(power)


def histogram_probability(score: Tensor, num_bins: int = 50) -> Tensor:
    """Share of the entries of ``score`` (n,) that fall into the same of ``num_bins`` equal bins, (n,) in (0, 1].

    Raises:
        ValueError: no entries, a non-finite one, or no bins.
    """
    if score.dim() != 1 or score.numel() == 0 or not torch.isfinite(score).all() or num_bins < 1:
        raise ValueError(f"a histogram needs finite scores of shape (n,) and num_bins >= 1, got {tuple(score.shape)} and {num_bins}")
    low, high = score.min(), score.max()
    width = torch.where(high > low, (high - low) / num_bins, torch.ones_like(low))
    bins = ((score - low) / width).long().clamp(max=num_bins - 1)
    return (torch.bincount(bins, minlength=num_bins)[bins] / score.numel()).to(score.dtype)
