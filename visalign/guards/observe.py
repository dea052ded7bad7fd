"""Media in numbers: statistics that need no model, and features in which a group's diversity is measured.

    image   edge_density, sharpness, colour_entropy, saturation         features: an 8 x 8 thumbnail
    video   the same averaged over up to 8 frames, and motion           features: thumbnails of up to 4 frames
    audio   loudness (dBFS, -120 for digital silence), silence, clipping, spectral_flatness        features: a 16 x 16 log spectrogram
    mesh    vertices, faces, slenderness (shortest over longest extent)           features: histogram of distances between surface points

Pictures are first reduced to at most 512 pixels, so that the numbers depend on what is drawn more than on the resolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from visalign.maths import media_statistics as statistics
from visalign.maths.diversity import gaussian_vendi
from visalign.maths.loudness import clipped_fraction, rms_dbfs, silent_fraction
from visalign.media import evenly_spaced
from visalign.types import Media

MAX_SIDE = 512
QUIETEST = -120.0
_FRAMES, _FEATURE_FRAMES = 8, 4


@dataclass(frozen=True)
class Observation:
    """What media look like.

    Attributes:
        statistics: one number per sample by name, float64 (n,); NaN where it does not exist.
        features: float64 (n, d), one row per sample; NaN where there are none.
    """

    statistics: Mapping[str, Tensor]
    features: Tensor

    def bandwidth(self) -> float:
        """Half the median distance between these samples, the ruler of later diversities; 0 where they do not differ."""
        rows = self.features[torch.isfinite(self.features).all(dim=1)]
        return float(torch.pdist(rows).median()) / 2 if len(rows) > 1 else 0.0

    def diversity(self, bandwidth: float) -> float:
        """Effective number of different samples, 1 to n; NaN without any or without a ruler."""
        rows = self.features[torch.isfinite(self.features).all(dim=1)]
        return gaussian_vendi(rows, bandwidth) if len(rows) and bandwidth > 0 else float("nan")

    def select(self, rows: Sequence[int]) -> Observation:
        """Some samples."""
        return Observation({name: values[list(rows)] for name, values in self.statistics.items()}, self.features[list(rows)])


def observe(media: Sequence[Media]) -> Observation:
    """Statistics and features of samples of one kind, in the order given.

    Raises:
        ValueError: samples of several kinds.
    """
    kinds = {sample.kind for sample in media}
    if len(kinds) > 1:
        raise ValueError(f"samples of one kind can be observed together, got {', '.join(sorted(kinds))}")
    look = {"image": _image, "video": _video, "audio": _audio, "mesh": _mesh}
    seen = [look[sample.kind](sample) for sample in media]
    names = list(dict.fromkeys(name for numbers, _ in seen for name in numbers))
    columns = {name: torch.tensor([numbers.get(name, torch.nan) for numbers, _ in seen], dtype=torch.float64) for name in names}
    return Observation(columns, torch.stack([features for _, features in seen]) if seen else torch.empty(0, 1, dtype=torch.float64))


def group_diversity(observation: Observation, group_id: Tensor, bandwidth: float) -> list[float]:
    """Effective number of different samples in every group, in the order of group ids; NaN for groups that cannot be measured."""
    rows = [(group_id == group).nonzero().squeeze(1).tolist() for group in group_id.unique().tolist()]
    return [observation.select(own).diversity(bandwidth) for own in rows]


def _image(sample: Media) -> tuple[dict[str, float], Tensor]:
    pictures = _reduced(sample.data[None])
    return _of_pictures(pictures), statistics.thumbnails(pictures)[0]


def _video(sample: Media) -> tuple[dict[str, float], Tensor]:
    frames = _reduced(sample.data)
    chosen = frames[evenly_spaced(len(frames), _FRAMES)]
    numbers = {**_of_pictures(chosen), "motion": float(statistics.motion(frames))}
    return numbers, statistics.thumbnails(frames[evenly_spaced(len(frames), _FEATURE_FRAMES)]).flatten()


def _of_pictures(pictures: Tensor) -> dict[str, float]:
    found = {"colour_entropy": statistics.colour_entropy(pictures), "saturation": statistics.saturation(pictures)}
    if min(pictures.shape[-2:]) >= 3:
        found |= {"edge_density": statistics.edge_density(pictures), "sharpness": statistics.sharpness(pictures)}
    return {name: float(values.mean()) for name, values in found.items()}


def _audio(sample: Media) -> tuple[dict[str, float], Tensor]:
    audio, rate = sample.data, sample.rate or 0.0
    numbers = {"loudness": max(rms_dbfs(audio), QUIETEST), "silence": silent_fraction(audio, rate), "clipping": clipped_fraction(audio),
               "spectral_flatness": float(statistics.spectral_flatness(audio))}
    spectrum = statistics.power_spectrogram(audio).mean(dim=0)
    return numbers, adaptive_avg_pool2d(spectrum.sqrt().log1p()[None], 16).flatten()


def _mesh(sample: Media) -> tuple[dict[str, float], Tensor]:
    vertices, faces = sample.data.double(), sample.faces
    extent = vertices.amax(dim=0) - vertices.amin(dim=0) if len(vertices) else torch.zeros(3, dtype=torch.float64)
    longest = float(extent.max())
    numbers = {"vertices": float(len(vertices)), "faces": float(0 if faces is None else len(faces))}
    if not longest > 0:
        return numbers, torch.full((64,), torch.nan, dtype=torch.float64)
    # Evenly spaced vertices, not random ones: the same mesh has the same features every time.
    points = vertices[evenly_spaced(len(vertices), 256)]
    distance = torch.pdist(points) / longest
    histogram = torch.histc(distance, bins=64, min=0.0, max=3**0.5) / max(len(distance), 1)
    return {**numbers, "slenderness": float(extent.min()) / longest}, histogram.sqrt()


def _reduced(pictures: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) to float32 in [0, 1], the longer side at most 512."""
    pixels = pictures.float() / 255
    scale = MAX_SIDE / max(pixels.shape[-2:])
    if scale >= 1:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
    return interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
