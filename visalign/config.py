"""The schema of a run: typed, frozen, validated at construction, every mistake reported at once with its path and a suggestion.

    config = load_config("quickstart", ["train.learning_rate=3e-5", "rewards.0.weight=2"])

A configuration is YAML, a recipe's name or a path, changed by ``key.sub=value`` overrides. Nothing is ever rewritten behind
the user's back: a value that cannot be honoured is an error, and :func:`dump_config` writes exactly what will run.

Parts with parameters of their own (dynamics, step selections, rewards) are given as a name with free keys next to it; the
part itself checks those keys when it is built, because the core knows no concrete leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from visalign.geometry import Geometry
from visalign.settings import ConfigError, apply_overrides, did_you_mean, dump_yaml, merge, parse_yaml, validate

Dtype = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _name_alone(value: Any) -> Any:
    """``steps: all`` is the same as ``steps: {name: all}``."""
    return {"name": value} if isinstance(value, str) else value


class Named(BaseModel):
    """A part by name with its own parameters beside it: ``{name: flow_sde, noise: 0.7}``."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: Annotated[str, Field(min_length=1)]

    @property
    def params(self) -> dict[str, Any]:
        return copy.deepcopy(self.model_extra or {})


NamedPart = Annotated[Named, BeforeValidator(_name_alone)]


class RecipeConfig(Section):
    """Where a recipe's numbers come from and what was really run with them; shown by ``visalign configs``."""

    description: str = ""
    source: str = ""
    verification: Literal["not yet run", "tiny random weights", "embedded world", "published weights"] = "not yet run"
    verified_by: str = ""

    @model_validator(mode="after")
    def _evidence(self) -> RecipeConfig:
        if self.verification != "not yet run" and not self.verified_by:
            raise ValueError(f"verification '{self.verification}' needs verified_by: the command, seed and result that show it")
        return self


class ModelConfig(Section):
    """Which pipeline, and how it is called.

    Attributes:
        path: a diffusers folder, a hub id, or ``playground:pipeline``; see :func:`resolve_path`.
        dtype: of the frozen weights; trained weights and latents follow ``train.precision`` and ``sampler.storage_dtype``.
        device: ``auto`` takes an accelerator when there is one.
        call: what you would pass to the pipeline (``num_inference_steps``, ``guidance_scale``, ``height``, ...), unchanged.
        train_call: keys that replace those of ``call`` in the update of algorithms that noise clean samples (all but grpo): they train the
            conditional prediction, so a model sampled with classifier-free guidance is trained with ``{guidance_scale: 1.0}``.
        eval_call: keys that replace those of ``call`` during evaluation and in ``visalign sample``.
    """

    path: Annotated[str, Field(min_length=1)]
    dtype: Dtype = "float32"
    device: str = "auto"
    call: dict[str, Any] = Field(default_factory=dict)
    train_call: dict[str, Any] = Field(default_factory=dict)
    eval_call: dict[str, Any] = Field(default_factory=dict)

    @field_validator("call", "train_call", "eval_call")
    @classmethod
    def _no_prompt(cls, call: dict[str, Any]) -> dict[str, Any]:
        taken = sorted({"prompt", "negative_prompt", "generator", "latents", "num_images_per_prompt"} & call.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be fixed here; prompts (with negative_prompt) come from data.prompts, "
                             "seeds from train.seed, the number of samples per prompt is train.group_size")
        return call


class DatasetConfig(Section):
    """A Hugging Face dataset (hub id or local folder) as prompts."""

    dataset: str
    split: str = "train"
    column: str = "prompt"
    negative_column: str | None = None
    metadata_columns: tuple[str, ...] = ()
    limit: Positive | None = None


class PreferencesConfig(Section):
    """Samples with scores to learn from instead of generated ones; ``visalign pairs`` makes such a data set, others are read as they are.

    Attributes:
        path: our ``preferences.jsonl`` (or its folder), a folder of parquet files, or a Hugging Face dataset.
        format: ``jsonl``, ``pickapic``, ``hpd``, ``align_anything``; ``null`` looks.
        split, limit: of a dataset.
        ties, broken: what happens to rows without a winner, and to rows that cannot be read: ``error``, ``skip`` (counted) or ``keep``.
        resize: fit media of another size to the pipeline's (shorter side, then centre crop); otherwise they are an error.
        cache: folder of encoded latents; default ``~/.cache/visalign/latents``.
    """

    path: Annotated[str, Field(min_length=1)]
    format: str | None = None
    split: str = "train"
    limit: Positive | None = None
    ties: Literal["error", "skip", "keep"] = "error"
    broken: Literal["error", "skip"] = "error"
    resize: bool = False
    cache: str | None = None


class DataConfig(Section):
    """Prompts: a ``.txt`` or ``.jsonl`` file, ``playground:train`` / ``playground:heldout``, or a dataset; or a preference data set.

    Attributes:
        real_fraction: with prompts *and* preferences, this share of every iteration's groups is data instead of samples; both are scored
            by the rewards. Keeps a model that learns from its own best samples from collapsing (arXiv:2407.09499).
    """

    prompts: str | DatasetConfig | None = None
    eval_prompts: str | DatasetConfig | None = None
    preferences: PreferencesConfig | None = None
    real_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def offline(self) -> PreferencesConfig | None:
        """The data set that is all a run learns from."""
        return self.preferences if self.real_fraction == 0 else None

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.real_fraction > 0:
            if self.prompts is None or self.preferences is None:
                raise ValueError("real_fraction mixes data into samples: give prompts to generate for and preferences to take data from")
            return self
        if (self.prompts is None) == (self.preferences is None):
            raise ValueError("give either prompts to generate for, or preferences to learn from" +
                             ("; a preference data set has its own prompts" if self.prompts is not None else ""))
        return self


class RewardConfig(Section):
    """One reward.

    Attributes:
        name: a built-in name, an entry point of ``visalign.rewards``, or a dotted path ``package.module:attribute``.
        weight: in the combination (``algorithm.advantage.level`` says of what); negative to punish.
        params: the reward's own arguments; ``playground:clip`` may stand for a path, see :func:`resolve_path`.
        required: a sample this reward cannot score is left out of the update; if false, the other rewards decide alone.
        shift, scale: frozen standardisation ``(value - shift) / scale``, for example mean and standard deviation under the initial policy;
            it comes after the direction and before the shape.
        shape: ``lsc`` (log-sigmoid) or ``par`` (sigmoid) of the difference to references, see ``visalign/composition/shapes.py``.
    """

    name: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    params: dict[str, Any] = Field(default_factory=dict)
    required: bool = True
    shift: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    scale: PositiveFloat = 1.0
    shape: NamedPart | None = None

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a reward with weight 0 does nothing; remove it, or list it under guards to watch it")
        return weight


class GuardConfig(Section):
    """A reward asked in evaluations and never trained on: how reward hacking is seen.

    Attributes:
        name, params: as of rewards.
        stops: whether its fall may end the run (``stopping``); if false it is only watched.
    """

    name: Annotated[str, Field(min_length=1)]
    params: dict[str, Any] = Field(default_factory=dict)
    stops: bool = True


class StoppingConfig(Section):
    """When guards end a run: one of them falls although the training reward does not (hacking), or everything falls (collapse).

    Every evaluation after the first is compared with the guard's best one, prompt by prompt (``visalign/guards/rule.py``).

    Attributes:
        stop: end the run there, with the weights of its best evaluation as its result; if false, only say so.
        fall: smallest fall that counts, in standard deviations of the guard between prompts before training.
        confidence: that a run whose guards do not fall is not stopped, however often it is evaluated.
        patience: evaluations in a row that must show a fall.
        statistics: what happens when the media change (edge density, colours, loudness, motion, ... by ``shift`` standard deviations, or
            half of the diversity gone) while the training reward rises: ``warn``, ``stop`` or ``ignore``.
        max_kl: end the run where the policy is further from its reference than this, in nats per latent dimension (``guards/drift.py``,
            ``eval/kl_per_dim``): guards see a fall after it began, and a policy far away falls fast. ``None`` for no limit.
    """

    stop: bool = True
    fall: NonNegative = 0.1
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    patience: Positive = 1
    statistics: Literal["warn", "stop", "ignore"] = "warn"
    shift: PositiveFloat = 1.0
    max_kl: PositiveFloat | None = None


class SamplerConfig(Section):
    """How trajectories are made.

    Attributes:
        dynamics: which transition (``flow_sde``, ``dance_sde``, ``cps``, ``ddim``, ``ode``) and its noise.
        steps: which steps are stochastic and hence trained (``all``, a window, a single one); the last never is.
        same_initial_noise: the samples of a group start from one noise draw, so that credit falls on the trained steps.
        storage_dtype: stored latents are rounded to it *before* their log-probability is taken.
        noise: of stochastic steps: ``generator`` is PyTorch's on the CPU, the same samples on every device; ``philox`` is counter-based
            and made where the step is taken, which saves its transfer. Either way a sample depends on its index and step alone.
    """

    dynamics: NamedPart = Named(name="flow_sde")
    steps: NamedPart = Named(name="all")
    same_initial_noise: bool = False
    storage_dtype: Dtype = "float32"
    noise: Literal["generator", "philox"] = "generator"


class AdvantageConfig(Section):
    """From rewards to advantages.

    Attributes:
        centre: what is subtracted: the group's mean, the mean of the others (``leave_one_out``), or ranks instead of values.
        scale: what divides: the group's or the batch's standard deviation, or nothing (Dr. GRPO).
        level: weights combine raw ``reward`` values first, or per-reward ``advantage`` values (GDPO).
        whiten: at level ``advantage``, divide the weighted sum by its standard deviation over the batch.
        ddof: 1 for the unbiased standard deviation, 0 for the population's.
        eps: added to every standard deviation.
        clip: largest absolute advantage; ``null`` for no limit.
    """

    centre: Literal["group", "leave_one_out", "rank"] = "group"
    scale: Literal["group", "global", "none"] = "group"
    level: Literal["reward", "advantage"] = "reward"
    whiten: bool = True
    ddof: Literal[0, 1] = 1
    eps: NonNegative = 1e-8
    clip: PositiveFloat | None = 5.0


class GrpoConfig(Section):
    """Clipped policy gradient over grouped trajectories.

    Attributes:
        clip: half width of the ratio's range. It belongs to the log-probability *per dimension*: it scales as 1/sqrt(D).
        surrogate: ``clip`` (PPO), ``guard`` (GRPO-Guard's ratio norm), ``dppo`` (mask by exact KL, ``clip`` is its threshold).
        kl_weight: factor of the exact per-dimension KL to the reference; 0 needs no reference forward at all.
        kl_schedule: over the run, ``constant`` or ``linear`` down to 0 at the last iteration.
        old_log_prob: ``recorded`` in the rollout, or ``recomputed`` by the training graph before the first update.
    """

    name: Literal["grpo"] = "grpo"
    clip: PositiveFloat = 1e-4
    surrogate: Literal["clip", "guard", "dppo"] = "clip"
    kl_weight: NonNegative = 0.0
    kl_schedule: Literal["constant", "linear"] = "constant"
    old_log_prob: Literal["recorded", "recomputed"] = "recorded"
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)


class AlgorithmConfig(BaseModel):
    """Any algorithm but grpo by name, its own parameters beside it; they are the fields of its dataclass (``visalign/algorithms``), which
    checks them when it is built, before any weight is loaded: ``{name: nft, beta: 0.1, times: {name: grid}}``."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: Annotated[str, Field(min_length=1)]
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)

    @property
    def params(self) -> dict[str, Any]:
        return copy.deepcopy(self.model_extra or {})


def _which_algorithm(value: Any) -> str:
    name = value.get("name", "grpo") if isinstance(value, Mapping) else getattr(value, "name", "grpo")
    return "GrpoConfig" if name == "grpo" else "AlgorithmConfig"


AnyAlgorithm = Annotated[
    Annotated[GrpoConfig, Tag("GrpoConfig")] | Annotated[AlgorithmConfig, Tag("AlgorithmConfig")], Discriminator(_which_algorithm),
]


class TrainConfig(Section):
    """Geometry and optimiser. You choose groups, group_size and updates; ``visalign train --plan`` shows what follows.

    Attributes:
        iterations: collect -> score -> credit -> update cycles.
        groups: prompts per iteration, over all processes.
        group_size: samples per prompt.
        updates: optimiser steps per iteration; the samples are split evenly among them.
        microbatch: samples per forward and backward pass on one process; changes memory, never the result.
        schedule, warmup: learning-rate schedule and its linear warm-up, in optimiser steps.
        precision: autocast of the trained forward passes.
        max_skipped: consecutive steps with a non-finite loss or gradient that are refused before the run stops.
        max_failed: share of a required reward's last 1000 samples that may be without a score before the run stops.
    """

    iterations: Positive = 100
    groups: Positive = 8
    group_size: Annotated[int, Field(ge=2)] = 8
    updates: Positive = 1
    microbatch: Positive = 8
    learning_rate: PositiveFloat = 3e-4
    optimizer: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Count = 0
    precision: Dtype = "float32"
    gradient_checkpointing: bool = False
    seed: Count = 0
    max_skipped: Count = 5
    max_failed: Annotated[float, Field(gt=0, le=1)] = 0.05

    @field_validator("betas")
    @classmethod
    def _in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(betas)}")
        return betas

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        # What one process cannot divide, several cannot either; the loop checks again with the number of processes.
        Geometry(groups=self.groups, group_size=self.group_size, updates=self.updates, microbatch=self.microbatch)
        return self


class UsersConfig(Section):
    """Attention to whoever a prompt is for (``"user"`` in the prompt file or the preference data), see arXiv:2501.06655.

    Attributes:
        embeddings: safetensors file with one tensor per user; ``null`` learns ``num_tokens`` tokens of ``width`` for every user of the
            training prompts.
        learn_embeddings: also train what ``embeddings`` holds.
        strength: factor of the added attention.
    """

    embeddings: str | None = None
    learn_embeddings: bool = False
    num_tokens: Positive = 4
    width: Positive = 64
    strength: PositiveFloat = 1.0


class TrainableConfig(Section):
    """Which weights learn.

    Attributes:
        mode: ``lora`` (adapter, the reference is the adapter switched off), ``full`` (frozen copy as reference) or ``users`` (nothing
            but ``users``; the reference is without them).
        rank, alpha: of the adapter; the update is scaled by alpha / rank. ``alpha: null`` means alpha = rank.
        target_modules: names (suffixes) of adapted layers; ``null`` adapts every attention projection of the denoiser.
        init: ``default`` (Kaiming A, zero B) or ``gaussian`` (normal A, zero B): the run starts exactly at the base.
        users: condition on users; ``null`` does not.
    """

    mode: Literal["lora", "full", "users"] = "lora"
    rank: Positive = 16
    alpha: PositiveFloat | None = None
    target_modules: tuple[str, ...] | None = None
    init: Literal["default", "gaussian"] = "default"
    users: UsersConfig | None = None

    @model_validator(mode="after")
    def _something(self) -> TrainableConfig:
        if self.mode == "users" and self.users is None:
            raise ValueError("mode users trains nothing but users; add users: {}, or choose lora or full")
        return self

    @field_validator("target_modules")
    @classmethod
    def _some(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and not names:
            raise ValueError("target_modules is empty, nothing would train; name layers, or null for all attention projections")
        return names


class EmaConfig(Section):
    """Exponential moving average of the trained weights, used for evaluation and saved as the adapter."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9


class EvaluationConfig(Section):
    """Every ``every`` iterations (0: only before and after) on ``num_prompts`` prompts with fixed seeds."""

    every: Count = 20
    num_prompts: Positive = 64
    seed: Count = 1_000_000
    batch: Positive = 16


class CheckpointConfig(Section):
    """Every ``every`` iterations (0: only at the end), keeping the last ``keep``."""

    every: Count = 20
    keep: Positive = 2


Tracker = Literal["jsonl", "tensorboard", "wandb", "trackio"]


class Config(Section):
    """A whole run.

    ``combine`` says how several rewards become one: ``weighted``, ``log_tamed``, ``mean``, ``worst``, ``uncertainty``, ``entropic``,
    ``power_mean``, ``hierarchical``, ``constrained``, ``maxmin`` or ``by_prompt``, with its parameters (``visalign/composition``).

    ``kernels`` is the backend of the fused operators (``visalign/kernels``): ``auto`` takes CUDA where it is possible and says so, ``cuda``
    insists, ``torch`` never does.
    """

    recipe: RecipeConfig = Field(default_factory=RecipeConfig)
    model: ModelConfig
    data: DataConfig
    rewards: tuple[RewardConfig, ...] = ()
    combine: NamedPart = Named(name="weighted")
    guards: tuple[GuardConfig, ...] = ()
    stopping: StoppingConfig = Field(default_factory=StoppingConfig)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    algorithm: AnyAlgorithm = Field(default_factory=GrpoConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    trainable: TrainableConfig = Field(default_factory=TrainableConfig)
    ema: EmaConfig | None = None
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: tuple[Tracker, ...] = ("jsonl",)
    kernels: Literal["auto", "cuda", "torch"] = "auto"

    @field_validator("rewards")
    @classmethod
    def _one_required(cls, rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        if rewards and not any(reward.required for reward in rewards):
            raise ValueError("no reward is required, so that a group could be left without any; set required: true for one")
        return rewards

    @model_validator(mode="after")
    def _master_weights(self) -> Config:
        if self.trainable.mode == "full" and self.model.dtype != "float32":
            raise ValueError(f"model.dtype: full fine-tuning needs float32 weights, in {self.model.dtype} most steps round away; set "
                             "model.dtype=float32 and train.precision=bfloat16, or train an adapter")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if self.data.offline is None and not self.rewards:
            raise ValueError("rewards: at least one is needed, or data.preferences with a data set that holds its own scores")
        if self.data.offline is not None and self.rewards:
            raise ValueError("rewards: a preference data set holds its own scores; list rewards under guards to watch them in evaluations")
        if self.data.preferences is not None and self.algorithm.name == "grpo":
            raise ValueError("algorithm: grpo learns from its own samples, a preference data set has none; use preference, nft or awm")
        composed = self.combine.name != "weighted" or any(reward.shape is not None or reward.scale != 1 for reward in self.rewards)
        if self.algorithm.name == "reward_gradient" and composed:
            raise ValueError("combine: reward_gradient adds gradients of the rewards' own values, weight by weight; leave combine, shape "
                             "and scale out, and give the rewards weights")
        return self

    @field_validator("tracking")
    @classmethod
    def _always_jsonl(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if "jsonl" not in trackers:
            raise ValueError("metrics.jsonl is always written, it is what reports and resume read; add jsonl to the list")
        if len(set(trackers)) != len(trackers):
            raise ValueError(f"a tracker is listed twice: {', '.join(trackers)}")
        return trackers


RecipeKind = Literal["run", "reward"]


def recipe_names(kind: RecipeKind | None = None) -> list[str]:
    """Names of the recipes shipped with the package: of runs, of rewards to train (their names begin with ``reward_``), or all."""
    folder = resources.files("visalign.configs")
    names = sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
    return [name for name in names if kind is None or name.startswith("reward_") == (kind == "reward")]


def read_source(name_or_path: str | Path) -> tuple[str, str]:
    """The YAML text behind a path or a recipe's name, and what to call it in messages.

    Raises:
        ConfigError: neither a file nor a recipe.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    name = path.name.removesuffix(".yaml") if str(path.parent) in (".", "configs") else ""
    if name in recipe_names():
        return (resources.files("visalign.configs") / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"
    names = recipe_names()
    raise ConfigError([f"no such file, and no such recipe{did_you_mean(path.stem, names)}; recipes: {', '.join(names)}"],
                      f"'{name_or_path}'")


def resolve_path(value: Any) -> Any:
    """``playground:pipeline`` and ``playground:clip`` as their folders, also inside mappings and lists; other values as they are.

    Used where a model or a reward is *built*; a configuration keeps the short name, so that it runs on another machine.

    Raises:
        ValueError: the embedded world has no such model.
    """
    if isinstance(value, Mapping):
        return {key: resolve_path(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(resolve_path(part) for part in value)
    if not (isinstance(value, str) and value.startswith("playground:")):
        return value
    from visalign import playground

    match value.removeprefix("playground:"):
        case "pipeline":
            return str(playground.pipeline_path())
        case "clip":
            return str(playground.clip_path())
        case "exemplars":
            return str(playground.exemplars_path())
        case other:
            raise ValueError(f"'{value}': the playground has no model '{other}', it has pipeline, clip and exemplars")


def make_config(data: Mapping[str, Any], source: str = "the configuration") -> Config:
    """Validate plain data.

    Raises:
        ConfigError: all mistakes at once.
    """
    return validate(Config, data, source)


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The run described by a YAML file or recipe with overrides applied.

    Raises:
        ConfigError: no such file or recipe, not YAML, a reward to train, overrides that cannot be applied, or values that are wrong.
    """
    data, source = read_data(name_or_path)
    if data.get("kind") == "reward":
        raise ConfigError([f"it describes a reward to train: visalign reward-train {name_or_path} --out DIR"], source)
    if overrides:
        source += " with " + " ".join(overrides)
    return make_config(apply_overrides(data, overrides), source)


def read_data(name_or_path: str | Path, inside: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The plain data behind a path or a recipe's name; a file that says ``extends: NAME`` holds only what differs from that one.

    Raises:
        ConfigError: no such file or recipe, not YAML, or files that extend each other in a circle.
    """
    text, source = read_source(name_or_path)
    if source in inside:
        raise ConfigError([f"extends: {' -> '.join([*inside, source])} is a circle; let one of them stand alone"], source)
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise ConfigError([str(error)], source) from None
    if not isinstance(data, dict):
        raise ConfigError([f"expected a mapping with sections such as model, data, rewards; got {type(data).__name__}"], source)
    base = data.pop("extends", None)
    if base is None:
        return data, source
    near = Path(name_or_path).parent / str(base)
    return merge(read_data(near if near.is_file() else str(base), (*inside, source))[0], data), source


def dump_config(config: Config) -> str:
    """YAML of every value, defaults included; ``load_config`` of it gives the same configuration."""
    return dump_yaml(config)
