"""An algorithm from its section of the configuration: the fields of its dataclass are the keys. Part of the composition root."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from visalign.algorithms.awm import AWM
from visalign.algorithms.grpo import GRPO
from visalign.algorithms.nft import NFT
from visalign.algorithms.preference import PreferenceOptimisation
from visalign.algorithms.reward_gradient import RewardGradient
from visalign.algorithms.self_npo import SelfNpo
from visalign.assemble import assemble
from visalign.config import Config, GrpoConfig
from visalign.credit import RewardTerm
from visalign.kernels.backend import Backend
from visalign.maths.preference import bind_loss
from visalign.protocols import Algorithm
from visalign.samplers.inversion import Inversion
from visalign.settings import ConfigError, did_you_mean

Terms = Sequence[RewardTerm]
Builder = Callable[[dict[str, Any], Terms, Backend], Algorithm]


def build_algorithm(config: Config, terms: Terms) -> Algorithm:
    """The algorithm ``config.algorithm`` names.

    Raises:
        ConfigError: no such algorithm, or parameters it does not take.
    """
    section = config.algorithm
    if isinstance(section, GrpoConfig):
        return GRPO(clip=section.clip, surrogate=section.surrogate, kl_weight=section.kl_weight, kl_schedule=section.kl_schedule,
                    iterations=config.train.iterations, old_log_prob=section.old_log_prob, backend=config.kernels)
    if section.name not in ALGORITHMS:
        known = ["grpo", *ALGORITHMS]
        hint = did_you_mean(section.name, known)
        raise ConfigError([f"algorithm.name: there is no '{section.name}'{hint}; there are {', '.join(known)}"], "the section algorithm")
    return ALGORITHMS[section.name](section.params, terms, config.kernels)


def _preference(params: dict[str, Any], terms: Terms, backend: Backend) -> Algorithm:
    """``loss: dpo`` or ``loss: {name: kto, weight_bad: 0.5}``; ``inversion: {num_steps: 9}`` in place of random noise."""
    loss = params.pop("loss", "dpo")
    named: Mapping[str, Any] = {"name": loss} if isinstance(loss, str) else loss
    try:
        bound = bind_loss(named["name"], **{key: value for key, value in named.items() if key != "name"})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"algorithm.loss: {error}"], "the section algorithm") from None
    inversion = params.pop("inversion", None)
    invert = None if inversion is None else assemble(Inversion, inversion, "algorithm.inversion")
    return assemble(PreferenceOptimisation, params, "algorithm", {"preference_loss": bound, "invert": invert, "backend": backend})


def _reward_gradient(params: dict[str, Any], terms: Terms, backend: Backend) -> Algorithm:
    return assemble(RewardGradient, params, "algorithm", {"terms": [(term.name, term.weight, term.reward) for term in terms]})


ALGORITHMS: Mapping[str, Builder] = {
    "preference": _preference,
    "nft": lambda params, terms, backend: assemble(NFT, params, "algorithm"),
    "awm": lambda params, terms, backend: assemble(AWM, params, "algorithm"),
    "self_npo": lambda params, terms, backend: assemble(SelfNpo, params, "algorithm"),
    "reward_gradient": _reward_gradient,
}
