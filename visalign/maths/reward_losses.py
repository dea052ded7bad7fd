"""Losses that teach a reward model from comparisons, lists and ratings: one number per comparison, the mean is the caller's.

``difference = r_first - r_second`` and ``prob_first`` is how probable it is that the first is better: 1 for a plain label, 0.5 for a tie,
a share of votes, or a posterior (``reward_noise.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from visalign.maths.preference_models import bradley_terry_ties


def bradley_terry_loss(difference: Tensor, prob_first: Tensor | float = 1.0, margin: Tensor | float = 0.0) -> Tensor:
    """``p softplus(-(d - m)) + (1 - p) softplus(d + m)``: cross-entropy of the label with ``sigmoid(d)``, whichever wins by a margin.

    With p = 1 and m = 0 it is ``-log sigmoid(d)``; p = 1 - s smooths labels by s.

    Args:
        difference: (n,).
        prob_first: in [0, 1], (n,) or one number.
        margin: how far the winner is to be ahead before the loss falls below log 2, (n,) or one number.
    Sources: Bradley & Terry (1952); margins by preference strength: Llama 2, arXiv:2307.09288.
    """
    target = torch.as_tensor(prob_first, dtype=difference.dtype, device=difference.device)
    if not bool(((target >= 0) & (target <= 1)).all()):
        raise ValueError(f"prob_first must lie in [0, 1], got {float(target.min()):.4g} to {float(target.max()):.4g}; labels of +1 and -1 "
                         "become (1 + label) / 2")
    return target * softplus(margin - difference) + (1 - target) * softplus(margin + difference)


def flip_corrected_loss(difference: Tensor, flip_rate: float) -> Tensor:
    """``[(1 - q) softplus(-d) - q softplus(d)] / (1 - 2 q)``: over labels flipped with rate q its expectation is the clean loss.

    Unbounded below, for it subtracts; average it over enough comparisons.

    Raises:
        ValueError: flip_rate outside [0, 0.5).
    Source: Natarajan et al. (2013); for preferences: arXiv:2403.00409.
    """
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate must lie in [0, 0.5), got {flip_rate}; at 0.5 labels say nothing")
    return ((1 - flip_rate) * softplus(-difference) - flip_rate * softplus(difference)) / (1 - 2 * flip_rate)


def ties_loss(difference: Tensor, outcome: Tensor, k: float = 5.0) -> Tensor:
    """``-log P(outcome)`` under Bradley-Terry with ties, see ``preference_models.bradley_terry_ties``.

    Args:
        difference: (n,).
        outcome: int64 (n,), 1 the first is better, 0 a tie, -1 the second is better.
        k: > 1, larger for more ties.
    """
    if outcome.shape != difference.shape or not bool(((outcome == 0) | (outcome.abs() == 1)).all()):
        raise ValueError(f"outcome must be 1, 0 or -1 per comparison, shape {tuple(difference.shape)}; got {outcome.unique().tolist()} of "
                         f"shape {tuple(outcome.shape)}")
    log_probs = bradley_terry_ties(difference, k)
    return -torch.where(outcome == 0, log_probs.tie, torch.where(outcome > 0, log_probs.first, log_probs.second))


def plackett_luce_loss(reward: Tensor, present: Tensor | None = None) -> Tensor:
    """``-sum_k [r_k - log sum_{j >= k} exp r_j]`` of lists, best first, (B,); K = 2 is ``softplus(-(r_0 - r_1))``.

    Args:
        reward: (B, K).
        present: bool (B, K), false behind the end of shorter lists.
    Raises:
        ValueError: a list has a gap.
    Source: Plackett (1975), Luce (1959); as a list-wise reward loss: arXiv:2306.17492.
    """
    if present is None:
        present = torch.ones_like(reward, dtype=torch.bool)
    if bool((present[:, 1:] & ~present[:, :-1]).any()):
        raise ValueError("lists must be filled from the front, best first; move absent candidates to the end")
    # A finite stand-in for minus infinity: gradients of logcumsumexp are NaN for a row that starts with infinities.
    known = torch.where(present, reward, torch.finfo(reward.dtype).min / 4)
    remaining = known.flip(1).logcumsumexp(dim=1).flip(1)
    return torch.where(present, remaining - known, 0.0).sum(dim=1)


def general_preference(first: Tensor, second: Tensor, scale: Tensor | None = None) -> Tensor:
    """``s = sum_m scale_m <R v_first, v_second>_m``, the log-odds that the first is better, (n,); antisymmetric, cycles allowed.

    ``R`` turns each consecutive pair m of coordinates by 90 degrees: with m = 1, embeddings at 0, 120 and 240 degrees beat each other in a
    circle, which no reward can express.

    Args:
        first, second: embeddings (n, 2 m), usually of norm 1.
        scale: weights of the m planes, >= 0, (n, m) or (m,), for example from the prompt; ``None`` for ones.
    Raises:
        ValueError: an odd number of coordinates.
    Source: general preference model, arXiv:2410.02197; all pairs of a group: ``preference_models.skew_scores``.
    """
    if first.shape != second.shape or first.shape[-1] % 2:
        raise ValueError(f"embeddings need one shape (n, even), got {tuple(first.shape)} and {tuple(second.shape)}")
    a, b = first.unflatten(-1, (-1, 2)).unbind(-1)
    c, d = second.unflatten(-1, (-1, 2)).unbind(-1)
    planes = a * d - b * c
    return (planes if scale is None else scale * planes).sum(dim=-1)


def rating_loss(predicted: Tensor, rating: Tensor) -> Tensor:
    """Mean squared error over the ratings a sample has, (n,); 0 for a sample without any.

    Args:
        predicted: (n, K), one head per rated aspect.
        rating: (n, K), NaN where an aspect was not rated, on one scale such as [0, 1].
    Source: the first stage of ArmoRM, arXiv:2406.12845.
    """
    if predicted.shape != rating.shape:
        raise ValueError(f"predicted and rating need one shape (n, K), got {tuple(predicted.shape)} and {tuple(rating.shape)}")
    rated = torch.isfinite(rating)
    # The replaced target keeps NaN out of the gradient as well.
    error = torch.where(rated, predicted - torch.where(rated, rating, 0.0), 0.0)
    return error.square().sum(dim=1) / rated.sum(dim=1).clamp(min=1)


def gated_reward(ratings: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``sum_k softmax(logits / temperature)_k ratings_k``, (n,): aspects weighed by a gate that sees the prompt alone.

    The gate is trained with :func:`bradley_terry_loss` while the heads stay as they are; it can never want less of an aspect.

    Args:
        ratings: (n, K), decorrelated from what must not count, see :func:`without_nuisance`.
        logits: (n, K), or (n / G, K) repeated by the caller.
    Source: the second stage of ArmoRM, arXiv:2406.12845.
    """
    if ratings.shape != logits.shape or not temperature > 0:
        raise ValueError(f"ratings and logits need one shape (n, K) and temperature > 0, got {tuple(ratings.shape)}, {tuple(logits.shape)} "
                         f"and {temperature}")
    return (torch.softmax(logits / temperature, dim=1) * ratings).sum(dim=1)


def without_nuisance(ratings: Tensor, nuisance: Tensor) -> tuple[Tensor, Tensor]:
    """Ratings with their linear dependence on a nuisance (length, brightness) taken out: ``rating_k - c_k nuisance``, and c (K,).

    Args:
        ratings: (n, K); nuisance: (n,), of a set the frozen coefficients are then used with.
    Raises:
        ValueError: a constant nuisance.
    Source: ArmoRM's correction for verbosity, arXiv:2406.12845, by least squares.
    """
    centred = nuisance - nuisance.mean()
    spread = centred.square().sum()
    if not float(spread) > 0:
        raise ValueError("the nuisance is constant, nothing depends on it; leave the correction out")
    coefficient = centred @ (ratings - ratings.mean(dim=0)) / spread
    return ratings - nuisance[:, None] * coefficient, coefficient


def centring_penalty(first: Tensor, second: Tensor) -> Tensor:
    """``(r_first + r_second)^2``, (n,): comparisons leave a constant per prompt free, this holds it near 0. Source: arXiv:2312.09244."""
    return (first + second).square()
