"""Exemplars a distribution is compared with: the frozen Gaussian of their features, and a bounded number of the features themselves.

Statistics are worth nothing beside another encoder's features, so they carry the encoder's name and hash and refuse any other.
``visalign exemplars FOLDER --encoder ... --out FILE`` writes them once, for recipes to refer to. A Fréchet distance reads mean and
covariance, a kernel distance the kept features and, for KAD, the bandwidth frozen with them: a ruler that followed the samples could be
moved by the policy it measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from visalign.maths.frechet import Gaussian, Moments
from visalign.maths.mmd import median_distance
from visalign.media import KIND, load_media
from visalign.rewards.encoders import Encoder, sample_features
from visalign.rewards.memory import Memory
from visalign.tensorfile import read_tensors
from visalign.types import Media

Unit = Literal["sample", "frame"]
FORMAT, FORMER = "visalign exemplars 2", "visalign exemplars 1"  # the former has no features and no bandwidth
NUM_FEATURES = 5000


@dataclass(frozen=True)
class Exemplars:
    """A reference distribution.

    Attributes:
        gaussian: mean and covariance (n - 1), float64.
        count: rows they were computed from.
        num_media: samples those rows came from; equal to ``count`` if every sample gave one row.
        unit: whether a row was a sample (mean over its frames) or a frame.
        encoder, hash: of what made the features.
        features: some or all of the rows, drawn without replacement, float32 (k, d); ``None`` in statistics without them.
        bandwidth: median distance between two of ``features``, or ``None``.
    """

    gaussian: Gaussian
    count: int
    num_media: int
    unit: Unit
    encoder: str
    hash: str
    features: Tensor | None = None
    bandwidth: float | None = None

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
                             f"{unit}s; make them again with visalign exemplars --unit {unit}")

    def rows(self, metric: str) -> Tensor:
        """The kept features, float64 (k, d).

        Raises:
            ValueError: statistics of mean and covariance alone.
        """
        if self.features is None:
            raise ValueError(f"{metric} compares with the exemplars' own features, and these statistics hold mean and covariance alone; "
                             "make them again: visalign exemplars FOLDER --encoder ... --out FILE, with --features above 1")
        return self.features.double()


def reference_statistics(media: Iterable[Media], encoder: Encoder, unit: Unit = "sample", batch_size: int = 64,
                         num_features: int = NUM_FEATURES, seed: int = 0) -> Exemplars:
    """Exemplars from media, read ``batch_size`` at a time.

    Args:
        unit: "sample" for set-level rewards, "frame" for comparing one sample's frames with all exemplars' frames.
        num_features: most rows to keep, 0 or at least 2; more are drawn from at random without replacement, for any batch size the same.
        seed: of that draw.
    Raises:
        ValueError: fewer than two rows, a kind the encoder does not read, or features that are not finite.
    """
    if num_features < 0 or num_features == 1:
        raise ValueError(f"num_features {num_features} must be 0 or at least 2: a kernel distance averages over pairs")
    moments, num_media, stream, kept = None, 0, iter(media), Memory(num_features, "reservoir", seed)
    while batch := list(islice(stream, batch_size)):
        for sample in batch:
            if sample.kind not in encoder.modality:
                raise ValueError(f"exemplar {num_media + batch.index(sample)} is of kind {sample.kind}; {encoder.name} reads "
                                 f"{' and '.join(sorted(encoder.modality))}")
        rows = sample_features(encoder, batch) if unit == "sample" else torch.cat(encoder.encode(batch))
        more = Moments.of(rows)
        moments, num_media = more if moments is None else moments.merge(more), num_media + len(batch)
        kept.add(rows.float())
    if moments is None:
        raise ValueError("no exemplars: a reference distribution needs at least two")
    gaussian = moments.gaussian()  # refuses a single row before its distances are asked for
    bandwidth = None if kept.features is None else median_distance(kept.features)
    return Exemplars(gaussian, moments.count, num_media, unit, encoder.name, encoder.hash, kept.features, bandwidth)


def save_exemplars(exemplars: Exemplars, path: str | Path) -> None:
    """Write a .safetensors file."""
    metadata = {"format": FORMAT, "unit": exemplars.unit, "encoder": exemplars.encoder, "hash": exemplars.hash,
                "count": str(exemplars.count), "num_media": str(exemplars.num_media)}
    tensors = {"mean": exemplars.gaussian.mean, "covariance": exemplars.gaussian.covariance}
    if exemplars.features is not None and exemplars.bandwidth is not None:
        tensors["features"], metadata["bandwidth"] = exemplars.features.contiguous(), repr(exemplars.bandwidth)
    save_file(tensors, path, metadata=metadata)


def folder_media(path: Path) -> list[Path]:
    """The media files of a folder, in order of their names.

    Raises:
        ValueError: fewer than two.
    """
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in KIND)
    if len(files) < 2:
        raise ValueError(f"{path} holds {len(files)} media files ({', '.join(sorted(KIND))}); a reference distribution needs at least two")
    return files


def load_exemplars(reference: str | Path, encoder: Encoder, unit: Unit) -> Exemplars:
    """Exemplars from a statistics file or from a folder of media (all files in it with a known suffix, in order of their names).

    Raises:
        ValueError: there is no such file or folder, it holds no media or no statistics, or those of another encoder.
    """
    path = Path(reference)
    if path.is_dir():
        return reference_statistics((load_media(file) for file in folder_media(path)), encoder, unit)
    exemplars = read_exemplars(path)
    exemplars.check(encoder, unit)
    return exemplars


def read_exemplars(path: Path) -> Exemplars:
    """Exemplars from a file of this or the former format, whatever encoder they are of.

    Raises:
        ValueError: no such file, or no statistics in it.
    """
    if not path.is_file():
        raise ValueError(f"reference '{path}': no such file or folder; give a folder of media, or statistics written by visalign exemplars")
    tensors, metadata = read_tensors(path)
    if metadata.get("format") not in (FORMAT, FORMER) or not {"mean", "covariance"} <= set(tensors):
        raise ValueError(f"{path} holds no exemplars (format {metadata.get('format')!r}, expected {FORMAT!r} or {FORMER!r}); "
                         "visalign exemplars writes them")
    unit: Unit = "frame" if metadata["unit"] == "frame" else "sample"
    bandwidth = float(metadata["bandwidth"]) if "bandwidth" in metadata else None
    return Exemplars(Gaussian(tensors["mean"], tensors["covariance"]), int(metadata["count"]), int(metadata["num_media"]), unit,
                     metadata["encoder"], metadata["hash"], tensors.get("features"), bandwidth)
