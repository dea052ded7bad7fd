"""A formula becomes a preference loss by declaring what it reads; its inputs and parameters are then checked at every call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, Generic, Literal, ParamSpec, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from visalign.maths.preference_inputs import HOW_TO_GIVE, LossInput

Group = Literal["pair", "label", "list", "weight"]
STATISTICS = ("kl", "mean_weight")
Params = ParamSpec("Params")

_GROUP_SIZES: Mapping[str, tuple[int, float, str]] = {
    "pair": (2, 2, "exactly 2 candidates: column 0 chosen, column 1 rejected"),
    "label": (1, 1, "exactly 1 candidate per group, with a label"),
    "list": (2, math.inf, "at least 2 candidates, ordered best first"),
    "weight": (1, math.inf, "at least 1 candidate"),
}


@dataclass(frozen=True)
class LossNeeds:
    """What a loss reads, so that nothing else is computed.

    Attributes:
        group: "pair" (K = 2), "label" (K = 1 with a label), "list" (K >= 2, best first) or "weight" (any K).
        reference, old: whether it reads the errors of those roles.
        reward: whether it reads numbers, not the order alone.
        from_reference: whether it must know which candidates the reference generated.
        shared_noise: whether the candidates of a group share time and noise, which cancels most of the variance of a margin.
        statistics: global means it reads: "kl" is the mean of ``delta`` over all samples, "mean_weight" that of the sample weights.
    Raises:
        ValueError: an unknown group or statistic.
    """

    group: Group
    reference: bool = True
    old: bool = False
    reward: bool = False
    from_reference: bool = False
    shared_noise: bool = True
    statistics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.group not in _GROUP_SIZES:
            raise ValueError(f"unknown group '{self.group}'; a loss takes one of {', '.join(_GROUP_SIZES)}")
        for name in self.statistics:
            if name not in STATISTICS:
                raise ValueError(f"unknown statistic '{name}'; a loss can ask for {', '.join(STATISTICS)}")

    @property
    def label(self) -> bool:
        """Whether it reads labels."""
        return self.group == "label"


@dataclass(frozen=True)
class Range:
    """Allowed values of a parameter: the closed interval without ``exclude``."""

    low: float = -math.inf
    high: float = math.inf
    exclude: tuple[float, ...] = ()

    def __str__(self) -> str:
        bounds = (">=" if self.low not in self.exclude else ">", self.low), ("<=" if self.high not in self.exclude else "<", self.high)
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound)) or "finite"

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and value not in self.exclude


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(low=0.0, exclude=(0.0,))]
NonNegative = Annotated[float, Range(low=0.0)]
Fraction = Annotated[float, Range(low=0.0, high=1.0)]


@dataclass(frozen=True)
class PreferenceLoss(Generic[Params]):
    """A formula ``(LossInput, parameters) -> (P,)`` with its needs; made by :func:`preference_loss`, called like the formula.

    Attributes:
        function: the formula.
        needs: what it reads.
        hints: resolved annotations of its keyword parameters.
    """

    function: Callable[Concatenate[LossInput, Params], Tensor]
    needs: LossNeeds
    hints: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Keyword parameters and their defaults; ``inspect.Parameter.empty`` marks the required ones."""
        given = list(inspect.signature(self.function).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in given}

    def __call__(self, inputs: LossInput, *args: Params.args, **kwargs: Params.kwargs) -> Tensor:
        """The loss of every group, (P,), times ``inputs.weight`` where given.

        Raises:
            ValueError: the inputs lack what the loss needs, or a parameter is out of range.
        """
        check_inputs(self.name, self.needs, inputs)
        for name, value in kwargs.items():
            check_parameter(self.name, name, value, self.hints.get(name))
        values = self.function(inputs, *args, **kwargs)
        assert values.shape == inputs.policy.shape[:1], f"{self.name} returned {tuple(values.shape)}, expected one value per group"
        return values if inputs.weight is None else inputs.weight * values


def preference_loss(
    *, group: Group, reference: bool = True, old: bool = False, reward: bool = False, from_reference: bool = False,
    shared_noise: bool = True, statistics: tuple[str, ...] = (),
) -> Callable[[Callable[Concatenate[LossInput, Params], Tensor]], PreferenceLoss[Params]]:
    """Decorator: declares what a formula reads. Parameters are keyword-only; ``Annotated[float, Range(...)]`` bounds them.

        @preference_loss(group="pair")
        def half_hinge(inputs: LossInput, *, target: Positive = 0.5) -> Tensor:
            return torch.relu(target - inputs.margin)

    The arguments are the fields of :class:`LossNeeds`.

    Raises:
        ValueError: an unknown group or statistic.
    """
    needs = LossNeeds(group, reference, old, reward, from_reference, shared_noise, statistics)

    def declare(function: Callable[Concatenate[LossInput, Params], Tensor]) -> PreferenceLoss[Params]:
        hints = get_type_hints(function, include_extras=True)
        if "mean_weight" in statistics and "temperature" not in hints:
            raise ValueError(f"'{function.__name__}' asks for the mean of exp(reward / temperature) but has no parameter 'temperature'")
        return PreferenceLoss(function, needs, {name: hint for name, hint in hints.items() if name not in ("inputs", "return")})

    return declare


def check_inputs(name: str, needs: LossNeeds, inputs: LossInput) -> None:
    """Whether ``inputs`` hold what the loss ``name`` needs.

    Raises:
        ValueError: a wrong group size, a missing input, a reward or label that is no number, a missing statistic.
    """
    low, high, meaning = _GROUP_SIZES[needs.group]
    if not low <= inputs.num_candidates <= high:
        raise ValueError(f"the loss '{name}' needs {meaning}; got errors of shape {tuple(inputs.policy.shape)}")
    wanted = [key for key in ("reference", "old", "reward", "label", "from_reference") if getattr(needs, key)]
    for key in wanted:
        if getattr(inputs, key) is None:
            raise ValueError(f"the loss '{name}' needs LossInput.{key}, got None; {HOW_TO_GIVE[key]}")
    if needs.reward and not torch.isfinite(inputs.given("reward")).all():
        raise ValueError(f"the loss '{name}' got a reward that is NaN or infinite; leave groups with invalid samples out")
    if needs.label and not (inputs.given("label").abs() <= 1).all():
        raise ValueError(f"the loss '{name}' needs labels in [-1, 1] (+1 good, -1 bad), got values outside or NaN; map 0/1 to -1/+1")
    for key in needs.statistics:
        if not math.isfinite(inputs.statistics.get(key, math.nan)):
            raise ValueError(f"the loss '{name}' needs the global statistic '{key}', got {inputs.statistics.get(key)}; "
                             "reduce it over all samples of the optimizer step and all processes")


def check_parameter(loss: str, name: str, value: Any, hint: Any) -> None:
    """Whether ``value`` fits the annotation ``hint`` of parameter ``name``.

    Raises:
        ValueError: another type, outside the range, or not one of the choices.
    """
    where = f"parameter '{name}' of the loss '{loss}'"
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} must be one of {', '.join(map(repr, get_args(hint)))}; got {value!r}")
        return
    kind, bounds = (get_args(hint) if get_origin(hint) is Annotated else (hint, None))[:2]
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
    elif kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise ValueError(f"{where} must be a number, got {value!r}")
        if isinstance(bounds, Range) and value not in bounds:
            raise ValueError(f"{where} must be {bounds}, got {value}")
