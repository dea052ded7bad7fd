"""Densities and divergences of one Gaussian sampler step ``x_next ~ N(mean, std^2 I)``.

``log_prob`` is summed over the latent dimensions (nats); ``log_prob_per_dim`` divides by their number D, the convention that
published GRPO clip ranges assume: its ratio is the D-th root of the true likelihood ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visalign.maths.process import broadcast_level
from visalign.types import NoiseLevel, Prediction, Transition


def transition_mean(prediction: Prediction, transition: Transition) -> Tensor:
    """``A x0_pred + B x1_pred``, (B, ...): the mean of ``x_next``; rollout and update both call this."""
    return transition.A * prediction.x0 + transition.B * prediction.x1


def state_coefficients(level: NoiseLevel, transition: Transition) -> tuple[float, float]:
    """``(c_x, c_v)`` of ``mean = c_x x + c_v velocity`` for a step that starts at ``level``.

    ``c_x = (A + B) / (alpha + sigma)``, ``c_v = (alpha B - sigma A) / (alpha + sigma)``. A change of velocity moves the mean by
    ``c_v`` times that change, so ``c_v / std`` is the step's weight in the policy gradient.
    """
    scale = level.alpha + level.sigma
    return (transition.A + transition.B) / scale, (level.alpha * transition.B - level.sigma * transition.A) / scale


def log_prob(x_next: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """``sum_d [ -(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2 ]`` in nats, (B,), float32 (float64 if an input is).

    Args:
        x_next, mean: (B, ...).
        std: > 0, a float or one scalar per sample (B,).
    Raises:
        ValueError: shapes differ, or ``std`` is not positive (a deterministic step has no density).
    """
    x_next, mean = _pair(x_next, mean, "x_next", "mean")
    scale = _positive(std, mean)
    log_std = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    return _sum(-0.5 * ((x_next - mean) / scale).square() - log_std - 0.5 * math.log(2 * math.pi))


def log_prob_per_dim(x_next: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """:func:`log_prob` divided by the number of latent dimensions, (B,). Source: DDPO, arXiv:2305.13301, as published in code."""
    return log_prob(x_next, mean, std) / _num_dims(mean)


def cps_log_prob_published(x_next: Tensor, mean: Tensor) -> Tensor:
    """``-mean_d (x_next - mean)^2``, (B,): what published code trains coefficients-preserving sampling with.

    Not a log density: differences are ``2 std^2`` times those of :func:`log_prob_per_dim`, so its clip ranges do not transfer.
    Source: CPS, arXiv:2509.05952.
    """
    x_next, mean = _pair(x_next, mean, "x_next", "mean")
    return -_sum((x_next - mean).square()) / _num_dims(mean)


def kl_divergence(mean_p: Tensor, mean_q: Tensor, std: float | Tensor) -> Tensor:
    """``KL(p || q) = sum_d (mean_p - mean_q)^2 / (2 std^2)`` of two steps with the same std, nats, (B,).

    Args:
        mean_p, mean_q: (B, ...); gradients flow into both.
        std: > 0, a float or one scalar per sample (B,).
    Raises:
        ValueError: shapes differ, or ``std`` is not positive.
    """
    mean_p, mean_q = _pair(mean_p, mean_q, "mean_p", "mean_q")
    return 0.5 * _sum(((mean_p - mean_q) / _positive(std, mean_p)).square())


def kl_divergence_per_dim(mean_p: Tensor, mean_q: Tensor, std: float | Tensor) -> Tensor:
    """:func:`kl_divergence` divided by the number of latent dimensions, (B,). ``h`` times this is Flow-GRPO's published KL."""
    return kl_divergence(mean_p, mean_q, std) / _num_dims(mean_p)


def _pair(first: Tensor, second: Tensor, first_name: str, second_name: str) -> tuple[Tensor, Tensor]:
    if first.shape != second.shape or first.dim() < 2:
        raise ValueError(f"{first_name} {tuple(first.shape)} and {second_name} {tuple(second.shape)} need one shape (B, ...)")
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)


def _positive(std: float | Tensor, like: Tensor) -> float | Tensor:
    value = broadcast_level(std, like, "std")
    positive = bool((value > 0).all()) if isinstance(value, Tensor) else value > 0
    if not positive:
        raise ValueError(f"std must be > 0, got {std}: a deterministic step has no density; leave it out of the trained steps")
    return value


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(dim=1)


def _num_dims(x: Tensor) -> int:
    return x[0].numel()
