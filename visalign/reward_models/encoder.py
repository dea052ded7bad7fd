"""What a reward model asks of the encoder below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from visalign.types import Media, MediaKind


@runtime_checkable
class FeatureEncoder(Protocol):
    """Embeddings of media and, where ``has_text``, of prompts.

    Attributes:
        name: what a person calls it.
        hash: of everything that decides its embeddings: weights, preprocessing, tokenizer, code.
        modality: kinds of media it reads.
        has_text: whether it embeds prompts.
        device: where its embeddings come from.
    """

    name: str
    hash: str
    modality: frozenset[MediaKind]
    has_text: bool
    device: torch.device

    def media(self, media: Sequence[Media]) -> Tensor:
        """One embedding per sample, the mean over its frames or windows, float32 (n, d); without gradients."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """One embedding per text, float32 (n, e); without gradients."""


@runtime_checkable
class AdaptableEncoder(Protocol):
    """An encoder whose network can learn."""

    network: nn.Module

    def embed_media(self, media: Sequence[Media]) -> Tensor:
        """``media`` with gradients to the network's weights."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """``texts`` with gradients to the network's weights."""


@runtime_checkable
class DifferentiableEncoder(Protocol):
    """An encoder with gradients to the pixels."""

    def pixels(self, media: Tensor) -> Tensor:
        """Embeddings (B, d) of images, float (B, 3, H, W), or of video (B, frames, 3, H, W), in [0, 1]; differentiable.

        Raises:
            ValueError: not of that shape or type.
        """
