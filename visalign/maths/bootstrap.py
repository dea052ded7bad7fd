"""Intervals by drawing again what is independent: samples, or prompts with all their samples.

Samples of one prompt rise and fall together: a mean over eight seeds of forty prompts is known about as well as the scatter of forty
numbers says, not of 320. Where ``clusters`` names the prompt of every sample, whole prompts are drawn, and a mean is the ratio of two sums.

Percentile intervals of n clusters are too narrow for small n: the resamples lack the factor sqrt(n / (n - 1)), and their quantiles are
a normal's where Student's are due. Their level is moved so that they equal the t interval wherever the resamples are Gaussian:

    alpha' / 2 = Phi(-sqrt(n / (n - 1)) t_{1 - alpha / 2, n - 1})

Source: the expanded percentile interval, Hesterberg, arXiv:1411.5279.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Generator, Tensor

from visalign.maths.confidence import student_quantile

NUM_RESAMPLES = 2000
NUM_HALVES = 100
_BLOCK = 4_000_000  # counts drawn at once, 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval, over ``count`` valid samples."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Halved:
    """A statistic of a whole set and what half samples say about it.

    Attributes:
        value: of all clusters.
        error: its standard error, that of prompts and seeds drawn anew.
        bias: ``E[value]`` minus its limit for ever larger sets, to first order in 1/n.
    """

    value: float
    error: float
    bias: float


def bootstrap_mean(values: Tensor, confidence: float = 0.95, seed: int = 0, clusters: Tensor | None = None) -> Interval:
    """Percentile bootstrap of the mean of the finite entries of ``values`` (n,).

    Args:
        clusters: int64 (n,), samples of one cluster share their number; ``None`` if every sample is independent of the others. One
            cluster tells nothing about others: its interval is its mean.
    Raises:
        ValueError: no finite entry.
    """
    known = torch.isfinite(values)
    if not bool(known.any()):
        raise ValueError("a mean needs at least one valid sample, got none")
    columns = torch.stack([values[known].double(), torch.ones(int(known.sum()), dtype=torch.float64)], dim=1).numpy()
    sums = columns if clusters is None else cluster_sums(columns, clusters[known])
    total, count = resampled_sums(sums, seed).T
    low, high = percentiles(total / count, len(sums), confidence)
    return Interval(mean=float(columns[:, 0].mean()), low=low, high=high, count=len(columns))


def bootstrap_gain(before: Tensor, after: Tensor, confidence: float = 0.95, seed: int = 0, clusters: Tensor | None = None) -> Interval:
    """Interval of the mean of ``after - before`` over samples valid in both, resampling pairs; (n,) each.

    Raises:
        ValueError: lengths differ, or no pair is valid.
    """
    if before.shape != after.shape:
        raise ValueError(f"a paired comparison needs the same samples, got {before.shape[0]} before and {after.shape[0]} after; "
                         "evaluate both with the same prompts and seeds")
    return bootstrap_mean(after.double() - before.double(), confidence, seed, clusters)


@dataclass(frozen=True)
class Estimate:
    """A statistic and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap_statistic(statistic: Callable[[Tensor], float], cluster: Tensor, generator: Generator, confidence: float = 0.95,
                        num_resamples: int = 1000, reflect: bool = False) -> Estimate:
    """Interval of a statistic when whole clusters are drawn again with replacement: pairs of one prompt stay together.

        bootstrap_statistic(lambda weight: ranking_accuracy(difference, label, weight), prompt, generator)

    With s the statistic, s* those of the resamples and q their quantiles:

        percentile   value s,                interval [q_low, q_high]
        reflected    value 2 s - mean s*,    interval [2 s - q_high, 2 s - q_low]

    Reflection is for statistics that chance moves one way, as it raises a calibration error: percentile intervals would count that bias
    twice. It takes out what the resamples show of the bias, a third and more where the true error is 0.

    Args:
        statistic: of a weight per row, float64 (n,): how often the row was drawn.
        cluster: int64 (n,); every row its own for independent rows.
    Raises:
        ValueError: fewer than two clusters, confidence outside (0, 1), or no resample.
    Source: Efron & Tibshirani (1993), chapters 10 and 13.
    """
    row = cluster.unique(return_inverse=True)[1]
    num = int(row.max()) + 1 if len(row) else 0
    if num < 2 or not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(f"a bootstrap needs at least two clusters, confidence in (0, 1) and num_resamples >= 1, got {num}, {confidence} "
                         f"and {num_resamples}")
    drawn = torch.randint(num, (num_resamples, num), generator=generator)
    found = torch.tensor([statistic(torch.bincount(one, minlength=num).double()[row]) for one in drawn], dtype=torch.float64)
    low, high = percentiles(found.numpy(), num, confidence)
    value = statistic(torch.ones(len(row), dtype=torch.float64))
    if reflect:
        return Estimate(2 * value - float(found.mean()), 2 * value - high, 2 * value - low)
    return Estimate(value, low, high)


def cluster_sums(columns: np.ndarray, clusters: Tensor) -> np.ndarray:
    """Sums of the rows of ``columns`` (n, k) by cluster, clusters in the order of their numbers; those without a row are left out."""
    _, index = np.unique(clusters.numpy(), return_inverse=True)
    sums = np.zeros((int(index.max()) + 1, columns.shape[1]))
    np.add.at(sums, index, columns)
    return sums


def resampled_sums(sums: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums of the columns of ``sums`` (C, k) over C clusters drawn with replacement, ``NUM_RESAMPLES`` times: (R, k)."""
    generator, num_clusters = np.random.default_rng(seed), len(sums)
    parts, block = [], max(1, _BLOCK // num_clusters)
    for start in range(0, NUM_RESAMPLES, block):
        num = min(block, NUM_RESAMPLES - start)
        drawn = generator.integers(num_clusters, size=(num, num_clusters)) + num_clusters * np.arange(num)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=num * num_clusters).reshape(num, num_clusters) @ sums)
    return np.concatenate(parts)


def percentiles(resampled: np.ndarray, num_clusters: int, confidence: float = 0.95) -> tuple[float, float]:
    """Low and high end of the expanded percentile interval of a statistic's resamples (R,); resamples that are NaN do not count."""
    tail = (1 - confidence) / 2
    if num_clusters > 1:
        tail = NormalDist().cdf(-math.sqrt(num_clusters / (num_clusters - 1)) * student_quantile(1 - tail, num_clusters - 1))
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def half_samples(statistic: Callable[[np.ndarray], Sequence[float]], num_clusters: int, seed: int = 0) -> list[Halved]:
    """Standard error and bias of statistics of a *set* (a distance between distributions, a diversity).

    Drawing with replacement repeats members, which changes such a statistic by itself. Half of the clusters, drawn without replacement,
    repeat nothing: with m of n clusters, a statistic's variance around the whole set's is (n - m) / m times that of the whole set, and the
    mean of its change is (n - m) / m times the bias, for a bias c / n.

    Args:
        statistic: numbers of the set made of the given clusters, int64 (m,), ascending.
        num_clusters: n, at least 4.
    Returns:
        One entry per number; error and bias are NaN below 4 clusters, whose halves are no sets.
    Source: the delete-d jackknife, Shao & Wu, Annals of Statistics 1989; extrapolation in 1/n, FID-infinity, arXiv:1911.07023.
    """
    whole = list(statistic(np.arange(num_clusters)))
    if num_clusters < 4:
        return [Halved(value, math.nan, math.nan) for value in whole]
    generator, half = np.random.default_rng(seed), num_clusters // 2
    halves = np.array([statistic(np.sort(generator.permutation(num_clusters)[:half])) for _ in range(NUM_HALVES)])
    ratio = half / (num_clusters - half)
    errors = halves.std(axis=0, ddof=1) * math.sqrt(ratio)
    return [Halved(value, float(error), float(mean - value) * ratio)
            for value, error, mean in zip(whole, errors, halves.mean(axis=0), strict=True)]
