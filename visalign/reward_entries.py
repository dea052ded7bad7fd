"""Rewards as users write them: entries of a configuration, ``-r`` options, and the names they are logged under.

Knows no concrete reward and no model library: a reward server starts where nothing but its reward's own packages is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from visalign.config import GuardConfig, RewardConfig, resolve_path
from visalign.plugins import load_reward
from visalign.protocols import AnyReward, Reward, SetReward
from visalign.settings import ConfigError, parse_yaml, validate


def parse_reward(text: str) -> RewardConfig:
    """A name, or a YAML mapping ``{name: ..., params: {...}}``.

    Raises:
        ConfigError: the mapping is not a reward.
    """
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError([str(error)], f"-r '{text}'") from None
    return validate(RewardConfig, value if isinstance(value, dict) else {"name": text}, f"-r '{text}'")


def unique_names(entries: Sequence[RewardConfig | GuardConfig]) -> Mapping[str, RewardConfig | GuardConfig]:
    """Entries by the name they are logged under: what follows the last ``:`` of a path; repeated ones are numbered."""
    named: dict[str, RewardConfig | GuardConfig] = {}
    for entry in entries:
        base = entry.name.rpartition(":")[2]
        name = next(n for n in chain([base], (f"{base}_{k}" for k in range(2, len(entries) + 2))) if n not in named)
        named[name] = entry
    return named


def load_any(entry: RewardConfig | GuardConfig) -> AnyReward:
    """The reward or judge an entry names."""
    return load_reward(entry.name, **resolve_path(dict(entry.params)))


def load(entry: RewardConfig | GuardConfig) -> Reward | SetReward:
    """The reward an entry names.

    Raises:
        ValueError: it is a pairwise judge, which needs a schedule to become scores.
    """
    found = load_any(entry)
    if not isinstance(found, Reward | SetReward):
        raise ValueError(f"'{entry.name}' compares pairs and gives no score per sample; wrap it: "
                         f"{{name: win_rate, params: {{judge: {{reward: {entry.name}, ...}}}}}}")
    return found


def load_guard(entry: GuardConfig) -> AnyReward:
    """The reward or judge that watches evaluations.

    Raises:
        ValueError: it ranks the samples of a group, and evaluations have one sample per prompt.
    """
    found = load_any(entry)
    if found.spec.arity == "groupwise":
        raise ValueError(f"guard '{entry.name}' compares the samples of a group, and evaluations make one sample per prompt; name the "
                         "judge itself, which then compares with the samples before training")
    return found
