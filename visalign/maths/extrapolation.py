"""The Fréchet distance that infinitely many samples would have: FAD-infinity and FID-infinity.

    FD(n) = FD(inf) + slope / n + O(1 / n^2),       FD at several n <= N, a straight line in 1 / n, its intercept

A distance from n samples is too large, mostly because their covariance has spurious spread. Subsets are drawn *without* replacement:
repeated samples have a narrower covariance, which bends the line. What this cannot remove is the bias of the reference's own
statistics; use many exemplars.

Sources: FID-infinity, arXiv:1911.07023; FAD-infinity, arXiv:2311.01616.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from visalign.maths.frechet import Gaussian, Moments, frechet_distance


@dataclass(frozen=True)
class Extrapolation:
    """A line through values at several sample sizes.

    Attributes:
        intercept: the value at 1 / n = 0; may be negative for sets that hardly differ.
        slope: times 1 / n is the bias at n.
        r_squared: share of the values' variance that the line explains, at most 1; far below it the intercept means nothing.
        sizes, values: what it was drawn through.
    """

    intercept: float
    slope: float
    r_squared: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def extrapolate(sizes: Sequence[int], values: Sequence[float]) -> Extrapolation:
    """Least squares of ``values`` on ``1 / sizes``.

    Raises:
        ValueError: fewer than three different sizes.
    """
    if len(set(sizes)) < 3 or len(sizes) != len(values):
        raise ValueError(f"{len(values)} values at {len(set(sizes))} different sizes; a line with a meaningful R^2 needs at least three")
    x, y = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    centred = x - x.mean()
    slope = (centred * y).sum() / centred.square().sum()
    intercept = y.mean() - slope * x.mean()
    unexplained, total = (y - intercept - slope * x).square().sum(), (y - y.mean()).square().sum()
    r_squared = 1.0 if float(total) == 0 else 1 - float(unexplained / total)
    return Extrapolation(float(intercept), float(slope), r_squared, tuple(sizes), tuple(values))


def frechet_at_infinity(features: Tensor, reference: Gaussian, generator: Generator, num_sizes: int = 25,
                        smallest: int | None = None) -> Extrapolation:
    """Fréchet distance to ``reference`` at ``num_sizes`` sizes from ``smallest`` to N, evenly spaced, extrapolated.

    Args:
        features: (N, d).
        generator: draws one subset per size, without replacement.
        smallest: ``None`` is 2 d or N / 10, whichever is larger: below the dimension the covariance is singular and the bias is not
            proportional to 1 / n.
    Raises:
        ValueError: fewer than ``2 * smallest`` features, or sizes that are no range.
    """
    smallest = max(2 * features.shape[1], len(features) // 10) if smallest is None else smallest
    if smallest < 2 or num_sizes < 3:
        raise ValueError(f"smallest {smallest} must be at least 2 and num_sizes {num_sizes} at least 3")
    if len(features) < 2 * smallest:
        raise ValueError(f"{len(features)} features are too few to extrapolate: sizes from {smallest} on need at least {2 * smallest} "
                         f"(4 per dimension, here {features.shape[1]})")
    sizes = [round(size) for size in torch.linspace(smallest, len(features), num_sizes, dtype=torch.float64).tolist()]
    subsets = [torch.randperm(len(features), generator=generator)[:size] for size in sizes]
    return extrapolate(sizes, [frechet_distance(Moments.of(features[rows]).gaussian(), reference) for rows in subsets])
