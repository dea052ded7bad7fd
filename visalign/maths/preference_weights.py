"""Regression on good samples: weights instead of negatives, no reference. ``e`` is the policy's error (``preference_inputs.py``)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from visalign.maths.preference_declaration import Positive, preference_loss
from visalign.maths.preference_inputs import LossInput

_LARGEST_ENUMERATION = 1_000_000


@preference_loss(group="weight", reference=False, shared_noise=False)
def sft(inputs: LossInput) -> Tensor:
    """Mean of ``e`` over the group: supervised fine-tuning on every candidate given."""
    return inputs.policy.mean(dim=1)


@preference_loss(group="weight", reference=False, shared_noise=False)
def best_of_group(inputs: LossInput) -> Tensor:
    """``e`` of the first, best candidate alone: rejection-sampling fine-tuning (RAFT, arXiv:2304.06767)."""
    return inputs.policy[:, 0]


@preference_loss(group="weight", reference=False, reward=True, shared_noise=False, statistics=("mean_weight",))
def rwr(inputs: LossInput, *, temperature: Positive = 1.0) -> Tensor:
    """Reward-weighted regression: mean over the group of ``w e``, ``w = exp(r / temperature) / mean_weight``.

    ``mean_weight`` is the mean of ``exp(r / temperature)`` over the optimizer step on all processes, so that weights have mean 1 and
    the step does not grow with the reward.
    Sources: reward-weighted regression (Peters & Schaal, 2007); for flow models Flow-RWR, arXiv:2501.13918.
    """
    log_weight = inputs.given("reward") / temperature - math.log(inputs.statistics["mean_weight"])
    return (log_weight.exp() * inputs.policy).mean(dim=1)


def exponential_weights(inputs: LossInput, temperature: float) -> Tensor:
    """``exp(r / temperature)`` (P, K) in float64, the values whose mean :func:`rwr` is given.

    Raises:
        ValueError: the exponential overflows.
    """
    weights = (inputs.given("reward").double() / temperature).exp()
    if not torch.isfinite(weights).all():
        raise ValueError(f"exp(reward / temperature) overflows at temperature {temperature}: rewards reach "
                         f"{float(inputs.given('reward').max()):g}; raise the temperature or standardise the rewards")
    return weights


def curation_weights(reward: Tensor) -> Tensor:
    """``K softmax(reward)`` over the last axis: the chance to be picked among K samples by Bradley-Terry, times K.

    Its expectation over the K - 1 rivals is the factor ``H_K`` by which one round of curation changes a sample's density.
    Source: self-consuming models with curated data, arXiv:2407.09499.
    """
    return reward.shape[-1] * torch.softmax(reward, dim=-1)


def curated_distribution(probability: Tensor, reward: Tensor, num_candidates: int) -> Tensor:
    """``p H_K``: the distribution after users picked 1 of K independent samples of a discrete ``p``, by enumerating all groups.

        H_K(x) = E[ K e^r(x) / (e^r(x) + sum_{K-1} e^r(x_i)) ]

    Args:
        probability, reward: (n,), float64; the probabilities sum to 1.
        num_candidates: K >= 1, with ``n^K`` at most a million.
    Raises:
        ValueError: shapes, probabilities or sizes do not fit.
    """
    n = probability.shape[0]
    if probability.shape != reward.shape or probability.dim() != 1 or abs(float(probability.sum()) - 1) > 1e-6:
        raise ValueError(f"probability and reward need one shape (n,) and probabilities that sum to 1, got {tuple(probability.shape)}, "
                         f"{tuple(reward.shape)} and the sum {float(probability.sum()):g}")
    if num_candidates < 1 or n**num_candidates > _LARGEST_ENUMERATION:
        raise ValueError(f"{n} outcomes in groups of {num_candidates} cannot be enumerated; estimate with curation_weights on samples")
    groups = torch.tensor(list(itertools.product(range(n), repeat=num_candidates)))
    chance = probability[groups].prod(dim=1, keepdim=True) * torch.softmax(reward[groups], dim=1)
    return torch.zeros_like(probability).index_add_(0, groups.flatten(), chance.flatten())
