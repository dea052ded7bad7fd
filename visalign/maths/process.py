"""The forward process ``x = alpha x0 + sigma x1`` and the ways a network can parametrise its answer.

Every parametrisation is one linear combination of the end points, so all of them convert into each other:

    epsilon        m = x1                                       undefined at alpha = 0
    sample         m = x0                                       undefined at sigma = 0
    v_prediction   m = (alpha x1 - sigma x0) / r                r = sqrt(alpha^2 + sigma^2), 1 for VP models
    flow           m = x1 - x0
    edm            m = (sigma x0 - alpha d^2 x1) / (d r_d)      r_d = sqrt(sigma^2 + alpha^2 d^2), d = sigma_data

Every process is a rescaled rectified flow: with ``c = alpha + sigma``, ``y = x / c = (1 - s) x0 + s x1`` at ``s = sigma / c``.

Sources: Salimans & Ho (v-prediction), arXiv:2202.00512; Karras et al. (EDM, eq. 7), arXiv:2206.00364;
Liu et al. (rectified flow), arXiv:2209.03003.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from visalign.types import NoiseLevel, Prediction, PredictionKind


@dataclass(frozen=True)
class FlowCoordinates:
    """A noise level seen as a rectified flow: ``x = scale * y`` and ``y = (1 - s) x0 + s x1``."""

    scale: float
    s: float


def flow_coordinates(level: NoiseLevel) -> FlowCoordinates:
    """``scale = alpha + sigma``, ``s = sigma / scale``; the identity (1, sigma) for flow levels.

    Raises:
        ValueError: a level is negative, or both are zero.
    """
    alpha, sigma = float(level.alpha), float(level.sigma)
    if alpha < 0 or sigma < 0 or alpha + sigma <= 0:
        raise ValueError(f"a noise level needs alpha >= 0, sigma >= 0 and alpha + sigma > 0, got alpha {alpha}, sigma {sigma}")
    return FlowCoordinates(scale=alpha + sigma, s=sigma / (alpha + sigma))


def broadcast_level(level: float | Tensor, like: Tensor, name: str = "level") -> float | Tensor:
    """A float unchanged; a tensor () or (B,) reshaped to (B, 1, ..., 1), on the device of ``like`` (B, ...), at least float32.

    Raises:
        ValueError: a tensor that is not one scalar per sample.
    """
    if not isinstance(level, Tensor):
        return float(level)
    level = level.to(device=like.device, dtype=torch.promote_types(level.dtype, torch.float32))
    if level.dim() == 0:
        return level
    if level.dim() != 1 or level.shape[0] not in (1, like.shape[0]):
        raise ValueError(f"{name} has shape {tuple(level.shape)}; give a float or one scalar per sample, ({like.shape[0]},)")
    return level.reshape(-1, *([1] * (like.dim() - 1)))


def to_prediction(
    output: Tensor, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, kind: PredictionKind, sigma_data: float = 0.5
) -> Prediction:
    """The network's output in end-point form.

    Args:
        output, x: network output and the state it was given, both (B, ...); computed in float32, or float64 if either is.
        alpha, sigma: noise level of ``x``, floats or one scalar per sample (B,).
        kind: what ``output`` estimates, see the module's table.
        sigma_data: EDM's standard deviation of the data; read by "edm" only.
    Raises:
        ValueError: an unknown kind, different shapes, or a level at which this kind does not determine both end points.
    """
    _check_kind(kind)
    if output.shape != x.shape:
        raise ValueError(
            f"output {tuple(output.shape)} and x {tuple(x.shape)} differ in shape; "
            "drop learned-variance channels and condition channels before converting"
        )
    x, output = _working_precision(x, output)
    a, s = broadcast_level(alpha, x, "alpha"), broadcast_level(sigma, x, "sigma")
    if kind == "epsilon":
        _require_nonzero(a, "alpha", kind)
        return Prediction(x0=(x - s * output) / a, x1=output)
    if kind == "sample":
        _require_nonzero(s, "sigma", kind)
        return Prediction(x0=output, x1=(x - a * output) / s)
    _require_nonzero(a + s, "alpha + sigma", kind)
    if kind == "flow":
        return Prediction(x0=(x - s * output) / (a + s), x1=(x + a * output) / (a + s))
    # v is EDM's output with unit data variance and the opposite sign (arXiv:2206.00364, appendix C.3 uses the same rotation).
    d, sign = (1.0, -1.0) if kind == "v_prediction" else (sigma_data, 1.0)
    r = (s * s + (a * d) * (a * d)) ** 0.5
    x0 = (a * d * d) / (r * r) * x + sign * (s * d / r) * output
    return Prediction(x0=x0, x1=s / (r * r) * x - sign * (a * d / r) * output)


def from_prediction(
    prediction: Prediction, alpha: float | Tensor, sigma: float | Tensor, kind: PredictionKind, sigma_data: float = 0.5
) -> Tensor:
    """The output a network of this kind would have given; the inverse of :func:`to_prediction`, defined at every level.

    Args:
        prediction: both end points, each (B, ...); they determine ``x`` at this level.
        alpha, sigma, kind, sigma_data: as in :func:`to_prediction`.
    Raises:
        ValueError: an unknown kind, or alpha = sigma = 0.
    """
    _check_kind(kind)
    x0, x1 = _working_precision(prediction.x0, prediction.x1)
    if kind == "epsilon":
        return x1
    if kind == "sample":
        return x0
    if kind == "flow":
        return x1 - x0
    a, s = broadcast_level(alpha, x0, "alpha"), broadcast_level(sigma, x0, "sigma")
    _require_nonzero(a + s, "alpha + sigma", kind)
    d, sign = (1.0, -1.0) if kind == "v_prediction" else (sigma_data, 1.0)
    r = (s * s + (a * d) * (a * d)) ** 0.5
    return sign * (s / (d * r) * x0 - (a * d / r) * x1)


def from_velocity(velocity: Tensor, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Prediction:
    """End points from ``velocity = x1 - x0``: ``x0 = (x - sigma v) / (alpha + sigma)``, ``x1 = (x + alpha v) / (alpha + sigma)``.

    Defined at every level of every process, which is why trajectories store the velocity. Shapes as in :func:`to_prediction`.
    """
    return to_prediction(velocity, x, alpha, sigma, "flow")


def _check_kind(kind: str) -> None:
    if kind not in get_args(PredictionKind):
        raise ValueError(f"unknown prediction kind {kind!r}; use one of {', '.join(get_args(PredictionKind))}")


def _working_precision(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)


def _require_nonzero(level: float | Tensor, name: str, kind: str) -> None:
    zero = bool((level == 0).any()) if isinstance(level, Tensor) else level == 0
    if zero:
        raise ValueError(
            f"a {kind!r} output does not determine both end points at {name} = 0; "
            "start or end the schedule one level inside, or use a model that predicts 'flow' or 'v_prediction'"
        )
