"""DiffusionNFT's loss: one policy, pulled towards good samples and pushed from bad ones, without a likelihood or a trajectory.

The policy and the old policy imply a positive and a negative model, whose answers mix theirs on opposite sides of the old one:

    X+ = beta x0_policy + (1 - beta) x0_old            X- = (1 + beta) x0_old - beta x0_policy
    l  = mean_d (X - x0)^2 / w,                        w = max(mean_d |X - x0|, 1e-5) detached, or 1
    L  = [ r l+ + (1 - r) l- ] / beta                  r in [0, 1], how good the sample is

Everything is written in ``x0_pred``. The paper mixes velocities ``v``; given ``x`` each prediction kind is affine in the others with
coefficients that do not depend on the weights, so mixing any of them is the same mixing: the loss holds for flow, epsilon and v models
alike. In flow coordinates ``s = sigma / (alpha + sigma)``, ``x0_pred - x0 = -s (v - (x1 - x0))``, hence

    (X - x0)^2 = s^2 (v - (x1 - x0))^2 ,    adaptive:  l = s mean (dv)^2 / mean |dv|

Minimum per ``x`` without the adaptive weight: ``x0* = x0_old + (1 / beta) E[(2 r - 1)(x0 - x0_old) | x]``. Gradient at the old policy:
``-2 (2 r - 1)(x0 - x0_old) / w`` times ``d x0_policy / D``, whatever beta is.
Source: DiffusionNFT, arXiv:2509.16117.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST_WEIGHT = 1e-5  # of the published code; a perfect prediction must not divide by 0


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """``r = (1 + A / C) / 2`` with A clipped to +-C: 1 for the best samples, 0.5 for those that say nothing, (B,).

    Raises:
        ValueError: ``clip`` is not positive.
    """
    if not clip > 0:
        raise ValueError(f"advantages are clipped to +-clip, which must be > 0, got {clip}; the published value is 5")
    return 0.5 + 0.5 * advantage.clamp(-clip, clip) / clip


def implicit_predictions(policy: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Answers of the positive and the negative model, in any prediction kind: old plus and minus ``beta (policy - old)``, (B, ...)."""
    step = beta * (policy - old)
    return old + step, old - step


def nft_loss(policy: Tensor, old: Tensor, x0: Tensor, optimal: Tensor, beta: float, adaptive: bool = True) -> Tensor:
    """The loss of every sample, (B,).

    Args:
        policy, old: x0 predictions at one ``x``, (B, ...); ``old`` is taken as a constant.
        x0: clean samples, (B, ...).
        optimal: r, (B,), in [0, 1].
        beta: how far the two models lie from the old one, > 0.
        adaptive: divide by the mean absolute error, per sample.
    Raises:
        ValueError: shapes differ, or beta is not positive.
    """
    if not policy.shape == old.shape == x0.shape:
        raise ValueError(f"x0 predictions and x0 must have one shape, got {tuple(policy.shape)}, {tuple(old.shape)} and {tuple(x0.shape)}")
    if optimal.shape != policy.shape[:1]:
        raise ValueError(f"optimality takes one number per sample, ({policy.shape[0]},), got {tuple(optimal.shape)}")
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}; published values are 0.1 and 1")
    positive, negative = (_error(found, x0, adaptive) for found in implicit_predictions(policy, old.detach(), beta))
    return (optimal * positive + (1 - optimal) * negative) / beta


def _error(found: Tensor, x0: Tensor, adaptive: bool) -> Tensor:
    """``mean (X - x0)^2``, over ``mean |X - x0|`` if adaptive."""
    residual = (found - x0).flatten(1)
    squared = residual.square().mean(dim=1)
    if not adaptive:
        return squared
    # Float64: the weight of small errors is a small mean of large sums, and it divides.
    weight = residual.detach().double().abs().mean(dim=1).clamp(min=SMALLEST_WEIGHT)
    return squared / weight.to(squared)
