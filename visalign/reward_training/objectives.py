"""What a head learns from: the losses of ``maths.reward_losses``, each with the head it needs.

    bradley_terry        pairs -> a reward
    ties                 pairs with ties as a third outcome -> a reward
    plackett_luce        whole lists -> a reward
    general_preference   pairs -> an embedding, cycles allowed
    ratings              ratings of aspects, then pairs for the gate that weighs them -> a reward
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from visalign.maths.reward_losses import (
    bradley_terry_loss,
    centring_penalty,
    flip_corrected_loss,
    plackett_luce_loss,
    rating_loss,
    ties_loss,
    without_nuisance,
)
from visalign.reward_models.heads import GatedHead, Head, PreferenceHead, ScalarHead, Shape
from visalign.reward_training.examples import Examples
from visalign.reward_training.sources import Source, batches

BATCH = 1024


@dataclass(frozen=True)
class Targets:
    """What a pair's label is taken for, after the noise treatment.

    Attributes:
        prob: that the first is better, (n,).
        margin: by which the winner is to be ahead, (n,).
        flip_rate: of labels whose expected clean loss is wanted; 0 where ``prob`` says all.
    """

    prob: Tensor
    margin: Tensor
    flip_rate: float = 0.0

    @staticmethod
    def of(label: Tensor) -> Targets:
        """The labels as they are; 1/2 for ties."""
        return Targets((1 + label.float()) / 2, torch.zeros(len(label)))

    def select(self, rows: Tensor) -> Targets:
        return Targets(self.prob[rows], self.margin[rows], self.flip_rate)


@dataclass(frozen=True)
class Batch:
    """What a loss is computed from: judgements, their targets, and embeddings (B, K, d) and (B, K, e)."""

    examples: Examples
    targets: Targets
    media: Tensor
    text: Tensor | None


@dataclass(frozen=True)
class Stage:
    """One pass of training.

    Attributes:
        begin: called once before, with the head, the source of embeddings and the training examples.
        parameters: of the head that learn.
        loss: of each example, (B,).
        of_samples: it goes over samples with their ratings instead of comparisons.
        adapts: the encoder's adapter, if there is one, learns too.
    """

    begin: Callable[[Head, Source, Examples], None]
    parameters: Callable[[Head], list[nn.Parameter]]
    loss: Callable[[Head, Batch], Tensor]
    of_samples: bool = False
    adapts: bool = True


class Objective(Protocol):
    """How a head is taught.

    Attributes:
        treatable: whether labels can be replaced by probabilities and margins.
        lists: whether it reads whole lists; otherwise every comparison inside a judgement.
    """

    @property
    def treatable(self) -> bool: ...

    @property
    def lists(self) -> bool: ...

    @property
    def rated(self) -> tuple[str, ...]:
        """Aspects whose ratings it needs."""

    def build(self, shape: Shape) -> Head: ...

    def stages(self) -> tuple[Stage, ...]:
        """In order; the last one learns from comparisons."""


def _nothing(head: Head, source: Source, examples: Examples) -> None:
    """Most stages need no preparation."""


def _everything(head: Head) -> list[nn.Parameter]:
    return list(head.parameters())


@dataclass(frozen=True)
class Plain:
    """What most objectives share: one stage on all parameters of a scalar head."""

    treatable: ClassVar[bool] = True
    lists: ClassVar[bool] = False

    @property
    def rated(self) -> tuple[str, ...]:
        return ()

    def build(self, shape: Shape) -> Head:
        return ScalarHead(shape)

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(_nothing, _everything, self.loss),)

    def loss(self, head: Head, batch: Batch) -> Tensor:
        return pair_loss(head, batch)


@dataclass(frozen=True)
class BradleyTerry(Plain):
    """``centring`` weighs ``(r_first + r_second)^2``, which holds the constant that comparisons leave free near 0."""

    centring: float = 0.0

    def __post_init__(self) -> None:
        if not self.centring >= 0:
            raise ValueError(f"centring must be >= 0, got {self.centring}")

    def loss(self, head: Head, batch: Batch) -> Tensor:
        loss = pair_loss(head, batch)
        if self.centring == 0:
            return loss
        return loss + self.centring * centring_penalty(*head(batch.media, batch.text).squeeze(-1).unbind(1))


@dataclass(frozen=True)
class Ties(Plain):
    """Bradley-Terry with ties; ``k`` > 1, larger for more ties."""

    k: float = 5.0
    treatable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.k > 1:
            raise ValueError(f"k must be > 1, got {self.k}; without ties use bradley_terry")

    def loss(self, head: Head, batch: Batch) -> Tensor:
        first, second = head(batch.media, batch.text).unbind(1)
        return ties_loss(head.log_odds(first, second), batch.examples.label.to(first.device), self.k)


@dataclass(frozen=True)
class PlackettLuce(Plain):
    """Lists, best first. Candidates of one score take a new random order whenever the list is seen."""

    treatable: ClassVar[bool] = False
    lists: ClassVar[bool] = True

    def loss(self, head: Head, batch: Batch) -> Tensor:
        rewards = head(batch.media, batch.text).squeeze(-1)
        chance = torch.rand(batch.examples.scores.shape).argsort(dim=1)
        by_score = batch.examples.scores.gather(1, chance).argsort(dim=1, descending=True, stable=True)
        return plackett_luce_loss(rewards.gather(1, chance.gather(1, by_score).to(rewards.device)))


@dataclass(frozen=True)
class GeneralPreference(Plain):
    """An embedding of ``planes`` planes, each a game of its own that may go in circles."""

    planes: int = 4

    def __post_init__(self) -> None:
        if self.planes < 1:
            raise ValueError(f"planes must be at least 1, got {self.planes}")

    def build(self, shape: Shape) -> Head:
        return PreferenceHead(shape, self.planes)


@dataclass(frozen=True)
class Ratings(Plain):
    """``aspects`` are rated first, then comparisons teach the gate; ``nuisance`` is one of them that must not count."""

    aspects: tuple[str, ...]
    nuisance: str | None = None

    def __post_init__(self) -> None:
        if len(self.aspects) < 1 + (self.nuisance is not None) or len(set(self.aspects)) < len(self.aspects):
            raise ValueError(f"aspects {list(self.aspects)}: name at least one rating that is to count, each once")
        if self.nuisance is not None and self.nuisance not in self.aspects:
            raise ValueError(f"nuisance '{self.nuisance}' is not rated; add it to aspects: {', '.join(self.aspects)}")

    @property
    def rated(self) -> tuple[str, ...]:
        return self.aspects

    def build(self, shape: Shape) -> Head:
        return GatedHead(shape, self.aspects, self.nuisance)

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(_freeze_rating_scales, lambda head: list(head.body.parameters()), _rating_loss, of_samples=True),
                Stage(_freeze_dependence, lambda head: cast(GatedHead, head).gate_parameters(), pair_loss, adapts=False))


def pair_loss(head: Head, batch: Batch) -> Tensor:
    """Cross-entropy with the targets, or its flip-corrected form, (B,)."""
    first, second = head(batch.media, batch.text).unbind(1)
    difference = head.log_odds(first, second)
    targets = batch.targets
    loss = bradley_terry_loss(difference, targets.prob.to(difference), targets.margin.to(difference))
    if targets.flip_rate == 0:
        return loss
    label = batch.examples.label.to(difference.device)
    return torch.where(label == 0, loss, flip_corrected_loss(difference * label, targets.flip_rate))


def _rating_loss(head: Head, batch: Batch) -> Tensor:
    gated = cast(GatedHead, head)
    rated = (batch.examples.ratings[:, 0].to(gated.rating_mean) - gated.rating_mean) / gated.rating_std
    return rating_loss(gated.standard_ratings(batch.media, batch.text)[:, 0], rated)


@torch.no_grad()
def _freeze_rating_scales(head: Head, source: Source, examples: Examples) -> None:
    """Mean and standard deviation of every aspect over the training samples.

    Raises:
        ValueError: an aspect has less than two different ratings there.
    """
    gated = cast(GatedHead, head)
    for k, name in enumerate(gated.names):
        rated = examples.ratings[..., k].double()
        rated = rated[torch.isfinite(rated)]
        if len(rated) < 2 or not float(rated.std()) > 0:
            raise ValueError(f"ratings of '{name}': {len(rated)} training samples have one" + ", all of them the same" * (len(rated) > 1)
                             + "; nothing can be learnt from that, leave the aspect out")
        gated.rating_mean[k], gated.rating_std[k] = float(rated.mean()), float(rated.std())


@torch.no_grad()
def _freeze_dependence(head: Head, source: Source, examples: Examples) -> None:
    """How every aspect's rating depends on the nuisance's, over the training samples."""
    gated = cast(GatedHead, head)
    if gated.nuisance is None:
        return
    rated = torch.cat([gated.standard_ratings(*source(part)).flatten(0, -2) for part in batches(examples, BATCH)])
    gated.dependence.copy_(without_nuisance(rated, rated[:, gated.names.index(gated.nuisance)])[1])


OBJECTIVES: Mapping[str, type[Plain]] = {"bradley_terry": BradleyTerry, "ties": Ties, "plackett_luce": PlackettLuce,
                                         "general_preference": GeneralPreference, "ratings": Ratings}
