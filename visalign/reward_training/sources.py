"""Where the embeddings of a batch come from: a table, or the encoder itself while an adapter in it learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from visalign.preferences.content import decode
from visalign.reward_models.adapter import EncoderAdapter
from visalign.reward_models.encoder import AdaptableEncoder
from visalign.reward_training.examples import Corpus, Examples
from visalign.reward_training.features import Embeddings


class Source(Protocol):
    """Embeddings of judgements."""

    @property
    def adapter(self) -> EncoderAdapter | None:
        """What learns in the encoder, if anything does."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, examples: Examples) -> tuple[Tensor, Tensor | None]:
        """Of the candidates (B, K, d), and of their prompts (B, K, e) where the encoder reads them."""


class FrozenSource:
    """Rows of the tables."""

    adapter: EncoderAdapter | None = None

    def __init__(self, embeddings: Embeddings, device: torch.device) -> None:
        self.media = embeddings.media.to(device)
        self.text = None if embeddings.text is None else embeddings.text.to(device)
        self.device = device

    def __call__(self, examples: Examples) -> tuple[Tensor, Tensor | None]:
        return self.media[examples.media], _spread(None if self.text is None else self.text[examples.text], examples)


class AdaptedSource:
    """Every distinct medium and prompt of the batch through the network, with gradients to its adapter where gradients are on."""

    def __init__(self, encoder: AdaptableEncoder, adapter: EncoderAdapter, corpus: Corpus, device: torch.device, reads_text: bool) -> None:
        self.encoder, self.adapter, self.corpus, self.device, self.reads_text = encoder, adapter, corpus, device, reads_text

    def __call__(self, examples: Examples) -> tuple[Tensor, Tensor | None]:
        rows, place = examples.media.unique(return_inverse=True)
        media = self.encoder.embed_media([decode(self.corpus.media[row]) for row in rows.tolist()])[place.to(self.device)]
        if not self.reads_text:
            return media, None
        texts, which = examples.text.unique(return_inverse=True)
        return media, _spread(self.encoder.embed_texts([self.corpus.texts[row] for row in texts.tolist()])[which.to(self.device)], examples)


def _spread(text: Tensor | None, examples: Examples) -> Tensor | None:
    """Each judgement's prompt, (B, e), beside every candidate, (B, K, e)."""
    return None if text is None else text[:, None].expand(-1, examples.media.shape[1], -1)


def batches(examples: Examples, size: int) -> Iterator[Examples]:
    """All judgements in their order."""
    for rows in torch.arange(len(examples)).split(size):
        yield examples.select(rows)
