"""Maximum mean discrepancy: how far apart two sets of features are under a kernel, and the kernels of the published metrics.

    MMD^2_u = 1/(m(m-1)) sum_{i != j} k(x_i, x_j) + 1/(n(n-1)) sum_{i != j} k(y_i, y_j) - 2/(m n) sum_ij k(x_i, y_j)

    KID         k = (x . y / d + 1)^3                        means over subsets of 1000
    KAD   100 x k = exp(-|x - y|^2 / (2 s^2))                s the median distance within the reference, frozen with it
    CMMD 1000 x the same with s = 10, on rows of length 1

Unbiased: 0 on average, and below 0 about as often as above, when both sets come from one distribution. Keeping the terms i = j, as CMMD
was published, adds about (1/m + 1/n) (k(x, x) - E k), for small sets more than most differences. Kernels are summed in blocks, so that
memory does not grow with n^2. Everything is float64.

Sources: KID, arXiv:1801.01401; KAD, arXiv:2502.15602; CMMD, arXiv:2401.09603; MMD, Gretton et al., JMLR 13, 2012.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Generator, Tensor

BLOCK = 2048  # rows and columns of a kernel matrix in memory at once, 32 MB
BINS = 4096  # of the histogram that brackets a median


class Kernel(Protocol):
    """A positive definite function of two features."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """k of every row of (m, d) with every row of (n, d), (m, n)."""

    def diagonal(self, x: Tensor) -> Tensor:
        """k of every row of (m, d) with itself, (m,)."""


@dataclass(frozen=True)
class PolynomialKernel:
    """``(x . y / d + 1)^degree``."""

    degree: int = 3

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** self.degree

    def diagonal(self, x: Tensor) -> Tensor:
        return (x.square().mean(dim=1) + 1) ** self.degree


@dataclass(frozen=True)
class GaussianKernel:
    """``exp(-|x - y|^2 / (2 bandwidth^2))``, bandwidth above 0."""

    bandwidth: float

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < float("inf"):
            raise ValueError(f"bandwidth {self.bandwidth} must be above 0 and finite; a median distance is 0 where most features are equal")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-squared_distances(x, y) / (2 * self.bandwidth**2))

    def diagonal(self, x: Tensor) -> Tensor:
        return x.new_ones(len(x))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2``, (m, n). Centred first: far from 0 the expansion into products would lose the digits that differ."""
    centre = y.mean(dim=0)
    x, y = x - centre, y - centre
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None] - 2 * x @ y.T).clamp(min=0)


def kernel_sums(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """``sum_j k(x_i, y_j)``, (m,), block by block."""
    return torch.cat([sum((kernel(rows, columns).sum(dim=1) for columns in y.split(BLOCK)), rows.new_zeros(len(rows)))
                      for rows in x.split(BLOCK)])


def pair_sums(x: Tensor, kernel: Kernel) -> Tensor:
    """``sum_{j != i} k(x_i, x_j)``, (m,)."""
    return kernel_sums(x, x, kernel) - kernel.diagonal(x)


@dataclass(frozen=True)
class KernelReference:
    """The set that others are compared with.

    Attributes:
        features: (n, d), n at least 2, float64.
        kernel: of the comparison.
    """

    features: Tensor
    kernel: Kernel

    def __post_init__(self) -> None:
        check_rows(self.features, "the reference's features")

    @cached_property
    def within(self) -> float:
        """Mean kernel of two different rows."""
        n = len(self.features)
        return float(pair_sums(self.features, self.kernel).sum()) / (n * (n - 1))

    def attraction(self, x: Tensor) -> Tensor:
        """Mean kernel of every row of (m, d) with the reference, (m,)."""
        return kernel_sums(x, self.features, self.kernel) / len(self.features)


@dataclass(frozen=True)
class KernelSums:
    """All that MMD needs to know of a set.

    Attributes:
        count: members, at least 2.
        pairs: kernel summed over ordered pairs of different members.
        attraction: ``KernelReference.attraction`` summed over the members.
    """

    count: int
    pairs: float
    attraction: float

    @property
    def pair_mean(self) -> float:
        """Mean kernel of two different members."""
        return self.pairs / (self.count * (self.count - 1))

    def mmd2(self, reference: KernelReference) -> float:
        """``MMD^2_u`` of the set and the reference.

        Raises:
            ValueError: fewer than two members.
        """
        if self.count < 2:
            raise ValueError(f"MMD needs at least 2 features, got {self.count}: the unbiased estimate averages over pairs")
        return self.pair_mean + reference.within - 2 * self.attraction / self.count


@dataclass(frozen=True)
class KernelSet:
    """A set beside its reference: features (m, d), float64, and their sums, computed once."""

    features: Tensor
    reference: KernelReference

    @cached_property
    def sums(self) -> KernelSums:
        pairs = pair_sums(self.features, self.reference.kernel).sum()
        return KernelSums(len(self.features), float(pairs), float(self.reference.attraction(self.features).sum()))


def mmd2(x: Tensor, reference: KernelReference) -> float:
    """``MMD^2_u`` of the rows of (m, d) and the reference.

    Raises:
        ValueError: fewer than two rows, rows that are not finite, or of another width.
    """
    check_rows(x, "features")
    if x.shape[1] != reference.features.shape[1]:
        raise ValueError(f"features in {x.shape[1]} dimensions cannot be compared with a reference in {reference.features.shape[1]}; were "
                         "both made with one encoder?")
    return KernelSet(x.double(), reference).sums.mmd2(reference)


@dataclass(frozen=True)
class SubsetEstimate:
    """``MMD^2_u`` as the mean over subsets; ``std`` is their spread, ``None`` of a single one."""

    mean: float
    std: float | None
    num_subsets: int
    subset_size: int


def mmd2_over_subsets(x: Tensor, reference: KernelReference, generator: Generator, num_subsets: int = 100,
                      subset_size: int = 1000) -> SubsetEstimate:
    """Mean and standard deviation of ``MMD^2_u`` between random subsets of both sides, each drawn without replacement.

    With fewer than ``subset_size`` rows on either side there is one estimate, of all rows of both. It has the same mean, so that the
    number stays comparable; the spread does not exist.

    Raises:
        ValueError: as ``mmd2``, or fewer than one subset or two rows per subset.
    """
    check_subsets(num_subsets, subset_size)
    m, n = len(x), len(reference.features)
    if min(m, n) < subset_size:
        return SubsetEstimate(mmd2(x, reference), None, 1, m)
    values = []
    for _ in range(num_subsets):
        ours, theirs = (torch.randperm(count, generator=generator)[:subset_size] for count in (m, n))
        values.append(mmd2(x[ours], KernelReference(reference.features[theirs], reference.kernel)))
    found = torch.tensor(values, dtype=torch.float64)
    return SubsetEstimate(float(found.mean()), float(found.std(correction=0)) if num_subsets > 1 else None, num_subsets, subset_size)


def check_subsets(num_subsets: int, subset_size: int) -> None:
    """
    Raises:
        ValueError: fewer than one subset, or than two rows in each.
    """
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(f"num_subsets {num_subsets} must be at least 1 and subset_size {subset_size} at least 2")


def median_distance(x: Tensor) -> float:
    """Median distance between two different rows of (n, d), exact: a histogram brackets it, a second pass sorts the bracket.

    Raises:
        ValueError: fewer than two rows, or rows that are not finite.
    """
    check_rows(x, "features")
    x = x.double()
    top = max(float(block.max()) for block in _distance_blocks(x))
    if top == 0:
        return 0.0
    counts = sum((torch.histc(block, BINS, 0, top) for block in _distance_blocks(x)), torch.zeros(BINS, dtype=torch.float64))
    cumulative, pairs = counts.cumsum(0), len(x) * (len(x) - 1) // 2
    ranks = [(pairs - 1) // 2, pairs // 2]  # the two middle ones, equal where the number of pairs is odd
    low, high = (int(torch.searchsorted(cumulative, rank + 1)) for rank in ranks)
    # A bin wider on either side: a distance on an edge may be counted in one bin and compared with the edge of its neighbour.
    start, stop = max(low - 1, 0) * top / BINS, (high + 2) * top / BINS
    inside = torch.cat([block[(block >= start) & (block <= stop)] for block in _distance_blocks(x)]).sort().values
    below = sum(int((block < start).sum()) for block in _distance_blocks(x))
    return float(inside[[rank - below for rank in ranks]].mean())


def _distance_blocks(x: Tensor) -> Iterator[Tensor]:
    """Distances of all pairs i < j, flat, in blocks."""
    for start in range(0, len(x), BLOCK):
        rows = x[start:start + BLOCK]
        for offset in range(start, len(x), BLOCK):
            block = squared_distances(rows, x[offset:offset + BLOCK]).sqrt()
            upper = block[torch.ones_like(block, dtype=torch.bool).triu(1)] if offset == start else block.flatten()
            if len(upper):
                yield upper


def check_rows(x: Tensor, what: str) -> None:
    """
    Raises:
        ValueError: fewer than two rows, or rows that are not finite.
    """
    if x.dim() != 2 or x.shape[0] < 2 or not x.shape[1]:
        raise ValueError(f"{what} are {tuple(x.shape)}; expected (n, d) with at least two rows")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{int((~torch.isfinite(x)).any(dim=1).sum())} of {len(x)} rows of {what} are not finite; leave those samples out")
