"""The parts that a configuration names: objective, noise treatment and the head's hidden layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from visalign.assemble import assemble
from visalign.reward_training.config import RewardTrainingConfig
from visalign.reward_training.objectives import OBJECTIVES, Objective
from visalign.reward_training.treatments import TREATMENTS, Treatment
from visalign.settings import ConfigError, did_you_mean


@dataclass(frozen=True)
class Linear:
    """A linear head."""

    width = 1
    depth = 0
    dropout = 0.0


@dataclass(frozen=True)
class Mlp:
    """``depth`` hidden layers of ``width`` with GELU and dropout."""

    width: int = 128
    depth: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"width and depth must be at least 1, dropout in [0, 1); got {self.width}, {self.depth} and {self.dropout}")


@dataclass(frozen=True)
class Parts:
    """The parts that a configuration names."""

    objective: Objective
    treatment: Treatment
    hidden: Linear | Mlp


def build_parts(config: RewardTrainingConfig) -> Parts:
    """
    Raises:
        ConfigError: all unknown names, wrong parameters and parts that do not go together.
    """
    errors: list[str] = []
    made: dict[str, Any] = {}
    for section, known in (("objective", OBJECTIVES), ("noise", TREATMENTS), ("head", {"linear": Linear, "mlp": Mlp})):
        part = getattr(config, section)
        if part.name not in known:
            errors.append(f"{section}.name: there is no '{part.name}'{did_you_mean(part.name, list(known))}; there are {', '.join(known)}")
            continue
        try:
            made[section] = assemble(known[part.name], part.params, section)  # type: ignore[index]
        except ConfigError as error:
            errors += error.errors
    if not errors and not made["objective"].treatable and config.noise.name != "none":
        errors.append(f"noise: {config.objective.name} takes labels as they are; use noise: none, or an objective of bradley_terry, "
                      "general_preference, ratings")
    if config.noise.name == "co_filter" and config.lora is not None:
        errors.append("noise: co_filter trains two models at once, and lora adapts one encoder; use another treatment, or a frozen encoder")
    if errors:
        raise ConfigError(errors, "the configuration of the reward")
    return Parts(made["objective"], made["noise"], made["head"])
