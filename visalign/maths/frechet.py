"""Gaussians fitted to features, moments that change by one sample in O(d^2), and the Fréchet distance between Gaussians.

    FD(P, Q) = |mu_P - mu_Q|^2 + tr(C_P + C_Q - 2 (C_P C_Q)^{1/2})

Everything is float64. Sources: FID, arXiv:1706.08500; FAD, arXiv:1812.08466; rank-one updates, Chan, Golub & LeVeque 1983.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of a set of features; adding, removing or swapping one costs O(d^2) and returns new moments.

    Attributes:
        count: n, at least 1.
        mean: float64 (d,).
        scatter: sum of outer products of the *centred* features, float64 (d, d). Centring keeps the digits that ``sum x x^T``
            loses when the mean is far from 0.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Moments of the rows of (n, d).

        Raises:
            ValueError: not a matrix with at least one row, or not finite.
        """
        if features.dim() != 2 or 0 in features.shape:
            raise ValueError(f"features are {tuple(features.shape)}; expected (n, d) with at least one row and one column")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{int((~torch.isfinite(features)).any(dim=1).sum())} of {len(features)} feature rows are not finite; "
                             "leave those samples out")
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        return Moments(count=len(features), mean=mean, scatter=centred.T @ centred)

    def add(self, feature: Tensor) -> Moments:
        """With one more feature, (d,)."""
        offset = feature - self.mean
        count = self.count + 1
        return Moments(count, self.mean + offset / count, torch.addr(self.scatter, offset, offset, alpha=self.count / count))

    def remove(self, feature: Tensor) -> Moments:
        """Without one of its features, (d,).

        Raises:
            ValueError: nothing would remain.
        """
        if self.count == 1:
            raise ValueError("cannot remove the only feature of a set: an empty set has no mean")
        offset = feature - self.mean
        count = self.count - 1
        return Moments(count, self.mean - offset / count, torch.addr(self.scatter, offset, offset, alpha=-self.count / count))

    def swap(self, leave: Tensor, enter: Tensor) -> Moments:
        """With ``enter`` in the place of its feature ``leave``, both (d,)."""
        old, new = leave - self.mean, enter - self.mean
        shift = (new - old) / self.count
        scatter = torch.addr(torch.addr(torch.addr(self.scatter, new, new), old, old, alpha=-1), shift, shift, alpha=-self.count)
        return Moments(self.count, self.mean + shift, scatter)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together."""
        count = self.count + other.count
        offset = other.mean - self.mean
        return Moments(count, self.mean + offset * (other.count / count),
                       torch.addr(self.scatter + other.scatter, offset, offset, alpha=self.count * other.count / count))

    def gaussian(self, shrinkage: float = 0.0, ddof: int = 1) -> Gaussian:
        """Mean and ``scatter / (n - ddof) + shrinkage I``.

        ``shrinkage`` belongs on *both* Gaussians of a comparison.

        Raises:
            ValueError: n <= ddof, where a covariance does not exist, or a negative shrinkage.
        """
        if self.count <= ddof:
            raise ValueError(f"a covariance with ddof={ddof} needs at least {ddof + 1} features, got {self.count}")
        return Gaussian(self.mean, self.scatter / (self.count - ddof)).shrunk(shrinkage)


@dataclass(frozen=True)
class Gaussian:
    """``N(mean, covariance)``, float64 (d,) and (d, d); the covariance may be singular, down to a point mass."""

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        dims = self.mean.shape[0] if self.mean.dim() == 1 else -1
        if self.covariance.shape != (dims, dims):
            raise ValueError(f"mean {tuple(self.mean.shape)} and covariance {tuple(self.covariance.shape)} do not fit; "
                             "expected (d,) and (d, d)")
        if self.mean.dtype != torch.float64 or self.covariance.dtype != torch.float64:
            raise ValueError(f"mean is {self.mean.dtype} and covariance {self.covariance.dtype}; expected float64: distances are small "
                             "differences of large traces")

    def shrunk(self, shrinkage: float) -> Gaussian:
        """With ``shrinkage`` added to the diagonal of the covariance."""
        if shrinkage < 0:
            raise ValueError(f"shrinkage {shrinkage} must be at least 0")
        return self if shrinkage == 0 else Gaussian(self.mean, self.covariance + shrinkage * torch.eye(len(self.mean), dtype=torch.float64))

    @cached_property
    def factor(self) -> Tensor:
        """``F`` with ``F F^T = covariance``, (d, rank); what is below rounding error, d eps times the largest eigenvalue, counts as 0.

        Raises:
            ValueError: the covariance is not positive semi-definite.
        """
        eigenvalues, vectors = torch.linalg.eigh(self.covariance)
        floor = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
        if bool(eigenvalues[0] < -100 * floor):
            raise ValueError(f"the covariance has the eigenvalue {float(eigenvalues[0]):.3g}, it must be positive semi-definite; "
                             "was it computed in less than float64?")
        kept = eigenvalues > floor
        return vectors[:, kept] * eigenvalues[kept].sqrt()


def frechet_distance(p: Gaussian, q: Gaussian) -> float:
    """Fréchet (2-Wasserstein, squared) distance of two Gaussians, >= 0.

        tr (C_P C_Q)^{1/2} = tr (C_P^{1/2} C_Q C_P^{1/2})^{1/2} = sum of the singular values of F_P^T F_Q,   C = F F^T

    The singular values need no square root of a rounded eigenvalue, so that singular covariances lose no digits, and nothing is
    ever complex. ``eps`` on the diagonal is therefore a choice (``Gaussian.shrunk``), not a necessity.

    Raises:
        ValueError: the two live in different dimensions.
    """
    if p.mean.shape != q.mean.shape:
        raise ValueError(f"Gaussians in {len(p.mean)} and {len(q.mean)} dimensions cannot be compared; were both made with one encoder?")
    cross = torch.linalg.svdvals(p.factor.T @ q.factor).sum() if p.factor.numel() and q.factor.numel() else 0.0
    distance = (p.mean - q.mean).square().sum() + p.covariance.trace() + q.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def point_distances(points: Tensor, q: Gaussian) -> Tensor:
    """``|x - mu|^2 + tr C``, float64 (n,): the Fréchet distance of each row of (n, d), a Gaussian without covariance."""
    return (points - q.mean).square().sum(dim=1) + q.covariance.trace()


def mahalanobis(points: Tensor, q: Gaussian) -> Tensor:
    """``(x - mu)^T C^{-1} (x - mu)``, float64 (n,): minus twice the log-density of each row, without its constant.

    Raises:
        ValueError: the covariance is singular.
    """
    factor, failed = torch.linalg.cholesky_ex(q.covariance)
    if int(failed) or q.factor.shape[1] < len(q.mean):
        raise ValueError(f"the covariance in {len(q.mean)} dimensions has rank {q.factor.shape[1]}: Mahalanobis distances do not exist; "
                         "give more exemplars than dimensions, or a shrinkage above 0")
    return torch.linalg.solve_triangular(factor, (points - q.mean).T, upper=False).square().sum(dim=0)
