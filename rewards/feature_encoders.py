"""Encoders of reward models: embeddings of media and prompts from a CLIP-like or CLAP reward, or from anybody's function.

    {reward: clip, model: ...}                any reward with a ``DualEncoder``: clip, pickscore, hps; with video_frames video too
    {reward: clap, model: ...}                audio
    package.module:function                   ``f(media) -> features``; it sees no prompt
    package.module:encoder                    an object as in ``encoders.Encoder``, which may have ``encode_texts(texts) -> (n, e)``
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from visalign.config import resolve_path
from visalign.maths.loudness import rms_dbfs
from visalign.media import evenly_spaced
from visalign.plugins import load_reward
from visalign.protocols import RewardSpec
from visalign.reward_models.encoder import FeatureEncoder
from visalign.rewards.clip import ClipScore
from visalign.rewards.dual_encoder import DualEncoder
from visalign.rewards.encoders import Encoder, as_encoder, sample_features
from visalign.rewards.weights import weights_hash
from visalign.types import Media, MediaKind, Prompt


@runtime_checkable
class Dual(Protocol):
    """A reward that scores with a ``DualEncoder``."""

    encoder: DualEncoder
    spec: RewardSpec


@runtime_checkable
class AudioText(Protocol):
    """``ClapScore``."""

    name: str
    hash: str
    modality: frozenset[MediaKind]
    model: Any
    tokenizer: Any
    device: torch.device
    silence: float

    def check_prompts(self, prompts: Sequence[Prompt]) -> None: ...

    def embed_audio(self, media: Sequence[Media]) -> Tensor: ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...


@runtime_checkable
class EmbedsTexts(Protocol):
    """An ``encoders.Encoder`` that reads prompts too."""

    def encode_texts(self, texts: Sequence[str]) -> Any:
        """One row per text, (n, e)."""


def load_encoder(spec: Any, device: str | None = None) -> FeatureEncoder:
    """The encoder of a configuration: ``{"reward": name, ...parameters}``, ``package.module:attribute``, or an object.

    Args:
        device: for encoders that take one and whose specification names none.
    Raises:
        ValueError: no such reward or attribute, or one that has no embeddings.
    """
    if isinstance(spec, Mapping):
        params = dict(resolve_path(spec))
        if not isinstance(params.get("reward"), str):
            raise ValueError(f"encoder {dict(spec)}: write {{reward: clip, model: ...}}, or package.module:function as a string")
        return as_feature_encoder(load_reward(params.pop("reward"), **{**({"device": device} if device else {}), **params}))
    return as_feature_encoder(spec)


def as_feature_encoder(given: Any) -> FeatureEncoder:
    """The encoder that a reward, a function or an object stands for.

    Raises:
        ValueError: it has no embeddings.
    """
    if isinstance(given, FeatureEncoder):
        return given
    if isinstance(given, AudioText):
        return AudioFeatures(given)
    if isinstance(given, Dual) and isinstance(given.encoder, DualEncoder):
        return DualFeatures(given.encoder, given.video_frames if isinstance(given, ClipScore) else 0, given.spec)
    return PlainFeatures(as_encoder(given))


class _NetworkFeatures(ABC):
    """A network's embeddings without gradients (``FeatureEncoder``) and with them (``AdaptableEncoder``)."""

    has_text = True

    @torch.no_grad()
    def media(self, media: Sequence[Media]) -> Tensor:
        return self.embed_media(media)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.embed_texts(texts)

    @abstractmethod
    def embed_media(self, media: Sequence[Media]) -> Tensor: ...

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...


class DualFeatures(_NetworkFeatures):
    """Unit embeddings of images, or of videos as the mean over evenly spaced frames, and of prompts."""

    def __init__(self, encoder: DualEncoder, video_frames: int, spec: RewardSpec) -> None:
        self.encoder, self.video_frames, self.name = encoder, video_frames, ":".join((spec.name, *spec.model_ids))
        self.network: nn.Module = encoder.model
        self.device = encoder.device
        self.modality: frozenset[MediaKind] = frozenset({"image", "video"} if video_frames else {"image"})
        tokens, steps = encoder.tokenizer(["a red circle", "two small dogs"]).tolist(), encoder.preprocess
        seen = (steps.size, steps.mean, steps.std, steps.interpolation, steps.resize_mode, steps.fill_color, video_frames, tokens)
        self.hash = weights_hash(str(seen), encoder.model.state_dict())

    def embed_media(self, media: Sequence[Media]) -> Tensor:
        frames = [one.data[None] if one.kind == "image" else one.data[evenly_spaced(len(one.data), self.video_frames)] for one in media]
        rows = self.encoder.embed_images([frame for one in frames for frame in one])
        return torch.stack([part.mean(dim=0) for part in rows.split([len(one) for one in frames])])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self.encoder.embed_texts(texts)

    def pixels(self, media: Tensor) -> Tensor:
        if media.dim() == 5 and self.video_frames:
            frames = media[:, evenly_spaced(media.shape[1], self.video_frames)]
            return self.encoder.pixels(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(dim=1)
        return self.encoder.pixels(media)


class AudioFeatures(_NetworkFeatures):
    """Unit embeddings of a ``ClapScore``; silence, whose embedding would be arbitrary, gives NaN."""

    def __init__(self, clap: AudioText) -> None:
        self.clap, self.name, self.device = clap, clap.name, clap.device
        self.network: nn.Module = clap.model
        self.modality: frozenset[MediaKind] = clap.modality
        tokens = clap.tokenizer(["a dog barks", "rain on a tin roof"])["input_ids"]
        self.hash = hashlib.sha256(f"{clap.hash} {clap.silence} {tokens}".encode()).hexdigest()

    def embed_media(self, media: Sequence[Media]) -> Tensor:
        heard = torch.tensor([rms_dbfs(one.data.mean(dim=0)) >= self.clap.silence for one in media], device=self.device)
        return torch.where(heard[:, None], self.clap.embed_audio(media), torch.nan)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.clap.check_prompts([Prompt(text) for text in texts])
        return self.clap.embed_texts(texts)


class PlainFeatures:
    """The mean over the rows that an ``encoders.Encoder`` gives of a sample; prompts where it has ``encode_texts``."""

    device = torch.device("cpu")

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.name, self.hash, self.modality = encoder, encoder.name, encoder.hash, encoder.modality
        self.has_text = isinstance(encoder, EmbedsTexts)

    def media(self, media: Sequence[Media]) -> Tensor:
        return sample_features(self.encoder, media).float()

    def texts(self, texts: Sequence[str]) -> Tensor:
        """
        Raises:
            ValueError: it embeds no text, or not one row per text.
        """
        if not isinstance(self.encoder, EmbedsTexts):
            raise ValueError(f"encoder {self.name} embeds no text; it would need encode_texts(texts)")
        rows = torch.as_tensor(self.encoder.encode_texts(list(texts)))
        if rows.dim() != 2 or len(rows) != len(texts):
            raise ValueError(f"encoder {self.name}: encode_texts gave {tuple(rows.shape)} for {len(texts)} texts; expected one row each")
        return rows.detach().float().cpu()
