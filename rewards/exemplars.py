"""The exemplars a distribution is compared with: the frozen Gaussian of their features.

Statistics are worth nothing beside another encoder's features, so they carry the encoder's name and hash and refuse any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from visalign.maths.frechet import Gaussian, Moments
from visalign.media import KIND, load_media
from visalign.rewards.encoders import Encoder, sample_features
from visalign.types import Media

Unit = Literal["sample", "frame"]
FORMAT = "visalign exemplars 1"


@dataclass(frozen=True)
class Exemplars:
    """A reference distribution.

    Attributes:
        gaussian: mean and covariance (n - 1), float64.
        count: rows they were computed from.
        num_media: samples those rows came from; equal to ``count`` if every sample gave one row.
        unit: whether a row was a sample (mean over its frames) or a frame.
        encoder, hash: of what made the features.
    """

    gaussian: Gaussian
    count: int
    num_media: int
    unit: Unit
    encoder: str
    hash: str

    def check(self, encoder: Encoder, unit: Unit) -> None:
        """Refuse to be compared with other features.

        Raises:
            ValueError: another encoder, or rows of another unit.
        """
        if self.hash != encoder.hash:
            raise ValueError(f"the exemplars were encoded by {self.encoder} ({self.hash[:12]}), the samples by {encoder.name} "
                             f"({encoder.hash[:12]}); compute the statistics again with this encoder")
        if self.unit != unit and self.count != self.num_media:
            raise ValueError(f"the exemplars' rows are {self.unit}s ({self.count} of {self.num_media} media), this reward compares "
                             f'{unit}s; compute them with reference_statistics(..., unit="{unit}")')


def reference_statistics(media: Iterable[Media], encoder: Encoder, unit: Unit = "sample", batch_size: int = 64) -> Exemplars:
    """Exemplars from media, read ``batch_size`` at a time.

    Args:
        unit: "sample" for set-level rewards, "frame" for comparing one sample's frames with all exemplars' frames.
    Raises:
        ValueError: fewer than two rows, a kind the encoder does not read, or features that are not finite.
    """
    moments, num_media, stream = None, 0, iter(media)
    while batch := list(islice(stream, batch_size)):
        for sample in batch:
            if sample.kind not in encoder.modality:
                raise ValueError(f"exemplar {num_media + batch.index(sample)} is of kind {sample.kind}; {encoder.name} reads "
                                 f"{' and '.join(sorted(encoder.modality))}")
        rows = sample_features(encoder, batch) if unit == "sample" else torch.cat(encoder.encode(batch))
        more = Moments.of(rows)
        moments, num_media = more if moments is None else moments.merge(more), num_media + len(batch)
    if moments is None:
        raise ValueError("no exemplars: a reference distribution needs at least two")
    return Exemplars(moments.gaussian(), moments.count, num_media, unit, encoder.name, encoder.hash)


def save_exemplars(exemplars: Exemplars, path: str | Path) -> None:
    """Write a .safetensors file."""
    metadata = {"format": FORMAT, "unit": exemplars.unit, "encoder": exemplars.encoder, "hash": exemplars.hash,
                "count": str(exemplars.count), "num_media": str(exemplars.num_media)}
    save_file({"mean": exemplars.gaussian.mean, "covariance": exemplars.gaussian.covariance}, path, metadata=metadata)


def load_exemplars(reference: str | Path, encoder: Encoder, unit: Unit) -> Exemplars:
    """Exemplars from a statistics file or from a folder of media (all files in it with a known suffix, in order of their names).

    Raises:
        ValueError: there is no such file or folder, it holds no media or no statistics, or those of another encoder.
    """
    path = Path(reference)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in KIND)
        if len(files) < 2:
            raise ValueError(f"{path} holds {len(files)} media files ({', '.join(sorted(KIND))}); a reference distribution needs at "
                             "least two")
        return reference_statistics((load_media(file) for file in files), encoder, unit)
    if not path.is_file():
        raise ValueError(f"reference '{path}': no such file or folder; give a folder of media, or statistics saved by save_exemplars")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); save_exemplars writes one") from error
    if metadata.get("format") != FORMAT or set(tensors) != {"mean", "covariance"}:
        raise ValueError(f"{path} holds no exemplars (format {metadata.get('format')!r}, expected {FORMAT!r}); save_exemplars writes one")
    unit_of_file: Unit = "frame" if metadata["unit"] == "frame" else "sample"
    exemplars = Exemplars(Gaussian(tensors["mean"], tensors["covariance"]), int(metadata["count"]), int(metadata["num_media"]),
                          unit_of_file, metadata["encoder"], metadata["hash"])
    exemplars.check(encoder, unit)
    return exemplars
