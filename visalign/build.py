"""The composition root: a configuration becomes the parts of a run. With the commands, the only place where leaves meet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from visalign import checkpoint
from visalign.build_algorithm import build_algorithm
from visalign.composition.named import build_combiner, build_shape
from visalign.config import Config, GuardConfig, RewardConfig, UsersConfig, resolve_path
from visalign.credit import RewardTerm
from visalign.data import load_prompts
from visalign.distributed import Processes
from visalign.kernels.backend import check_backend
from visalign.maths.seeds import derive_seed
from visalign.parts import Parts
from visalign.preferences import PreferenceDataset, cached_latents, load_preferences
from visalign.protocols import AnyReward, RecordedScores, Sampler
from visalign.reward_entries import load, load_guard, unique_names
from visalign.samplers.dynamics import build_dynamics
from visalign.samplers.identity import pipeline_identity
from visalign.samplers.latent_source import PipelineLatents
from visalign.samplers.mixed import MixedSampler
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.replay import SCORE, ReplaySampler
from visalign.samplers.rollout import TrajectorySampler
from visalign.samplers.steps import build_selection
from visalign.samplers.users import UserTable
from visalign.types import Prompt
from visalign.users import mixture_of, users_in

logger = logging.getLogger(__name__)


def build(config: Config, processes: Processes) -> Parts:
    """Everything a run needs, in the order that fails earliest: small files first, weights last.

    Raises:
        ValueError: a name, a path or a combination in the configuration does not work out.
    """
    check_backend(config.kernels, torch.device(processes.device))
    dataset = read_preferences(config)
    prompts, eval_prompts = build_prompts(config, dataset)
    sampler: Sampler = build_sampler(config)
    terms, guards, stopping = build_rewards(config)
    combiner = build_combiner(config.combine.name, config.combine.params, [term.name for term in terms], [term.weight for term in terms],
                              config.algorithm.advantage.level)
    algorithm = build_algorithm(config, terms)
    # One seed for all processes: every one of them must draw the same adapter.
    checkpoint.seed_everything(derive_seed(config.train.seed, 0))
    policy = build_policy(config, processes, prompts)
    check_users(policy, eval_prompts)
    if dataset is not None:
        dataset = encode_preferences(config, policy, dataset)
    if dataset is not None and config.data.offline is None:
        sampler = MixedSampler(build_sampler(config), dataset, config.data.real_fraction, config.train.seed)
    elif dataset is not None:
        prompts, sampler = dataset.prompts, ReplaySampler(dataset, microbatch=config.train.microbatch)
    checkpoint.seed_everything(derive_seed(config.train.seed, 1, processes.rank))
    eval_policy = policy.with_call(**config.model.eval_call) if config.model.eval_call else policy
    train_policy = policy.with_call(**config.model.train_call) if config.model.train_call else policy
    return Parts(policy=policy, train_policy=train_policy, eval_policy=eval_policy, sampler=sampler, algorithm=algorithm,
                 terms=terms, combiner=combiner, guards=guards, stopping=stopping, prompts=prompts,
                 eval_prompts=eval_prompts, save_adapter=policy.save_adapter, latents=PipelineLatents(policy))


def read_preferences(config: Config) -> PreferenceDataset | None:
    """The judgements of ``data.preferences``, if the run learns from some; nothing is decoded yet.

    Raises:
        ValueError: rows that cannot be used, or another number of candidates than ``train.group_size``.
    """
    settings = config.data.preferences
    if settings is None:
        return None
    dataset = load_preferences(settings.path, format=settings.format, ties=settings.ties, broken=settings.broken, split=settings.split,
                               limit=settings.limit)
    logger.info("%s: %s", settings.path, dataset.summary())
    if config.data.offline is not None and dataset.num_candidates != config.train.group_size:
        raise ValueError(f"{settings.path} compares {dataset.num_candidates} candidates, train.group_size is {config.train.group_size}; "
                         f"set train.group_size={dataset.num_candidates}")
    return dataset


def encode_preferences(config: Config, policy: PipelinePolicy, dataset: PreferenceDataset) -> PreferenceDataset:
    """The same judgements with the latents of every candidate, encoded once and kept."""
    settings = config.data.preferences
    assert settings is not None, "read_preferences gave a data set"
    folder = Path(settings.cache).expanduser() if settings.cache else Path.home() / ".cache" / "visalign" / "latents"
    cached = cached_latents(policy, dataset, folder, identity=pipeline_identity(policy), resize=settings.resize, broken=settings.broken)
    logger.info("%d latents encoded, %d found in %s", cached.encoded, cached.found, folder)
    return cached.dataset


def build_prompts(config: Config, dataset: PreferenceDataset | None = None) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Training and evaluation prompts; without ``data.eval_prompts`` a run is evaluated on its first training prompts."""
    if config.data.prompts is not None:
        prompts = load_prompts(config.data.prompts)
    else:
        assert dataset is not None, "a run has prompts or a preference data set"
        prompts = dataset.prompts
    eval_prompts = prompts if config.data.eval_prompts is None else load_prompts(config.data.eval_prompts)
    if len(eval_prompts) < config.evaluation.num_prompts:
        raise ValueError(f"evaluation.num_prompts is {config.evaluation.num_prompts}, but there are {len(eval_prompts)} evaluation "
                         f"prompts; use evaluation.num_prompts={len(eval_prompts)} or give more data.eval_prompts")
    return prompts, eval_prompts


def build_sampler(config: Config) -> TrajectorySampler:
    """Dynamics and step selection by name, and the rollout's settings."""
    settings = config.sampler
    return TrajectorySampler(group_size=config.train.group_size, seed=config.train.seed, microbatch=config.train.microbatch,
                             dynamics=build_dynamics(settings.dynamics.name, **settings.dynamics.params),
                             steps=build_selection(settings.steps.name, **settings.steps.params),
                             same_initial_noise=settings.same_initial_noise, storage_dtype=getattr(torch, settings.storage_dtype),
                             noise=settings.noise, backend=config.kernels)


def build_rewards(config: Config) -> tuple[list[RewardTerm], dict[str, AnyReward], frozenset[str]]:
    """Rewards trained on, rewards watched and the names of those that may stop the run; the second "clip" is called "clip_2".

    A run on a preference data set has one term, the scores recorded there."""
    named = unique_names([*config.rewards, *config.guards])
    terms = [RewardTerm(name=name, reward=load(entry), weight=entry.weight, required=entry.required, shift=entry.shift, scale=entry.scale,
                        shape=None if entry.shape is None else build_shape(entry.shape.name, entry.shape.params, f"rewards.{row}.shape"))
             for row, (name, entry) in enumerate(named.items()) if isinstance(entry, RewardConfig)]
    guards = {name: load_guard(entry) for name, entry in named.items() if isinstance(entry, GuardConfig)}
    if config.data.offline is not None:
        terms = [RewardTerm(name=SCORE, reward=RecordedScores())]
    return terms, guards, frozenset(name for name, entry in named.items() if isinstance(entry, GuardConfig) and entry.stops)


def build_users(settings: UsersConfig, prompts: Sequence[Prompt]) -> UserTable:
    """Tokens from a file, or new ones for all users of the prompts.

    Raises:
        ValueError: no prompt has a user.
    """
    if settings.embeddings is not None:
        return UserTable.from_file(Path(resolve_path(settings.embeddings)), settings.learn_embeddings)
    names = users_in(prompts)
    if not names:
        raise ValueError('trainable.users: no prompt has a user; add "user": NAME to the lines of data.prompts, or leave '
                         "trainable.users out")
    return UserTable.random(names, settings.num_tokens, settings.width)


def check_users(policy: PipelinePolicy, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts of users that the policy does not know, before anything is sampled."""
    if policy.roles.users is not None:
        for prompt in prompts:
            policy.roles.users.table.check(mixture_of(prompt))


def build_policy(config: Config, processes: Processes, prompts: Sequence[Prompt]) -> PipelinePolicy:
    """Load the pipeline, capture it with one of its own prompts, prove the capture by replay, and choose what learns."""
    model, trainable = config.model, config.trainable
    policy = PipelinePolicy.from_pretrained(str(resolve_path(model.path)), dtype=getattr(torch, model.dtype), device=str(processes.device),
                                            probe=prompts[0], **model.call)
    logger.info("captured %s: %s", model.path, policy.verify().rows[-1][1])
    if trainable.mode == "lora":
        init: bool | Literal["gaussian"] = True if trainable.init == "default" else "gaussian"
        alpha = trainable.rank if trainable.alpha is None else trainable.alpha
        policy.roles.add_lora(rank=trainable.rank, alpha=alpha, target_modules=trainable.target_modules, init=init)  # type: ignore[arg-type]
    elif trainable.mode == "full":
        policy.roles.train_full()
    if trainable.users is not None:
        policy.add_users(build_users(trainable.users, prompts), trainable.users.strength)
        check_users(policy, prompts)
    if config.train.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    return policy
