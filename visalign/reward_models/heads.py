"""Heads: from embeddings of a sample and its prompt to what they say about it.

    ScalarHead        reward r, log-odds of a comparison r_first - r_second
    GatedHead         ratings of K aspects, weighed by a gate that sees the prompt alone, as a scalar reward
    PreferenceHead    an embedding v of 2 m coordinates, log-odds sum_m s_m <R v_first, v_second>_m, which may go in circles

Every head standardises its features with frozen statistics of its training samples and divides its log-odds by a frozen temperature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, softplus

from visalign.maths.reward_losses import gated_reward, general_preference
from visalign.reward_models.blocks import Block, check_blocks, num_features


@dataclass(frozen=True)
class Shape:
    """What a head is built from.

    Attributes:
        media_dim, text_dim: of the embeddings; text_dim is 0 without prompts.
        blocks: of features, see ``blocks``.
        width, depth, dropout: of the hidden layers; depth 0 is a linear head.
    """

    media_dim: int
    text_dim: int
    blocks: tuple[Block, ...]
    width: int = 128
    depth: int = 0
    dropout: float = 0.0

    @property
    def num_features(self) -> int:
        return num_features(self.blocks, self.media_dim, self.text_dim)

    @property
    def reads_text(self) -> bool:
        return self.blocks != ("media",)


class Head(nn.Module, ABC):
    """A head; called with embeddings, it gives what :meth:`log_odds` compares, calibrated."""

    mean: Tensor
    std: Tensor
    temperature: Tensor

    def __init__(self, shape: Shape, num_outputs: int) -> None:
        super().__init__()
        check_blocks(shape.blocks, shape.media_dim, shape.text_dim)
        self.shape = shape
        widths = [shape.num_features, *[shape.width] * shape.depth]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU(), nn.Dropout(shape.dropout))]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))
        self.register_buffer("mean", torch.zeros(shape.num_features))
        self.register_buffer("std", torch.ones(shape.num_features))
        self.register_buffer("temperature", torch.ones(()))

    @property
    def scalar(self) -> bool:
        """Whether a sample has a reward of its own."""
        return True

    @property
    def aspects(self) -> tuple[str, ...]:
        """What it rates besides; see :meth:`GatedHead.ratings`."""
        return ()

    def arguments(self) -> dict[str, Any]:
        """What, with its tensors, makes this head again; see ``build_head``."""
        return {"shape": asdict(self.shape)}

    @torch.no_grad()
    def standardise(self, batches: Iterator[tuple[Tensor, Tensor | None]]) -> None:
        """Freeze mean and standard deviation (1 where it is 0) of features, from the embeddings of all training samples."""
        count, total, squares = 0, torch.zeros(len(self.mean), dtype=torch.float64), torch.zeros(len(self.mean), dtype=torch.float64)
        for media, text in batches:
            features = compose(self.shape.blocks, media, text).double().cpu()
            count, total, squares = count + len(features), total + features.sum(dim=0), squares + features.square().sum(dim=0)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        # A constant feature has rounding for a spread, and dividing by that would make noise of it.
        self.std.copy_(torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0))

    def start(self, media: Tensor, text: Tensor | None) -> None:
        """Prepare the first step with some training samples (..., d), (..., e), once features are standardised."""

    def features(self, media: Tensor, text: Tensor | None) -> Tensor:
        """Standardised features (..., D)."""
        return (compose(self.shape.blocks, media, text if self.shape.reads_text else None) - self.mean) / self.std

    @abstractmethod
    def forward(self, media: Tensor, text: Tensor | None) -> Tensor:
        """What is compared, (..., q), from embeddings (..., d) and (..., e)."""

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-odds (...) that the first is better, from what ``forward`` gave for both, (..., q)."""
        return (first - second).squeeze(-1)


class ScalarHead(Head):
    """One reward per sample, on the scale of log-odds."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, 1)

    def forward(self, media: Tensor, text: Tensor | None) -> Tensor:
        return self.body(self.features(media, text)) / self.temperature


class PreferenceHead(Head):
    """An embedding per sample in ``planes`` planes; how much a plane counts depends on the prompt where features read it.

    Source: general preference model, arXiv:2410.02197.
    """

    def __init__(self, shape: Shape, planes: int = 4) -> None:
        super().__init__(shape, 2 * planes)
        self.planes = planes
        # softplus(4) = 4.02: a turn of 90 degrees says 98 %.
        self.scale = nn.Parameter(torch.full((planes,), 4.0))
        self.scale_of_text = nn.Linear(shape.text_dim, planes) if shape.reads_text else None
        if self.scale_of_text is not None:
            nn.init.zeros_(self.scale_of_text.weight)
            nn.init.zeros_(self.scale_of_text.bias)

    @property
    def scalar(self) -> bool:
        return False

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "planes": self.planes}

    @torch.no_grad()
    def start(self, media: Tensor, text: Tensor | None) -> None:
        """Centre the embeddings: where all point the same way, a circle of preferences has no gradient, each pull meets its opposite."""
        last = self.body[-1]
        last.bias -= self.body(self.features(media, text)).flatten(0, -2).mean(dim=0)  # type: ignore[operator]

    def forward(self, media: Tensor, text: Tensor | None) -> Tensor:
        embedding = normalize(self.body(self.features(media, text)), dim=-1)
        scale = self.scale
        if self.scale_of_text is not None and text is not None:
            scale = scale + self.scale_of_text(standard(text))
        # Both samples of a comparison have the prompt's scale; its root on either side is the scale of the product.
        root = (softplus(scale) / self.temperature).sqrt()
        return embedding * root.repeat_interleave(2, dim=-1)

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor:
        return general_preference(first, second)


class GatedHead(Head):
    """``exp(s) sum_k softmax(gate(prompt))_k z_k`` of standardised ratings z; without text the gate is the same for every prompt.

    A ``nuisance`` aspect is rated too and taken out of the others (``z_k - c_k z_nuisance``) instead of being weighed.
    Source: ArmoRM, arXiv:2406.12845.
    """

    rating_mean: Tensor
    rating_std: Tensor
    dependence: Tensor

    def __init__(self, shape: Shape, aspects: Sequence[str], nuisance: str | None = None) -> None:
        super().__init__(shape, len(aspects))
        self.names, self.nuisance = tuple(aspects), nuisance
        self.weighed = [row for row, name in enumerate(aspects) if name != nuisance]
        reads = shape.text_dim if shape.reads_text else 0
        self.gate = nn.Linear(max(reads, 1), len(self.weighed))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.log_scale = nn.Parameter(torch.zeros(()))
        for name, value in (("rating_mean", 0.0), ("rating_std", 1.0), ("dependence", 0.0)):
            self.register_buffer(name, torch.full((len(aspects),), value))

    @property
    def aspects(self) -> tuple[str, ...]:
        return self.names

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "aspects": list(self.names), "nuisance": self.nuisance}

    def standard_ratings(self, media: Tensor, text: Tensor | None) -> Tensor:
        """Ratings (..., K) in units of the training ratings' standard deviation around their mean."""
        return self.body(self.features(media, text))

    def ratings(self, media: Tensor, text: Tensor | None) -> Tensor:
        """Ratings (..., K) on the scales they were given on."""
        return self.rating_mean + self.rating_std * self.standard_ratings(media, text)

    def gate_weights(self, text: Tensor | None) -> Tensor:
        """How much each weighed aspect counts, (..., K'), summing to 1."""
        return torch.softmax(self._logits(text, self.log_scale), dim=-1)

    def forward(self, media: Tensor, text: Tensor | None) -> Tensor:
        rated = self.standard_ratings(media, text)
        if self.nuisance is not None:
            rated = rated - self.dependence * rated[..., [self.names.index(self.nuisance)]]
        rated = rated[..., self.weighed]
        logits = self._logits(text, rated).expand_as(rated)
        reward = gated_reward(rated.flatten(0, -2), logits.flatten(0, -2)).reshape(*rated.shape[:-1], 1)
        return self.log_scale.exp() * reward / self.temperature

    def _logits(self, text: Tensor | None, like: Tensor) -> Tensor:
        return self.gate(standard(text) if self.shape.reads_text and text is not None else like.new_zeros(1))

    def gate_parameters(self) -> list[nn.Parameter]:
        """What the comparisons teach once the ratings are learnt."""
        return [*self.gate.parameters(), self.log_scale]


def compose(blocks: Sequence[Block], media: Tensor, text: Tensor | None) -> Tensor:
    """Features (..., D) of embeddings (..., d) and (..., e), or ``None`` where no block reads the prompt."""
    if blocks == ("media",) or text is None:
        return media
    made = {"media": lambda: media, "text": lambda: text, "product": lambda: media * text}
    return torch.cat([made[block]() for block in blocks], dim=-1)


def standard(text: Tensor) -> Tensor:
    """Text embeddings with mean 0 and variance 1 over their elements: unit embeddings would hardly move a linear layer."""
    return layer_norm(text, text.shape[-1:])


HEADS: dict[str, type[Head]] = {"scalar": ScalarHead, "preference": PreferenceHead, "gated": GatedHead}


def build_head(kind: str, arguments: dict[str, Any]) -> Head:
    """The head that ``HEADS`` calls ``kind``, from what ``Head.arguments`` gave."""
    shape = dict(arguments["shape"])
    return HEADS[kind](Shape(**{**shape, "blocks": tuple(shape["blocks"])}), **{k: v for k, v in arguments.items() if k != "shape"})


def head_kind(head: Head) -> str:
    return next(kind for kind, made in HEADS.items() if type(head) is made)
