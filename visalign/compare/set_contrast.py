"""A number of a whole set (a distance from exemplars, a diversity) for two aligned sets, with its error and bias by half samples.

Distances between distributions are biased upwards for small sets, diversities grow with the set: compare sets of one size, and read the
bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visalign.compare.comparison import Contrast, Estimate
from visalign.maths.bootstrap import Halved, half_samples
from visalign.maths.confidence import student_quantile
from visalign.types import Measurement


@dataclass(frozen=True)
class SetContrast:
    """Both sets' number and the difference.

    Attributes:
        bias_base, bias_model: how far the numbers are from their limit for ever larger sets (``bootstrap.Halved``); ``None`` for fewer
            than 4 prompts.
        dims: of the features the sets are compared in.
        measured_base, measured_model: the metric on its published scale, with all that belongs to it.
    """

    contrast: Contrast
    bias_base: float | None
    bias_model: float | None
    dims: int
    measured_base: tuple[Measurement, ...] = ()
    measured_model: tuple[Measurement, ...] = ()


def compare_sets(value: Callable[[Tensor], float], base: Tensor, model: Tensor, clusters: Tensor) -> SetContrast:
    """A set-level metric of both sides.

    Args:
        value: of features (m, d).
        base, model: features (n, d) of aligned samples, all finite.
        clusters: int64 (n,), the prompt of each.
    """
    members = rows_of_clusters(clusters)

    def both(chosen: np.ndarray) -> tuple[float, float]:
        rows = torch.cat([members[k] for k in chosen])
        return value(base[rows]), value(model[rows])

    return set_contrast(both, len(members), len(clusters), base.shape[1])


def set_contrast(both: Callable[[np.ndarray], tuple[float, float]], prompts: int, samples: int, dims: int) -> SetContrast:
    """Student intervals from half samples of the prompts.

    Args:
        both: the number of base and model for the given prompts.
    """
    def with_gain(chosen: np.ndarray) -> Sequence[float]:
        base, model = both(chosen)
        return base, model, model - base

    def estimated(one: Halved) -> Estimate:
        if math.isnan(one.error):
            return Estimate(one.value, None, None, samples, prompts)
        reach = student_quantile(0.975, prompts - 1) * one.error
        return Estimate(one.value, one.value - reach, one.value + reach, samples, prompts)

    base, model, gain = half_samples(with_gain, prompts)
    biases = [None if math.isnan(one.bias) else one.bias for one in (base, model)]
    return SetContrast(Contrast(estimated(base), estimated(model), estimated(gain)), biases[0], biases[1], dims)


def rows_of_clusters(clusters: Tensor) -> list[Tensor]:
    """Rows of each cluster, in order of the clusters' numbers."""
    return [(clusters == cluster).nonzero().squeeze(1) for cluster in clusters.unique()]
