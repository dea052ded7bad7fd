"""The Vendi score: how many different members a set effectively has, from 1 (all alike) to n (all orthogonal); and mean distances.

    VS_q = exp(H_q(lambda)),   lambda the eigenvalues of K / n,   K positive semi-definite with unit diagonal
    H_1 = -sum lambda ln lambda,   H_q = ln(sum lambda^q) / (1 - q),   H_inf = -ln max lambda

Source: Vendi score, arXiv:2210.02410 (q = 1); the orders q, arXiv:2310.12952.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize


def vendi_score(kernel: Tensor, q: float = 1.0) -> float:
    """Vendi score of order q of a similarity matrix, in [1, n].

    Args:
        kernel: symmetric, positive semi-definite, ones on the diagonal, (n, n).
        q: > 0; large orders count the dominant modes, small ones the rare members.
    Raises:
        ValueError: not such a kernel, or q <= 0.
    """
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or not kernel.shape[0]:
        raise ValueError(f"the kernel is {tuple(kernel.shape)}; expected (n, n), n at least 1")
    kernel = kernel.double()
    if not bool(((kernel.diagonal() - 1).abs() < 1e-6).all()) or not torch.allclose(kernel, kernel.T, atol=1e-6, rtol=0):
        raise ValueError("the kernel must be symmetric with ones on its diagonal: divide k(x, y) by sqrt(k(x, x) k(y, y))")
    return spectral_diversity(torch.linalg.eigvalsh(kernel / len(kernel)), q)


def spectral_diversity(eigenvalues: Tensor, q: float = 1.0) -> float:
    """``exp(H_q)`` of eigenvalues that sum to 1, (k,); those below rounding error count as 0.

    Raises:
        ValueError: q <= 0, or a negative eigenvalue.
    """
    if not q > 0:
        raise ValueError(f"order q = {q} must be above 0; 1 is the usual Vendi score, inf counts the largest mode alone")
    floor = len(eigenvalues) * torch.finfo(torch.float64).eps * float(eigenvalues.max())
    if bool(eigenvalues.min() < -1e-6):
        raise ValueError(f"the kernel has the eigenvalue {float(eigenvalues.min()):.3g} (times n); it must be positive semi-definite")
    p = eigenvalues[eigenvalues > floor]
    if q == 1:
        return math.exp(float(-(p * p.log()).sum()))
    if q == math.inf:
        return 1 / float(p.max())
    return math.exp(float(torch.logsumexp(q * p.log(), dim=0)) / (1 - q))


def unit_rows(features: Tensor) -> Tensor:
    """Rows of (n, d) with length 1, float64, so that ``x @ x.T`` is the cosine kernel.

    Raises:
        ValueError: a row of zeros, or one that is not finite, has no direction.
    """
    features = features.double()
    length = features.norm(dim=1)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise ValueError("a feature row is zero or not finite: its cosine with the others does not exist; leave that sample out")
    return normalize(features, dim=1)


def cosine_vendi(features: Tensor, q: float = 1.0) -> float:
    """Vendi score of the cosine kernel of (n, d) features, through whichever of ``X X^T`` (n, n) and ``X^T X`` (d, d) is smaller:
    both have the same non-zero eigenvalues.

    Raises:
        ValueError: no rows, or a row without a direction.
    """
    if features.dim() != 2 or not len(features):
        raise ValueError(f"features are {tuple(features.shape)}; expected (n, d) with at least one row")
    x = unit_rows(features)
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    return spectral_diversity(torch.linalg.eigvalsh(gram / len(x)), q)


def gaussian_vendi(features: Tensor, bandwidth: float, q: float = 1.0) -> float:
    """Vendi score of the kernel ``exp(-|x - y|^2 / (2 bandwidth^2))`` of (n, d) features.

    Unlike the cosine it does not mind what all members share, such as a background. With a bandwidth that is fixed once, scores of
    different sets compare.

    Raises:
        ValueError: no rows, rows that are not finite, or a bandwidth that is not above 0.
    """
    if features.dim() != 2 or not len(features) or not bool(torch.isfinite(features).all()):
        raise ValueError(f"features are {tuple(features.shape)}; expected finite (n, d) with at least one row")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth {bandwidth} must be above 0; half the median distance of a reference set is usual here")
    features = features.double()
    squared = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    return vendi_score((-squared / (2 * bandwidth**2)).exp(), q)


def mean_distance(distances: Tensor) -> Tensor:
    """Mean over the pairs of different members, (...), of symmetric matrices with a zero diagonal, (..., n, n).

    Raises:
        ValueError: fewer than two members.
    """
    n = distances.shape[-1]
    if n < 2:
        raise ValueError(f"the mean distance of {n} members does not exist; it needs at least two")
    return distances.sum(dim=(-2, -1)) / (n * (n - 1))
