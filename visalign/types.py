"""The nouns every part of visalign exchanges: frozen dataclasses, tensors with documented shapes, no behaviour.

Notation: ``x = alpha x0 + sigma x1`` with data ``x0`` and noise ``x1 ~ N(0, I)``; rectified flow has ``alpha = 1 - sigma``.
Axes: ``P`` prompts, ``G`` samples per prompt (one *group*), ``N = P * G`` samples, ``S`` stored steps, ``T`` sampler steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["policy", "reference", "old", "ema", "negative"]
MediaKind = Literal["image", "video", "audio", "mesh", "latent"]
PredictionKind = Literal["epsilon", "sample", "v_prediction", "flow", "edm"]  # what a network's output estimates, see maths.process


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        text: what the pipeline is asked for; equal texts are still different prompts (identity is the position in the data).
        negative: the pipeline's ``negative_prompt``; ``None`` leaves the pipeline's default.
        images: paths of condition images, in the order the pipeline's ``image`` argument takes them.
        metadata: what rewards may require (``RewardSpec.requires``), e.g. ``{"target_text": "SALE"}``.
    """

    text: str
    negative: str | None = None
    images: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Media:
    """One generated sample in its canonical form.

    Attributes:
        kind: what ``data`` is.
        data: image: uint8 (3, H, W) RGB; video: uint8 (frames, 3, H, W) RGB; audio: float32 (channels, samples) in [-1, 1];
            mesh: float32 (V, 3) vertices, with ``faces``; latent: the clean latent before it is decoded, float32, finite.
        rate: frames per second (video) or samples per second (audio); ``None`` for the others.
        faces: int64 (F, 3), mesh only.
        convention: latent only: which autoencoder, scale, shift and layout its numbers mean (``LatentSource.convention``).
        prompt_embeds: latent only: the sample's prompt as its own model reads it, float32 (D,); ``None`` where nobody asked.
    """

    kind: MediaKind
    data: Tensor
    rate: float | None = None
    faces: Tensor | None = None
    convention: str = ""
    prompt_embeds: Tensor | None = None


@dataclass(frozen=True)
class NoiseLevel:
    """Signal and noise level of a state, ``x = alpha x0 + sigma x1``. ``alpha`` is 1 for sigma-space (EDM, Euler) samplers."""

    alpha: float
    sigma: float


@dataclass(frozen=True)
class Transition:
    """One sampler step as three scalars: ``x_next = A x0_pred + B x1_pred + std noise``."""

    A: float
    B: float
    std: float


@dataclass(frozen=True)
class Prediction:
    """The denoiser's answer in end-point form, float32, each of shape (B, ...): ``x = alpha x0 + sigma x1`` holds exactly."""

    x0: Tensor
    x1: Tensor

    @property
    def velocity(self) -> Tensor:
        """``x1 - x0``; with x and its level it determines both end points: ``x0 = (x - sigma velocity) / (alpha + sigma)``."""
        return self.x1 - self.x0


@dataclass(frozen=True)
class Schedule:
    """The noise levels a sampler visits.

    Attributes:
        levels: ``T + 1`` levels from noise to data; step ``i`` goes from ``levels[i]`` to ``levels[i + 1]``.
        timesteps: ``T`` values of the scheduler's own timestep, one per step.
    """

    levels: tuple[NoiseLevel, ...]
    timesteps: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        return len(self.levels) - 1


@dataclass(frozen=True)
class Trajectory:
    """Grouped samples and the stochastic steps that made them.

    Attributes:
        x, x_next: states before and after each stored step, (N, S, ...), already rounded to the storage dtype.
        x_final: the last state, un-noised, (N, ...), float32.
        step_index: which sampler step each stored entry is, int64 (S,); the same for all samples.
        transitions: the stored steps' scalars, length S.
        log_prob: log density of ``x_next`` under the step, nats **summed** over latent dimensions, float32 (N, S).
        prediction: the sampling policy's ``Prediction.velocity`` at the stored steps, float32 (N, S, ...), or ``None``
            (kept when an algorithm needs the old mean, and for the sampling/training output gap).
        conditioning: the policy's encoded prompts, one row per prompt.
        scores: scores that came with the samples, by name, n = N each (the labels of a preference dataset); empty for generated ones.
        group_id: int64 (N,), 0..P-1, samples of one prompt share it.
        prompt_index: int64 (N,), row of ``prompts``.
        sample_index: int64 (N,), global index the seed was derived from.
        prompts: the P prompts of this trajectory, in group order.
    """

    x: Tensor
    x_next: Tensor
    x_final: Tensor
    step_index: Tensor
    transitions: tuple[Transition, ...]
    log_prob: Tensor
    prediction: Tensor | None
    group_id: Tensor
    prompt_index: Tensor
    sample_index: Tensor
    prompts: tuple[Prompt, ...]
    conditioning: Any
    scores: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return self.x_final.shape[0]

    @property
    def num_dims(self) -> int:
        """Latent elements per sample, the D of ``log_prob_per_dim = log_prob / D``."""
        return self.x_final[0].numel()

    @property
    def log_prob_per_dim(self) -> Tensor:
        """Mean over latent dimensions, (N, S): the convention published clip ranges assume."""
        return self.log_prob / self.num_dims


@dataclass(frozen=True)
class Experience:
    """One iteration's samples on this process with the credit they earned.

    Attributes:
        trajectory: the samples.
        advantage: per sample and stored step, float32 (N, max(S, 1)); 0 where invalid.
        valid: bool (N,); an invalid sample counts in no sum and no denominator.
        iteration: 0-based.
        reward: the weighted sum of standardised scores, float32 (N,), NaN where invalid; what pairs and weights are made of.
    """

    trajectory: Trajectory
    advantage: Tensor
    valid: Tensor
    iteration: int
    reward: Tensor


@dataclass(frozen=True)
class Batch:
    """What one optimizer step uses on this process.

    Attributes:
        experience: the iteration it belongs to.
        rows: int64 (n,), rows of ``experience.trajectory``.
        denominator: valid samples of this optimizer step over *all* processes; a loss is a sum divided by it (and by S where it
            sums over steps).
        reduce: sums a list of numbers over all processes; every process must call it equally often.
    """

    experience: Experience
    rows: Tensor
    denominator: float
    reduce: Callable[[Sequence[float]], list[float]] = list


@dataclass(frozen=True)
class Scores:
    """What a reward says about n samples. An invalid sample has no number anywhere: it is masked out of every statistic.

    Attributes:
        raw: the reward's own scale, float32 (n,); NaN where invalid.
        value: ``raw`` with the direction applied, larger is better, float32 (n,); NaN where invalid.
        valid: bool (n,).
        reasons: per sample ``None`` or why it is invalid ("parse", "refused", "nonfinite", "timeout", ...).
        details: further per-sample axes, each float32 (n,).
        features: what a set-level reward judges the whole set by, float64 (n, d); ``value`` is 0 until it has (``credit.judge_sets``).
    """

    raw: Tensor
    value: Tensor
    valid: Tensor
    reasons: tuple[str | None, ...]
    details: Mapping[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.raw.shape[0]
        if not (self.value.shape == self.valid.shape == (n,) and len(self.reasons) == n):
            raise ValueError(f"Scores needs one entry per sample: raw {tuple(self.raw.shape)}, value {tuple(self.value.shape)}, "
                             f"valid {tuple(self.valid.shape)}, {len(self.reasons)} reasons")
        if not torch.isfinite(self.value[self.valid]).all():
            raise ValueError("Scores marks a non-finite value as valid; mark it invalid with reason 'nonfinite'")

    @staticmethod
    def from_values(values: Sequence[float | None], direction: int = 1, details: Mapping[str, Tensor] | None = None,
                    reason: str = "no score") -> Scores:
        """Scores from plain numbers; ``None`` (with ``reason``) and NaN or infinity ("nonfinite") become invalid samples."""
        given = torch.tensor([float("nan") if v is None else float(v) for v in values], dtype=torch.float32)
        valid = torch.isfinite(given)
        raw = torch.where(valid, given, torch.full_like(given, float("nan")))
        reasons = tuple(None if ok else (reason if v is None else "nonfinite") for v, ok in zip(values, valid.tolist(), strict=True))
        return Scores(raw=raw, value=direction * raw, valid=valid, reasons=reasons, details=dict(details or {}))


@dataclass(frozen=True)
class Measurement:
    """One number about a whole set of samples, on the scale on which the metric is published.

    Attributes:
        name: "FAD", "FAD-inf", "KID", "KAD", "CMMD", "Vendi", ...
        value: of the metric itself; a distance is not negated, and an unbiased one may be below 0.
        direction: +1 where larger is better, -1 where smaller is.
        count: samples it is about.
        std: spread over subsets, where the metric is a mean over those.
        r_squared: of the line through several sample sizes, where the value is its end at infinitely many.
    """

    name: str
    value: float
    direction: Literal[1, -1]
    count: int
    std: float | None = None
    r_squared: float | None = None


@dataclass(frozen=True)
class Comparisons:
    """What a pairwise judge says about n ordered pairs: ``prob_first`` float32 (n,) in [0, 1], 0.5 a tie; ``valid`` bool (n,)."""

    prob_first: Tensor
    valid: Tensor
    reasons: tuple[str | None, ...]


@dataclass(frozen=True)
class PreferencePairs:
    """Rows of ``chosen`` and ``rejected`` sample indices, int64 (n,), and the reward gap ``margin`` >= 0, float32 (n,)."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor
