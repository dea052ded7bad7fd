"""What the parts of visalign may assume of one another. Core code knows these protocols and not one concrete leaf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Generator, Tensor, nn

from visalign.types import (
    Batch,
    Comparisons,
    Experience,
    Media,
    MediaKind,
    NoiseLevel,
    Prediction,
    Prompt,
    Role,
    Schedule,
    Scores,
    Trajectory,
    Transition,
)

Arity = Literal["pointwise", "pairwise", "groupwise", "set"]


class Conditioning(Protocol):
    """Encoded prompts: what the denoiser is given besides state and time. Opaque to everything but its policy."""

    def __len__(self) -> int:
        """Number of rows."""

    def select(self, rows: Sequence[int]) -> Conditioning:
        """Rows in the given order, repeats allowed (``[0] * G`` makes a group of one encoded prompt)."""


class Policy(Protocol):
    """A generator whose denoiser can be asked, trained and reverted to its reference."""

    schedule: Schedule
    latent_shape: tuple[int, ...]
    device: Any

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """One row per prompt; each distinct prompt is encoded once."""

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        """States at ``schedule.levels[0]``, float32 (len(seeds), *latent_shape); sample k depends on ``seeds[k]`` alone."""

    def predict(self, x: Tensor, step: int, conditioning: Any, role: Role = "policy") -> Prediction:
        """Guided prediction at ``schedule.levels[step]`` for x of shape (B, *latent_shape) and B rows of what ``encode`` returned.

        Differentiable in the trainable weights and in ``x`` for every role but those without trainable weights."""

    def decode(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> list[Media]:
        """Clean latents (B, *latent_shape) to media, through the pipeline's own decode path; ``prompts`` are the samples' (B)."""

    def named_trainable(self) -> Mapping[str, nn.Parameter]:
        """The trained tensors by stable name: what optimizer, EMA, checkpoint and adapter files see."""

    def has_role(self, role: Role) -> bool:
        """Whether ``predict(..., role=role)`` is possible now."""

    def train(self, mode: bool = True) -> None:
        """Switch the denoiser's training mode (dropout, gradient checkpointing)."""


class Dynamics(Protocol):
    """How a sampler moves from level i to level i + 1."""

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """Scalars of step ``index``. ``std == 0`` means the step is deterministic. The last step always is."""


@dataclass(frozen=True)
class RewardSpec:
    """What a reward is, declared rather than inherited.

    Attributes:
        name: the key under which scores are logged.
        arity: pointwise f(x, c); pairwise p(x1 > x2 | c); groupwise f(group, c); set-level D(set, reference).
        modality: kinds of media it reads.
        direction: +1 when a larger raw score is better, -1 when a smaller one is.
        requires: keys it needs in ``Prompt.metadata``; "prompt" means it reads ``Prompt.text``.
        differentiable: offers ``score_tensor`` with gradients to the media.
        raw_range: documented range of raw scores, infinite where unbounded.
        model_ids: weights it loads, as given by the user (path or hub id).
        licence: of those weights or of the method, SPDX where there is one.
    """

    name: str
    arity: Arity = "pointwise"
    modality: frozenset[MediaKind] = frozenset({"image"})
    space: Literal["media", "latent"] = "media"
    direction: Literal[1, -1] = 1
    requires: frozenset[str] = frozenset()
    differentiable: bool = False
    deterministic: bool = True
    raw_range: tuple[float, float] = (float("-inf"), float("inf"))
    model_ids: tuple[str, ...] = ()
    licence: str = ""
    version: str = "1"


@runtime_checkable
class Reward(Protocol):
    """Scores samples. Pointwise rewards see each sample alone; groupwise and set-level ones see the call's samples together."""

    spec: RewardSpec

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per sample; ``media``, ``prompts`` and ``group_id`` have one entry per sample."""


@runtime_checkable
class PairwiseReward(Protocol):
    """Compares two samples of one prompt."""

    spec: RewardSpec

    def compare(self, first: Sequence[Media], second: Sequence[Media], prompts: Sequence[Prompt]) -> Comparisons:
        """Probability that the first of each pair is better, in the order given (callers swap the order themselves)."""


class Sampler(Protocol):
    """Makes samples from a policy; the settings of a run are inside."""

    def rollout(self, policy: Policy, prompts: Sequence[Prompt], *, iteration: int, first_index: int) -> Trajectory:
        """Groups with the transitions to train on; the first sample has global index ``first_index``."""

    def generate(self, policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], role: Role = "policy") -> Tensor:
        """Clean latents (n, *latent_shape), float32, by the deterministic sampler; one seed per prompt."""


@dataclass(frozen=True)
class LossTerms:
    """One micro-batch's loss and its metrics.

    Attributes:
        loss: scalar to call ``backward`` on: the **sum** over the micro-batch divided by the global denominator, so that
            accumulating micro-batches equals one large batch.
        metrics: name -> (sum, count), aggregated over micro-batches and ranks by the loop; names are ``area/name``.
        maxima: name -> largest value, aggregated likewise. The loop checks those it knows (``invariants.py``) before the first
            optimizer step of an iteration, while the weights are still the ones that sampled.
    """

    loss: Tensor
    metrics: Mapping[str, tuple[float, float]]
    maxima: Mapping[str, float] = field(default_factory=dict)


class Algorithm(Protocol):
    """Turns samples with credit into an update. ``loop.py`` calls these three things and nothing else."""

    @property
    def needs_reference(self) -> bool:
        """Whether ``loss`` asks the policy for its "reference" role."""

    @property
    def needs_prediction(self) -> bool:
        """Whether the trajectory must hold the sampling policy's predictions."""

    def prepare(self, policy: Policy, experience: Experience, microbatch: int) -> Experience:
        """Once per iteration, before any update and without gradients, e.g. to recompute old log-probabilities."""

    def microbatches(self, batch: Batch, microbatch: int, generator: Generator) -> Iterable[Any]:
        """Cut one optimizer step's samples into micro-batches of at most ``microbatch`` samples; randomness from ``generator`` alone."""

    def loss(self, policy: Policy, microbatch: Any) -> LossTerms:
        """Forward pass and loss of one micro-batch."""
