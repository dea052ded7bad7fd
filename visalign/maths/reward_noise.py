"""What can be done about wrong labels: voting by several models, soft labels, flips, margins, and two models that filter for each other.

``difference = r_chosen - r_rejected`` of the labelled pair: a correct, clear label has a large positive one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.maths.calibration import fit_temperature


@dataclass(frozen=True)
class Strength:
    """What M models think of each labelled pair, (n,) each: the ``mean`` difference and its standard deviation ``std`` between models."""

    mean: Tensor
    std: Tensor


def preference_strength(differences: Tensor) -> Strength:
    """Mean and population standard deviation over M models, trained on the same pairs in different orders.

    Negative means are likely wrong labels, means near 0 ambiguous ones, large ones easy.

    Args:
        differences: (M, n).
    Source: arXiv:2401.06080.
    """
    if differences.dim() != 2 or len(differences) < 2:
        raise ValueError(f"voting needs the differences of at least two models, (M, n), got {tuple(differences.shape)}")
    return Strength(differences.mean(dim=0), differences.std(dim=0, correction=0))


@dataclass(frozen=True)
class Treated:
    """Labels after treatment, (n,) each: the probability ``prob_chosen`` that the labelled choice is right and the ``margin``, both
    arguments of ``reward_losses.bradley_terry_loss``; ``flipped`` is bool."""

    prob_chosen: Tensor
    margin: Tensor
    flipped: Tensor


def treat_labels(strength: Strength, flip_fraction: float = 0.1, smooth_fraction: float = 0.1, smoothing: float = 0.3,
                 margin_scale: float = 0.0) -> Treated:
    """Flip the labels most likely wrong, smooth the next, and ask for margins where the label is clear.

    The ``flip_fraction`` of pairs with the lowest mean strength are flipped, but never one that the models agree with (mean >= 0); the
    next ``smooth_fraction`` keep their label with probability ``1 - smoothing``; the others get the margin ``margin_scale max(0, mean)``.

    Raises:
        ValueError: fractions outside [0, 1] or of sum above 1, smoothing outside [0, 0.5], or margin_scale < 0.
    Source: the treatments of arXiv:2401.06080 (flip, soft label, adaptive margin), in one pass.
    """
    if min(flip_fraction, smooth_fraction) < 0 or not flip_fraction + smooth_fraction <= 1:
        raise ValueError(f"flip_fraction and smooth_fraction must be >= 0 and sum to at most 1, got {flip_fraction} and {smooth_fraction}")
    if not 0 <= smoothing <= 0.5 or not margin_scale >= 0:
        raise ValueError(f"smoothing must lie in [0, 0.5] and margin_scale be >= 0, got {smoothing} and {margin_scale}")
    mean = strength.mean
    place = mean.argsort(stable=True).argsort(stable=True)
    num_flipped, num_smoothed = round(flip_fraction * len(mean)), round(smooth_fraction * len(mean))
    flipped = (place < num_flipped) & (mean < 0)
    doubtful = (place < num_flipped + num_smoothed) & ~flipped
    prob = torch.where(flipped, 0.0, torch.where(doubtful, 1 - smoothing, 1.0)).to(mean.dtype)
    margin = torch.where(flipped | doubtful, 0.0, margin_scale * mean.clamp(min=0))
    return Treated(prob, margin, flipped)


def vote_probability(votes_first: Tensor, votes_second: Tensor, prior: float = 1.0) -> Tensor:
    """``(v_first + prior) / (v_first + v_second + 2 prior)``: the label that a few human votes support, (n,).

    Raises:
        ValueError: negative votes, prior < 0, or no votes and prior 0.
    """
    total = votes_first + votes_second + 2 * prior
    if bool((votes_first < 0).any()) or bool((votes_second < 0).any()) or not prior >= 0 or not bool((total > 0).all()):
        raise ValueError("votes and prior must be >= 0, and a comparison without votes needs prior > 0")
    return (votes_first + prior) / total


def label_posterior(difference: Tensor, flip_rate: float) -> Tensor:
    """``P(label right | model) = (1 - q) p / [(1 - q) p + q (1 - p)]`` with ``p = sigmoid(d)``, (n,).

    That is ``sigmoid(d + log((1 - q) / q))``. Its mean over pairs, subtracted from 1, is the next estimate of q (expectation maximisation).

    Raises:
        ValueError: flip_rate outside (0, 0.5).
    """
    if not 0 < flip_rate < 0.5:
        raise ValueError(f"flip_rate must lie in (0, 0.5), got {flip_rate}")
    odds = torch.tensor((1 - flip_rate) / flip_rate, dtype=difference.dtype)
    return torch.sigmoid(difference + odds.log())


@dataclass(frozen=True)
class Flips:
    """What explains labels of a model's differences best: ``P(label right) = (1 - q) p + q (1 - p)`` with ``p = sigmoid(d / T)``.

    Attributes:
        rate: q, the share of flipped labels.
        temperature: T.
        posterior: that each label is right, (n,).
    """

    rate: float
    temperature: float
    posterior: Tensor


def fit_flips(difference: Tensor, rate: float | None = None, num_steps: int = 20_000) -> Flips:
    """Flip rate and temperature by expectation maximisation: :func:`label_posterior`, then its mean's complement for q and one Newton step
    towards the most likely temperature of labels with that posterior, in turn.

    The differences must come from a model that did not learn from these very labels, or it explains the flipped ones as well.

    Args:
        difference: (n,); positive where the model agrees with the label.
        rate: a known q, in [0, 0.5); ``None`` estimates it.
        num_steps: at most; it ends before when q and T move by less than 1e-8 of themselves.
    Raises:
        ValueError: a rate out of range, or differences that are not finite, rank no better than chance, or agree with every label.
    Source: Dempster, Laird & Rubin (1977) on the flip model of arXiv:2403.00409, with the temperature as a second unknown.
    """
    if rate is not None and not 0 <= rate < 0.5:
        raise ValueError(f"flip_rate must lie in [0, 0.5), got {rate}; at 0.5 labels say nothing")
    margin = difference.double()
    scale = 1 / fit_temperature(margin, torch.ones(len(margin), dtype=torch.int64))
    current = 0.2 if rate is None else rate
    posterior = torch.ones_like(margin)
    for _ in range(num_steps if rate != 0 else 0):
        posterior, prob = label_posterior(scale * margin, current), torch.sigmoid(scale * margin)
        if float((margin * (posterior - 0.5)).sum()) <= 0:
            raise ValueError("differences and labels fit no flip rate below 0.5; the model ranks no better than chance")
        newton = float((margin * (posterior - prob)).sum() / (margin.square() * prob * (1 - prob)).sum())
        before = scale, current
        scale = min(max(scale + newton, scale / 2), 2 * scale)
        current = min(max(float(1 - posterior.mean()), 1e-6), 0.499) if rate is None else rate
        if abs(scale / before[0] - 1) < 1e-8 and abs(current / before[1] - 1) < 1e-8:
            break
    return Flips(current, 1 / scale, posterior)


def keep_fraction(progress: float, noise: float, warmup: float = 0.3) -> float:
    """``1 - noise min(1, progress / warmup)``: how many pairs two models still exchange; early on everything, for models learn what is
    consistent before they learn exceptions.

    Args:
        progress: of the training, in [0, 1]; noise: expected share of wrong labels, in [0, 1); warmup: in (0, 1].
    Source: co-teaching, arXiv:1804.06872.
    """
    if not (0 <= progress <= 1 and 0 <= noise < 1 and 0 < warmup <= 1):
        raise ValueError(f"progress in [0, 1], noise in [0, 1) and warmup in (0, 1] are needed, got {progress}, {noise} and {warmup}")
    return 1 - noise * min(1.0, progress / warmup)


def co_filter(loss_a: Tensor, loss_b: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Which pairs a batch keeps for model A and for model B, bool (n,) each: those of smallest loss in the *other* model's eyes.

    A model that chose for itself would confirm its own mistakes.

    Args:
        loss_a, loss_b: (n,) of the same pairs.
        keep: fraction, in (0, 1]; at least one pair stays.
    Sources: co-teaching, arXiv:1804.06872; for reward models: arXiv:2505.10597.
    """
    if loss_a.shape != loss_b.shape or loss_a.dim() != 1 or not 0 < keep <= 1:
        raise ValueError(f"co-filtering needs two losses of shape (n,) and keep in (0, 1], got {tuple(loss_a.shape)}, "
                         f"{tuple(loss_b.shape)} and {keep}")
    count = max(1, round(keep * len(loss_a)))

    def smallest(loss: Tensor) -> Tensor:
        return loss.argsort(stable=True).argsort(stable=True) < count

    return smallest(loss_b), smallest(loss_a)
