"""Policy-gradient surrogates of one (sample, step) each: no reduction, so that the caller can sum over a global denominator.

All log-probabilities are **per latent dimension**, the convention of published clip ranges: with K the per-dimension KL of a
step, the log-ratio has mean -K and std sqrt(2 K / D), so a clip range is a trust region on K that scales as 1/sqrt(D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """Loss and diagnostics per element, all (B,) or (B, S) like the inputs.

    Attributes:
        loss: to be minimised, with gradient.
        ratio: the policy ratio that entered it, detached.
        clipped: bool, elements whose gradient is zero because the ratio has left its range in the direction of the advantage.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped(log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """PPO: ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``, ``r = exp(log_prob - log_prob_old)``.

    Args:
        log_prob: per dimension, with gradient, (B,) or (B, S).
        log_prob_old: per dimension under the sampling policy, same shape; ``log_prob.detach()`` when strictly on-policy.
        advantage: same shape.
        clip_low, clip_high: > 0, half widths of the ratio's range.
    Raises:
        ValueError: shapes differ, or a clip range is not positive.
    Source: PPO, arXiv:1707.06347, eq. 7; unequal ranges: DAPO, arXiv:2503.14476.
    """
    _check(clip_low, clip_high, log_prob, log_prob_old, advantage)
    return _clip((log_prob - log_prob_old.detach()).exp(), advantage, clip_low, clip_high)


def guard(
    log_prob: Tensor,
    log_prob_old: Tensor,
    kl_old_per_dim: Tensor,
    std: float | Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    step_size: float | Tensor | None = None,
) -> Surrogate:
    """GRPO-Guard's normalised ratio, ``r = exp((log_prob - log_prob_old + b) std)``, clipped as in PPO.

    With ``b = mean_d (mean - mean_old)^2 / (2 std^2)`` the exponent is exactly ``mean_d(eps (mean - mean_old))``: its expectation
    is 0 and its scale does not depend on the step's std, so one clip range fits all steps.

    Args:
        log_prob, log_prob_old, advantage, clip_low, clip_high: as in :func:`clipped`.
        kl_old_per_dim: ``b``, ``gaussian.kl_divergence_per_dim(mean, mean_old, std)``, same shape; its gradient is used.
        std: standard deviation of the step, > 0, float or broadcastable to the others, (S,) or (B, S).
        step_size: ``h = sigma - sigma_next``; if given the loss is divided by it, as in most published code.
    Raises:
        ValueError: shapes differ, or a clip range is not positive.
    Source: GRPO-Guard, arXiv:2510.22319.
    """
    _check(clip_low, clip_high, log_prob, log_prob_old, kl_old_per_dim, advantage)
    _check_scale(std, log_prob, "std")
    terms = _clip(((log_prob - log_prob_old.detach() + kl_old_per_dim) * std).exp(), advantage, clip_low, clip_high)
    if step_size is None:
        return terms
    _check_scale(step_size, log_prob, "step_size")
    return Surrogate(loss=terms.loss / step_size, ratio=terms.ratio, clipped=terms.clipped)


def dppo(log_prob: Tensor, log_prob_old: Tensor, kl_old_per_dim: Tensor, advantage: Tensor, threshold: float = 1e-5) -> Surrogate:
    """Divergence-masked policy gradient: ``-A r``, and 0 where the exact KL has reached ``threshold`` and r moves further away.

    Masked: ``K >= threshold`` and (A > 0 and r > 1, or A < 0 and r < 1). The ratio is never clipped.

    Args:
        log_prob, log_prob_old, advantage: as in :func:`clipped`.
        kl_old_per_dim: K, the exact KL per dimension between sampling and current policy, same shape; only compared.
        threshold: > 0; 1e-5 is the published value.
    Raises:
        ValueError: shapes differ, or the threshold is not positive.
    Source: Flow-DPPO, arXiv:2606.11025.
    """
    _check(threshold, threshold, log_prob, log_prob_old, kl_old_per_dim, advantage)
    ratio = (log_prob - log_prob_old.detach()).exp()
    away = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
    masked = (kl_old_per_dim >= threshold) & away
    return Surrogate(loss=torch.where(masked, 0.0, -advantage * ratio), ratio=ratio.detach(), clipped=masked)


def _clip(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    outside = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
    return Surrogate(loss=loss, ratio=ratio.detach(), clipped=outside)


def _check(low: float, high: float, *tensors: Tensor) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) != 1:
        raise ValueError(f"a surrogate takes tensors of one shape (broadcasting would average over pairs), got {shapes}")
    if not (low > 0 and high > 0):
        raise ValueError(f"clip ranges must be > 0, got {low} and {high}; use a large number to switch clipping off")


def _check_scale(scale: float | Tensor, like: Tensor, name: str) -> None:
    if isinstance(scale, Tensor) and torch.broadcast_shapes(scale.shape, like.shape) != like.shape:
        raise ValueError(f"{name} {tuple(scale.shape)} does not broadcast to {tuple(like.shape)}; give one value per step")
    positive = bool((scale > 0).all()) if isinstance(scale, Tensor) else scale > 0
    if not positive:
        raise ValueError(f"{name} must be > 0, got {scale}")
