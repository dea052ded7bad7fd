"""More noise for a state that already has some, and where in the training range a timestep lies."""

from __future__ import annotations

import torch
from torch import Tensor

from visalign.protocols import TrainingTimes


def renoise(x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, alpha_more: Tensor, sigma_more: Tensor) -> Tensor:
    """The forward process from one noise level on to a higher one.

        x' = (alpha' / alpha) x + sqrt(sigma'^2 - sigma^2 alpha'^2 / alpha^2) noise

    A state distributed as the process' marginal stays so: its own noise and the added one make up ``sigma'``.

    Args:
        x, noise: state at (alpha, sigma) and fresh N(0, I), (n, ...).
        alpha, sigma, alpha_more, sigma_more: levels before and after, (n,).
    Raises:
        ValueError: a state without signal, or a level below the one before.
    """
    if bool((alpha == 0).any()):
        raise ValueError("pure noise (alpha 0) is the highest level there is; start further down")
    kept = alpha_more / alpha
    added = sigma_more.square() - (kept * sigma).square()
    if bool((added < -1e-6 * sigma_more.square()).any()):
        at = int(added.argmin())
        raise ValueError(f"row {at} would lose noise: sigma / alpha goes from {float(sigma[at] / alpha[at]):.4g} to "
                         f"{float(sigma_more[at] / alpha_more[at]):.4g}; renoise goes upwards only")
    kept, std = (value.to(x).reshape(-1, *[1] * (x.dim() - 1)) for value in (kept, added.clamp(min=0).sqrt()))
    return kept * x + std * noise


def training_fraction(times: TrainingTimes, timesteps: Tensor) -> Tensor:
    """The inverse of ``times.timestep``, which is affine up to rounding: 0 at the lowest timestep, 1 at the highest, float64 (n,)."""
    low, high = times.timestep(torch.tensor([0.0, 1.0], dtype=torch.float64))
    return (timesteps.detach().to("cpu", torch.float64) - low) / (high - low)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """``sqrt(d^2 + c^2) - c``, element by element: quadratic below ``c``, linear above.

    Source: Improved techniques for consistency models, arXiv:2310.14189.
    """
    # d^2 / (sqrt + c): the difference of two nearly equal numbers loses what small distances are made of.
    squared = difference.square()
    return squared / ((squared + c * c).sqrt() + c)
