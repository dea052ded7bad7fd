"""The schema of ``visalign reward-train``: typed, frozen, every mistake reported at once, like a run's (``visalign.config``).

    config = load_reward_config("reward_embedded_clip", ["ensemble.members=4", "noise={name: flip_corrected, rate: estimate}"])

Objective, noise treatment and head are parts with parameters of their own: a name with free keys beside it, checked when they are built,
before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from visalign.config import Named, NamedPart, NonNegative, Positive, PositiveFloat, RecipeConfig, Section, read_data
from visalign.reward_models.blocks import Block
from visalign.settings import ConfigError, apply_overrides, validate

Fraction = Annotated[float, Field(gt=0, lt=1)]


class JudgementsConfig(Section):
    """Preferences to learn from, of any layout that ``visalign.preferences`` reads.

    Attributes:
        path, format, split, limit, folder: as in ``load_preferences``.
        ties: judgements without a winner: ``error``, ``skip``, or ``keep``: a probability of 1/2, or an outcome of the objective ``ties``.
        broken: rows that cannot be read: ``error`` or ``skip`` (counted).
        heldout: share of the prompts whose judgements are evaluated on; a prompt is on one side only, whatever its case and spacing.
        calibration: share of the prompts that fit the temperature and choose the epoch; 0 does neither.
        gold: a rating (or a reward that ``visalign pairs`` recorded) that held-out judgements are also compared with.
    """

    path: Annotated[str, Field(min_length=1)]
    format: str | None = None
    split: str = "train"
    limit: Positive | None = None
    folder: str | None = None
    ties: Literal["error", "skip", "keep"] = "error"
    broken: Literal["error", "skip"] = "error"
    heldout: Fraction = 0.2
    calibration: Annotated[float, Field(ge=0, lt=1)] = 0.1
    gold: str | None = None

    @model_validator(mode="after")
    def _leaves_some(self) -> JudgementsConfig:
        if self.heldout + self.calibration >= 1:
            raise ValueError(f"heldout {self.heldout} and calibration {self.calibration} leave no prompt to train on; their sum must be "
                             "below 1")
        return self


class FeaturesConfig(Section):
    """What the head sees.

    Attributes:
        blocks: ``media``, ``text``, ``product``; ``null`` takes all that the encoder can fill.
        cache: folder of embeddings; default ``~/.cache/visalign/embeddings``.
        batch: media per call of the encoder while embeddings are made; does not change them.
    """

    blocks: tuple[Block, ...] | None = None
    cache: str | None = None
    batch: Positive = 256


class AdapterConfig(Section):
    """An adapter on the encoder, trained together with the head; embeddings are made anew in every step.

    Attributes:
        rank, alpha: the update is scaled by alpha / rank; ``alpha: null`` means alpha = rank.
        target_modules: names (suffixes) of adapted layers; ``null`` adapts every linear layer outside ``nn.MultiheadAttention``.
        learning_rate: of the adapter; ``null`` takes the head's.
    """

    rank: Positive = 8
    alpha: PositiveFloat | None = None
    target_modules: tuple[str, ...] | None = None
    learning_rate: PositiveFloat | None = None


class EnsembleConfig(Section):
    """Members differ by initialisation, order of the data, and the share ``fraction`` of the training prompts that each draws."""

    members: Positive = 1
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0


class OptimizationConfig(Section):
    """AdamW on judgements.

    Attributes:
        epochs, batch: passes over the training judgements, and judgements per step.
        schedule: of the learning rate, over all steps.
        keep: the weights of the ``last`` epoch, or of the ``best``: of smallest loss on the calibration judgements.
    """

    epochs: Positive = 20
    batch: Positive = 256
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegative = 0.1
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    max_grad_norm: PositiveFloat = 1.0
    keep: Literal["last", "best"] = "last"


class RewardTrainingConfig(Section):
    """A reward to train.

    Attributes:
        kind: tells this schema from a run's.
        encoder: ``{reward: clip, model: ...}``, or ``package.module:attribute`` of a function or an ``exemplars.Encoder``.
        head: ``linear``, or ``mlp`` with ``width``, ``depth``, ``dropout``.
        lora: train an adapter of the encoder as well; ``null`` keeps it frozen.
        objective: ``bradley_terry``, ``ties``, ``plackett_luce``, ``general_preference`` or ``ratings``.
        noise: ``none``, ``smoothing``, ``flip_corrected``, ``posterior``, ``voting`` or ``co_filter``.
    """

    kind: Literal["reward"]
    recipe: RecipeConfig = Field(default_factory=RecipeConfig)
    data: JudgementsConfig
    encoder: str | dict[str, Any]
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    head: NamedPart = Named(name="mlp")
    lora: AdapterConfig | None = None
    objective: NamedPart = Named(name="bradley_terry")
    noise: NamedPart = Named(name="none")
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig)
    optimization: OptimizationConfig = Field(default_factory=OptimizationConfig)
    device: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("encoder")
    @classmethod
    def _names_one(cls, encoder: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(encoder, Mapping) and not isinstance(encoder.get("reward"), str):
            raise ValueError("write {reward: clip, model: ...}, or package.module:function")
        return encoder

    @model_validator(mode="after")
    def _can_choose(self) -> RewardTrainingConfig:
        if self.optimization.keep == "best" and self.data.calibration == 0:
            raise ValueError("optimization.keep: best chooses the epoch on calibration judgements; set data.calibration above 0")
        return self


def load_reward_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RewardTrainingConfig:
    """The reward to train that a YAML file or recipe describes, with overrides applied.

    Raises:
        ConfigError: no such file or recipe, a run's configuration, overrides that cannot be applied, or values that are wrong.
    """
    data, source = read_data(name_or_path)
    if "kind" not in data and "model" in data:
        raise ConfigError([f"this is a run's configuration: visalign train {name_or_path}; a reward to train says kind: reward"], source)
    if overrides:
        source += " with " + " ".join(overrides)
    return validate(RewardTrainingConfig, apply_overrides(data, overrides), source)
