"""Matching errors as surrogate log-probabilities (Advantage Weighted Matching).

The evidence bound of a diffusion model is a weighted sum of denoising errors, so a weighted error with a minus sign can play the part of
a log-probability. With the velocity error ``l = mean_d (v - (x1 - x0))^2`` in flow coordinates, where the noise level is
``s = sigma / (alpha + sigma)`` (the time of a rectified flow; ``s^2 l`` is exactly the error of ``x0_pred``, for every process):

    uniform   -l
    t         -s l
    t2        -s^2 l
    huber     -s ( sqrt(l + e) - sqrt(e) )                         e = 1e-10
    ghuber    -(s / p) ( (l + e)^p - e^p )                         slope in l: -s (l + e)^(p - 1); p = 1 is "t"

The last two grow slowly in ``l``: a negative advantage times an unbounded error is what makes the others unstable.
Source: Advantage Weighted Matching, arXiv:2509.25050.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
_EPS = 1e-10


def matching_error(velocity: Tensor, target: Tensor) -> Tensor:
    """``mean_d (v - target)^2``, float64 (B,): differences of errors of two policies are far smaller than the errors.

    Raises:
        ValueError: shapes differ.
    """
    if velocity.shape != target.shape:
        raise ValueError(f"velocity and target must have one shape, got {tuple(velocity.shape)} and {tuple(target.shape)}")
    return (velocity.double() - target.double()).square().flatten(1).mean(dim=1)


def surrogate_log_prob(error: Tensor, s: Tensor, weighting: Weighting = "ghuber", power: float = 0.25) -> Tensor:
    """The table above, (B,) for errors (B,) >= 0 and levels (B,) in [0, 1].

    Args:
        power: p of "ghuber", in (0, 1].
    Raises:
        ValueError: an unknown weighting, shapes that differ, or a power outside (0, 1].
    """
    check_weighting(weighting, power)
    if error.shape != s.shape:
        raise ValueError(f"errors {tuple(error.shape)} and levels {tuple(s.shape)} must have one shape; give one level per sample")
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -s * error
    if weighting == "t2":
        return -s.square() * error
    exponent = 0.5 if weighting == "huber" else power
    scale = s if weighting == "huber" else s / power
    return -scale * ((error + _EPS).pow(exponent) - _EPS**exponent)


def check_weighting(weighting: str, power: float) -> None:
    """Raises ValueError for an unknown weighting or a power outside (0, 1]."""
    if weighting not in get_args(Weighting):
        raise ValueError(f"unknown weighting {weighting!r}; use {', '.join(get_args(Weighting))}")
    if not 0 < power <= 1:
        raise ValueError(f"the power of ghuber must lie in (0, 1], got {power}; the published value is 0.25")
