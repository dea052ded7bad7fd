"""Encoders: media in, features out, for everything that compares distributions.

    {reward: clip, model: ..., pretrained: ...}         image tower of an open_clip model              encoders.clip
    {reward: clap, model: ..., hop_seconds: ...}        audio tower of a CLAP model, per window        rewards.clap
    {encoder: hf, path: ..., pooling: cls}              image model of transformers: DINOv2, ViT ...   encoders.vision
    {encoder: hf_audio, path: ..., layer: 7}            audio model of transformers: wav2vec 2, EnCodec ...   encoders.audio
    {encoder: inception, weights: ...}                  what FID is defined on                         encoders.inception
    package.module:function                             f(media) -> features                           encoders.function

or any object with the attributes of ``Encoder``. Encoders of images read video frame by frame with ``video_frames``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from visalign.media import evenly_spaced
from visalign.plugins import check_params, load_reward
from visalign.types import Media, MediaKind

ENCODERS: dict[str, str] = {
    "hf": "visalign.rewards.encoders.vision:VisionEncoder",
    "hf_audio": "visalign.rewards.encoders.audio:AudioEncoder",
    "inception": "visalign.rewards.encoders.inception:InceptionEncoder",
}


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


class ImageEncoder(ABC):
    """An encoder of single images, which reads video frame by frame."""

    name: str
    hash: str

    def __init__(self, video_frames: int) -> None:
        """
        Args:
            video_frames: 0 refuses video; k encodes k evenly spaced frames, the first and the last among them.
        """
        if video_frames < 0:
            raise ValueError(f"video_frames {video_frames} must be at least 0; 0 reads images only")
        self.video_frames = video_frames
        self.modality: frozenset[MediaKind] = frozenset({"image", "video"} if video_frames else {"image"})

    @abstractmethod
    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        """Features of uint8 images (3, H, W) of any sizes, (n, d)."""

    @torch.no_grad()
    def encode(self, media: Sequence[Media]) -> list[Tensor]:
        """One row per image, and one per frame looked at of a video."""
        frames = [self._frames(sample) for sample in media]
        rows = self.encode_images([frame for sample in frames for frame in sample])
        return list(rows.double().cpu().split([len(sample) for sample in frames]))

    def _frames(self, sample: Media) -> Tensor:
        if sample.data.dtype != torch.uint8:
            raise ValueError(f"encoder {self.name}: {sample.kind} of {sample.data.dtype}; expected uint8, which is what every model's own "
                             "preprocessing divides by 255")
        if sample.kind == "image":
            return sample.data[None]
        if not self.video_frames:
            raise ValueError(f"encoder {self.name} reads images; set video_frames: 8 to encode 8 evenly spaced frames of a video")
        return sample.data[evenly_spaced(sample.data.shape[0], self.video_frames)]


def as_encoder(encoder: Any, modality: Iterable[MediaKind] | None = None) -> Encoder:
    """The encoder that ``encoder`` stands for: one of the forms in this module's list, or a ``ClipScore``.

    Args:
        modality: kinds a *function* reads, images by default; the others know theirs.
    Raises:
        ValueError: none of these, or it cannot be imported or built.
    """
    if isinstance(encoder, Mapping):
        encoder = _from_settings(encoder)
    if isinstance(encoder, str):
        encoder = _imported(encoder)
    if inspect.isroutine(encoder):
        from visalign.rewards.encoders.function import FunctionEncoder

        return FunctionEncoder(encoder, modality or ("image",))
    if not isinstance(encoder, Encoder):
        from visalign.rewards.clip import ClipScore  # open_clip takes seconds to import
        from visalign.rewards.encoders.clip import ClipEncoder

        if not isinstance(encoder, ClipScore):
            raise ValueError(f"an encoder of type {type(encoder).__name__} is not known; give {_FORMS}, or an object with name, hash, "
                             "modality and encode(media)")
        encoder = ClipEncoder(encoder)
    if modality is not None and frozenset(modality) != encoder.modality:
        raise ValueError(f"modality {sorted(modality)} was given, but {encoder.name} reads {sorted(encoder.modality)}; leave it out")
    return encoder


_FORMS = (f"{{reward: clip, ...}}, {{reward: clap, ...}}, {', '.join(f'{{encoder: {name}, ...}}' for name in ENCODERS)}, "
          "or package.module:function")


def _from_settings(settings: Mapping[str, Any]) -> Any:
    """What ``{reward: ..., ...}`` or ``{encoder: ..., ...}`` describes."""
    params = {key: value for key, value in settings.items() if key not in ("encoder", "reward")}
    if set(settings) - set(params) == {"reward"}:
        return load_reward(settings["reward"], **params)
    name = settings.get("encoder")
    if name not in ENCODERS or "reward" in settings:
        raise ValueError(f"encoder {dict(settings)} is not known; give {_FORMS}")
    module, _, attribute = ENCODERS[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    check_params(f"encoder '{name}'", list(inspect.signature(found).parameters.values()), params)
    return found(**params)


def _imported(path: str) -> Any:
    if ":" not in path:
        raise ValueError(f"encoder '{path}' is not known; give {_FORMS}")
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"encoder '{path}' cannot be imported: {error}; it is looked up as package.module:function on the "
                         "import path") from error


def sample_features(encoder: Encoder, media: Sequence[Media]) -> Tensor:
    """One row per sample, the mean over its frames or windows, float64 (n, d)."""
    return torch.stack([rows.mean(dim=0) for rows in encoder.encode(media)])


def by_shape(tensors: Sequence[Tensor], batch_size: int, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``function`` of stacks of at most ``batch_size`` tensors of equal shape; one row of its answers per tensor, in their order."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        shapes.setdefault(tuple(tensor.shape), []).append(index)
    rows: dict[int, Tensor] = {}
    for members in shapes.values():
        for start in range(0, len(members), batch_size):
            batch = members[start:start + batch_size]
            rows |= zip(batch, function(torch.stack([tensors[index] for index in batch])), strict=True)
    return [rows[index] for index in range(len(tensors))]
