"""Shapes and combiners from the names and parameters of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from visalign.assemble import assemble
from visalign.composition.adaptive import Constrained, MaxMin
from visalign.composition.by_prompt import ByPrompt
from visalign.composition.fixed import Entropic, Hierarchical, LogTamed, Mean, PowerMean, Uncertainty, Weighted, Worst
from visalign.composition.shapes import LogSigmoid, PreferenceAsReward, Shape
from visalign.composition.table import Combiner, Plain
from visalign.settings import ConfigError, did_you_mean

COMBINERS: Mapping[str, type[Plain]] = {
    "weighted": Weighted, "log_tamed": LogTamed, "mean": Mean, "worst": Worst, "uncertainty": Uncertainty, "entropic": Entropic,
    "power_mean": PowerMean, "hierarchical": Hierarchical, "constrained": Constrained, "maxmin": MaxMin, "by_prompt": ByPrompt,
}
SHAPES: Mapping[str, type] = {"lsc": LogSigmoid, "par": PreferenceAsReward}


def build_combiner(name: str, params: Mapping[str, Any], names: Sequence[str], weights: Sequence[float],
                   level: Literal["reward", "advantage"] = "reward") -> Combiner:
    """The combiner ``combine: {name: ..., ...}`` names, for these rewards.

    Raises:
        ConfigError: no such combiner, wrong parameters, rewards it cannot combine, or no weights to weigh advantages with.
    """
    combiner = cast(Combiner, _build(COMBINERS, name, params, "combine"))
    try:
        combiner.check(names, weights)
    except ValueError as error:
        raise ConfigError([f"combine: {error}"], "the section combine") from None
    if level == "advantage" and not combiner.linear:
        linear = ", ".join(known for known, kind in COMBINERS.items() if kind.linear)
        raise ConfigError([f"combine: '{name}' is no weighted sum, so that advantages cannot be weighed; set algorithm.advantage.level: "
                           f"reward, or combine with {linear}"], "the section combine")
    return combiner


def build_shape(name: str, params: Mapping[str, Any], path: str) -> Shape:
    """The shape ``rewards.N.shape`` names.

    Raises:
        ConfigError: no such shape, or wrong parameters.
    """
    return cast(Shape, _build(SHAPES, name, params, path))


def _build(known: Mapping[str, type], name: str, params: Mapping[str, Any], path: str) -> Any:
    if name not in known:
        raise ConfigError([f"{path}.name: there is no '{name}'{did_you_mean(name, list(known))}; there are {', '.join(known)}"],
                          f"the section {path}")
    return assemble(known[name], params, path)
