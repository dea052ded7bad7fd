"""How different samples are from one another: within a prompt (over its seeds) and across prompts, for two aligned sets.

    vendi        effective number of different samples, by the cosine of an encoder's features; 1 to the number of samples
    difference   mean RMS difference of pixels in [0, 1] over pairs; 0 if all are alike, 1 would be black against white

Pictures are reduced to at most 64 pixels first: beyond that, pixels tell of texture rather than of content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from visalign.compare.comparison import Contrast, contrast
from visalign.compare.set_contrast import SetContrast, rows_of_clusters, set_contrast
from visalign.maths.diversity import mean_distance, unit_rows, vendi_score
from visalign.types import Media

SIDE = 64


@dataclass(frozen=True)
class Measure:
    """A diversity as a function of all pairs.

    Attributes:
        name: what it is called in results.
        pairs: features (n, d) to what is known of every pair, (n, n).
        value: of the set whose pairs these are.
    """

    name: str
    pairs: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], float]


def _rms(features: Tensor) -> Tensor:
    return torch.cdist(features, features) / features.shape[-1] ** 0.5


def _cosines(features: Tensor) -> Tensor:
    rows = unit_rows(features)
    return rows @ rows.T


DIFFERENCE = Measure("difference", _rms, lambda pairs: float(mean_distance(pairs)))
VENDI = Measure("vendi", _cosines, vendi_score)


def pixel_rows(media: Sequence[Media]) -> Tensor:
    """Images of one size as rows of numbers in [0, 1], float64 (n, d).

    Raises:
        ValueError: another kind of media, or several sizes.
    """
    shapes = {tuple(sample.data.shape) for sample in media}
    if any(sample.kind != "image" for sample in media) or len(shapes) > 1:
        raise ValueError(f"pixels of {', '.join(sorted({sample.kind for sample in media}))} of sizes {sorted(shapes)} cannot be compared; "
                         "give an encoder")
    return torch.stack([_pixels(sample.data) for sample in media])


def _pixels(data: Tensor) -> Tensor:
    pixels = data.double().div(255)
    ratio = SIDE / max(pixels.shape[-2:])
    if ratio < 1:
        size = [max(1, round(side * ratio)) for side in pixels.shape[-2:]]
        pixels = interpolate(pixels[None], size, mode="area")[0]
    return pixels.flatten()


def pairwise_difference(media: Sequence[Media], group_size: int) -> Tensor:
    """``difference`` of each group of consecutive images, float64 (P,)."""
    return mean_distance(_rms(pixel_rows(media).unflatten(0, (-1, group_size))))


def within_prompts(measure: Measure, base: Tensor, model: Tensor, clusters: Tensor) -> Contrast | None:
    """Mean over prompts of the diversity of a prompt's samples; prompts with fewer than two tell nothing. ``None`` without any.

    Args:
        base, model: features (n, d) of aligned samples, all finite.
        clusters: int64 (n,), the prompt of each.
    """
    rows = [members for members in rows_of_clusters(clusters) if len(members) > 1]
    if not rows:
        return None
    values = [torch.tensor([measure.value(measure.pairs(features[members])) for members in rows], dtype=torch.float64)
              for features in (base, model)]
    return contrast(values[0], values[1], torch.arange(len(rows)))


def across_prompts(measure: Measure, base: Tensor, model: Tensor, clusters: Tensor) -> SetContrast | None:
    """Diversity of one sample per prompt, the mean over the prompts' first, second, ... samples. ``None`` for fewer than two prompts."""
    members = rows_of_clusters(clusters)
    if len(members) < 2:
        return None
    # Only samples that every prompt has: sets of one size compare.
    draws = [torch.stack([own[k] for own in members]) for k in range(min(map(len, members)))]
    pairs = [[measure.pairs(features[rows]) for rows in draws] for features in (base, model)]

    def both(chosen: np.ndarray) -> tuple[float, float]:
        index = torch.from_numpy(chosen)
        base_value, model_value = (sum(measure.value(one[index][:, index]) for one in side) / len(side) for side in pairs)
        return base_value, model_value

    return set_contrast(both, len(members), len(members) * len(draws), base.shape[1])
