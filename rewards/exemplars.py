"""Encoders and the exemplars a distribution is compared with: features of media, and their frozen Gaussian.

An encoder is a CLIP reward (``{reward: clip, model: ...}``: its image tower with its own preprocessing), a function
``f(media) -> features`` given as ``"package.module:function"``, or any object with the attributes of ``Encoder``.

Statistics are worth nothing beside another encoder's features, so they carry the encoder's name and hash and refuse any other.
"""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visalign.maths.frechet import Gaussian, Moments
from visalign.media import KIND, load_media
from visalign.types import Media, MediaKind

Unit = Literal["sample", "frame"]
FORMAT = "visalign exemplars 1"


@runtime_checkable
class Encoder(Protocol):
    """Turns media into features.

    Attributes:
        name: what a person calls it.
        hash: of everything that decides its features: weights, preprocessing, code.
        modality: kinds of media it reads.
    """

    name: str
    hash: str
    modality: frozenset[MediaKind]

    def encode(self, media: Sequence[Media]) -> list[Tensor]:
        """Per sample the features of its frames or windows, float64 (k, d) on the CPU, k = 1 for an image."""


class ClipEncoder:
    """Unit image embeddings of a ``ClipScore``; a video gives one row per frame the score looks at."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.name = "clip:" + ":".join(clip.spec.model_ids)
        self.modality: frozenset[MediaKind] = clip.spec.modality
        tower = clip.model.visual
        digest = hashlib.sha256(f"{sorted(tower.preprocess_cfg.items())} {clip.video_frames}".encode())
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self.hash = digest.hexdigest()

    @torch.no_grad()
    def encode(self, media: Sequence[Media]) -> list[Tensor]:
        from visalign.rewards.clip import _frames

        clip = self.clip
        frames = [_frames(sample, clip.video_frames) for sample in media]
        pixels = [clip.preprocess(Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy()))
                  for sample in frames for frame in sample]
        rows = [clip._encode_image(torch.stack(pixels[i:i + clip.batch_size])).double().cpu()
                for i in range(0, len(pixels), clip.batch_size)]
        return list(torch.cat(rows).split([len(sample) for sample in frames]))


class FunctionEncoder:
    """Wraps ``function(media)``, which returns an array (n, d) or, for several frames or windows per sample, n arrays (k, d).

    Its hash is that of its name and source text: editing the function asks for new statistics. What the function itself loads is
    not seen; put a version into its text when its weights change.
    """

    def __init__(self, function: Callable[[Sequence[Media]], Any], modality: Iterable[MediaKind] = ("image",)) -> None:
        """
        Raises:
            ValueError: the function has no source file to tell versions apart.
        """
        if isinstance(modality, str):
            raise ValueError(f'modality is a list of kinds: write ["{modality}"]')
        self.function = function
        self.modality = frozenset(modality)
        self.name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
        try:
            self.hash = hashlib.sha256(f"{self.name}\n{inspect.getsource(function)}".encode()).hexdigest()
        except (OSError, TypeError) as error:
            raise ValueError(f"encoder {function!r} has no source to hash; write a function in a module, or an object with name, hash, "
                             "modality and encode(media)") from error

    def encode(self, media: Sequence[Media]) -> list[Tensor]:
        """
        Raises:
            ValueError: not one array of one width per sample.
        """
        returned = self.function(media)
        if len(returned) != len(media):
            raise ValueError(f"encoder {self.name} returned {len(returned)} features for {len(media)} samples; return one row, or one "
                             "array of rows, per sample")
        rows = [torch.atleast_2d(torch.as_tensor(row).detach().cpu().double()) for row in returned]
        if any(row.dim() != 2 or 0 in row.shape or row.shape[1] != rows[0].shape[1] for row in rows):
            raise ValueError(f"encoder {self.name} returned features of shapes {sorted({tuple(row.shape) for row in rows})}; expected "
                             "(frames, d) with one d for all")
        return rows


def as_encoder(encoder: Any, modality: Iterable[MediaKind] | None = None) -> Encoder:
    """The encoder that ``encoder`` stands for: itself, a ``ClipScore``, a function, or ``"package.module:function"``.

    Args:
        modality: kinds a *function* reads, images by default; the others know theirs.
    Raises:
        ValueError: none of these, or it cannot be imported.
    """
    if isinstance(encoder, str):
        if ":" not in encoder:
            raise ValueError(f"encoder '{encoder}': write a function as package.module:function, or CLIP as "
                             "{reward: clip, model: ..., pretrained: ...}")
        try:
            encoder = pkgutil.resolve_name(encoder)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"encoder '{encoder}' cannot be imported: {error}; it is looked up as package.module:function on the "
                             "import path") from error
    if inspect.isroutine(encoder):
        return FunctionEncoder(encoder, modality or ("image",))
    if not isinstance(encoder, Encoder):
        from visalign.rewards.clip import ClipScore  # open_clip takes seconds to import

        if not isinstance(encoder, ClipScore):
            raise ValueError(f"an encoder of type {type(encoder).__name__} is not known; give a CLIP reward, package.module:function, "
                             "or an object with name, hash, modality and encode(media)")
        encoder = ClipEncoder(encoder)
    if modality is not None and frozenset(modality) != encoder.modality:
        raise ValueError(f"modality {sorted(modality)} was given, but {encoder.name} reads {sorted(encoder.modality)}; leave it out")
    return encoder


def sample_features(encoder: Encoder, media: Sequence[Media]) -> Tensor:
    """One row per sample, the mean over its frames, float64 (n, d)."""
    return torch.stack([rows.mean(dim=0) for rows in encoder.encode(media)])


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
