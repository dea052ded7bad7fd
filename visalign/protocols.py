"""What the parts of visalign may assume of one another. Core code knows these protocols and not one concrete leaf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from visalign.types import (
    Batch,
    Comparisons,
    Experience,
    Measurement,
    Media,
    MediaKind,
    NoiseLevel,
    Prediction,
    PredictionKind,
    Prompt,
    Role,
    Schedule,
    Scores,
    Trajectory,
    Transition,
)

Arity = Literal["pointwise", "pairwise", "groupwise", "set"]
ALL_MEDIA: frozenset[MediaKind] = frozenset({"image", "video", "audio", "mesh"})


class Conditioning(Protocol):
    """Encoded prompts: what the denoiser is given besides state and time. Opaque to everything but its policy."""

    def __len__(self) -> int:
        """Number of rows."""

    def select(self, rows: Sequence[int]) -> Conditioning:
        """Rows in the given order, repeats allowed (``[0] * G`` makes a group of one encoded prompt)."""


class TrainingTimes(Protocol):
    """The whole range of noise levels a denoiser was trained on; a schedule visits a few of them.

    ``process`` is "flow" (alpha = 1 - sigma), "VP" (alpha^2 + sigma^2 = 1) or "sigma" (alpha = 1); ``kind`` what the network predicts.
    """

    @property
    def kind(self) -> PredictionKind: ...

    @property
    def sigma_data(self) -> float: ...

    @property
    def process(self) -> str: ...

    def level(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma``, float64 (B,) each, at the scheduler's own timesteps (B,)."""

    def timestep(self, fraction: Tensor) -> Tensor:
        """The scheduler's timestep, float64 (B,), at a fraction (B,) of the training range: 0 is data, 1 is noise."""


class Policy(Protocol):
    """A generator whose denoiser can be asked, trained and reverted to its reference.

    One that also hands out its network's own outputs (`visalign.kernels.ask`) spares operators a prediction in memory."""

    schedule: Schedule
    latent_shape: tuple[int, ...]
    device: Any

    @property
    def times(self) -> TrainingTimes:
        """Noise levels by timestep.

        Raises ValueError where the scheduler does not tell them."""

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """One row per prompt; each distinct prompt is encoded once."""

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        """States at ``schedule.levels[0]``, float32 (len(seeds), *latent_shape); sample k depends on ``seeds[k]`` alone."""

    def predict(self, x: Tensor, step: int, conditioning: Any, role: Role = "policy") -> Prediction:
        """Guided prediction at ``schedule.levels[step]`` for x of shape (B, *latent_shape) and B rows of what ``encode`` returned.

        Differentiable in the trainable weights and in ``x`` for every role but those without trainable weights."""

    def predict_at(self, x: Tensor, timesteps: Tensor, conditioning: Any, role: Role = "policy") -> Prediction:
        """As ``predict``, at any timesteps of the training range, float64 (B,), one per row."""

    def decode(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> list[Media]:
        """Clean latents (B, *latent_shape) to media, through the pipeline's own decode path; ``prompts`` are the samples' (B)."""

    def named_trainable(self) -> Mapping[str, nn.Parameter]:
        """The trained tensors by stable name: what optimizer, EMA, checkpoint and adapter files see."""

    def has_role(self, role: Role) -> bool:
        """Whether ``predict(..., role=role)`` is possible now."""

    def snapshot(self, role: Role, values: Mapping[str, Tensor] | None = None) -> None:
        """Give ``role`` a copy of the trained tensors, or of ``values``."""

    def snapshots(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The tensors behind every role that was given some, by role and name."""

    def train(self, mode: bool = True) -> None:
        """Switch the denoiser's training mode (dropout, gradient checkpointing)."""


class Dynamics(Protocol):
    """How a sampler moves from level i to level i + 1."""

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """Scalars of step ``index``. ``std == 0`` means the step is deterministic. The last step always is."""


@dataclass(frozen=True)
class RewardSpec:
    """What a reward is, declared rather than inherited: on the class as far as it is known before anything is loaded (``visalign rewards``
    shows that), on the instance with what its parameters say.

    Attributes:
        name: the key under which scores are logged.
        arity: pointwise f(x, c); pairwise p(x1 > x2 | c); groupwise f(group, c); set-level D(set, reference).
        modality: kinds of media it reads; latents alone, if any.
        direction: +1 when a larger raw score is better, -1 when a smaller one is.
        requires: keys it needs in ``Prompt.metadata``; "prompt" means it reads ``Prompt.text``, "prompt_embeds" that of latents.
        differentiable: offers ``score_tensor`` with gradients to the media.
        raw_range: documented range of raw scores, infinite where unbounded.
        model_ids: weights it loads, as given by the user (path or hub id).
        licence: of those weights or of the method, SPDX where there is one.
        convention: the only latents it can read (``Media.convention``); empty for any, and for rewards of decoded media.
    Raises:
        ValueError: it would read latents and decoded media.
    """

    name: str
    arity: Arity = "pointwise"
    modality: frozenset[MediaKind] = frozenset({"image"})
    direction: Literal[1, -1] = 1
    requires: frozenset[str] = frozenset()
    differentiable: bool = False
    deterministic: bool = True
    raw_range: tuple[float, float] = (float("-inf"), float("inf"))
    model_ids: tuple[str, ...] = ()
    licence: str = ""
    version: str = "1"
    convention: str = ""

    def __post_init__(self) -> None:
        if "latent" in self.modality and len(self.modality) > 1:
            raise ValueError(f"reward '{self.name}' reads {', '.join(sorted(self.modality))}; a reward reads latents or decoded media, not "
                             "both: declare two rewards")

    @property
    def space(self) -> Literal["media", "latent"]:
        """Where its samples live: "latent" ones are scored before they are decoded."""
        return "latent" if "latent" in self.modality else "media"


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


@runtime_checkable
class AsksJudge(Protocol):
    """A reward of groups whose word is that of a judge of pairs."""

    judge: PairwiseReward


@dataclass(frozen=True)
class RecordedScores:
    """Stands for the scores that a preference data set holds; nothing can be asked."""

    spec: RewardSpec = RewardSpec(name="preference", modality=ALL_MEDIA)


@runtime_checkable
class DifferentiableReward(Protocol):
    """A reward with gradients to the media; ``spec.differentiable`` is true."""

    spec: RewardSpec

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Values (B,), larger is better, differentiable in ``media``: images (B, 3, H, W) or video (B, frames, 3, H, W) in [0, 1],
        audio (B, channels, samples) in [-1, 1]."""


@runtime_checkable
class SetReward(Protocol):
    """Judges a set of samples as a whole: a distance between distributions, a diversity. ``spec.arity`` is "set"."""

    spec: RewardSpec

    def features(self, media: Sequence[Media], prompts: Sequence[Prompt]) -> Tensor:
        """What the judgement is made of, float64 (n, d) on the CPU."""

    def credit(self, features: Tensor, group_id: Tensor) -> Tensor:
        """What every sample did for the set, float32 (N,), larger is better; features (N, d) and group_id (N,) of all processes."""


AnyReward = Reward | SetReward | PairwiseReward


@runtime_checkable
class ValuesSets(Protocol):
    """A set-level reward that says what a set is worth, for evaluations; what it remembers from training does not matter."""

    spec: RewardSpec

    def value(self, features: Tensor) -> float:
        """Of the set with these features (n, d), larger is better: a distance comes with a minus."""


@runtime_checkable
class Measures(ValuesSets, Protocol):
    """One whose metric has a published scale."""

    def measure(self, features: Tensor) -> tuple[Measurement, ...]:
        """The metric itself on its published scale, with what belongs to it (an extrapolation, another estimate)."""


@runtime_checkable
class Reports(Protocol):
    """A reward that tells how its latest call went."""

    def telemetry(self) -> Mapping[str, float]:
        """``valid_rate``, ``latency_p50`` and ``latency_p95`` in seconds, ``failed/<reason>``, ...; without side effects."""


@runtime_checkable
class Remembers(Protocol):
    """A reward whose answers depend on earlier ones; its memory is checkpointed."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Everything to be kept, by name; empty when there is nothing yet."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state_dict`` gave."""


class LatentSource(Protocol):
    """What rewards of latents have to know about a policy's latents."""

    @property
    def convention(self) -> str:
        """One name for everything that gives the numbers of a clean latent their meaning: autoencoder, scale, shift, layout, shape."""

    def embed(self, prompts: Sequence[Prompt]) -> Tensor:
        """The prompts as the denoiser reads them, float32 (n, D)."""


class Sampler(Protocol):
    """Makes samples from a policy; the settings of a run are inside."""

    def rollout(self, policy: Policy, prompts: Sequence[Prompt], *, rows: Sequence[int], iteration: int, first_index: int,
                role: Role = "policy") -> Trajectory:
        """Groups with the transitions to train on; the first sample has global index ``first_index``.

        ``rows`` are the prompts' positions in the run's list of prompts, ``role`` whose weights sample."""

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
    """Turns samples with credit into an update. ``loop.py`` asks these things and nothing else."""

    @property
    def needs_reference(self) -> bool:
        """Whether ``loss`` asks the policy for its "reference" role."""

    @property
    def needs_prediction(self) -> bool:
        """Whether the trajectory must hold the sampling policy's predictions."""

    @property
    def whole_groups(self) -> bool:
        """Whether one optimizer step must see whole groups (pairs, lists) or may see a share of every group."""

    @property
    def rollout_role(self) -> Role:
        """Whose weights make the samples; given in ``begin`` if it is not the policy."""

    def begin(self, policy: Policy, iteration: int) -> None:
        """Before an iteration samples: move the weights of other roles (an old policy, a refreshed reference)."""

    def prepare(self, policy: Policy, experience: Experience, microbatch: int) -> Experience:
        """Once per iteration, before any update and without gradients, e.g. to recompute old log-probabilities."""

    def microbatches(self, policy: Policy, batch: Batch, microbatch: int, seed: int) -> Iterable[Any]:
        """Cut one optimizer step's samples into micro-batches of at most ``microbatch`` samples.

        Randomness follows from ``seed`` and the samples' global index alone: micro-batches and processes change nothing."""

    def loss(self, policy: Policy, microbatch: Any) -> LossTerms:
        """Forward pass and loss of one micro-batch."""
