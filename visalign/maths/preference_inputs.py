"""What a preference loss is given, what it declares, and the decorator that turns a formula into one.

Notation of all ``visalign/maths/preference*.py`` files, for one noised copy of a sample at a time t with noise eps:

    e_phi  = mean over the latent's elements of (f_phi(x_t, t, c) - target)^2       one number per sample, phi: policy, reference, old
    delta  = e_reference - e_policy      > 0: the policy denoises the sample better than the reference does
    u      = kappa delta                 the implicit reward, beta log(pi / pi_reference) up to the bound's constant
    margin = u_w - u_l                   chosen minus rejected

``kappa`` is the one strength. Codes that write ``sigmoid(-0.5 beta ...)`` use ``kappa = beta / 2``, see ``preference_scale.py``.

Source: Diffusion-DPO, arXiv:2311.12908.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Concatenate, Generic, Literal, ParamSpec, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Group = Literal["pair", "label", "list", "weight"]
Params = ParamSpec("Params")

_GROUP_SIZES: Mapping[str, tuple[int, float, str]] = {
    "pair": (2, 2, "exactly 2 candidates: column 0 chosen, column 1 rejected"),
    "label": (1, 1, "exactly 1 candidate per group, with a label"),
    "list": (2, math.inf, "at least 2 candidates, ordered best first"),
    "weight": (1, math.inf, "at least 1 candidate"),
}


@dataclass(frozen=True, kw_only=True)
class LossInput:
    """Errors of P groups of K candidates, ordered best first (pairs: column 0 chosen, column 1 rejected; labels: K is 1).

    Attributes:
        policy: e_policy, float32 or float64 (P, K), with gradient.
        reference, old: e_reference and e_old (P, K) without gradient, ``None`` when the loss does not need them.
        kappa: strength, > 0.
        reward: (P, K), larger is better.
        label: (P, K), +1 good, -1 bad, values between for graded labels.
        from_reference: bool (P, K), candidates that the reference (not the policy) generated.
        weight: (P,), multiplies the loss of each group.
        statistics: detached means over the whole optimizer step on all processes, the ones the loss declares.
    Raises:
        ValueError: shapes or precision do not fit, kappa is not positive, or gradient flows into what is a constant.
    """

    policy: Tensor
    kappa: float
    reference: Tensor | None = None
    old: Tensor | None = None
    reward: Tensor | None = None
    label: Tensor | None = None
    from_reference: Tensor | None = None
    weight: Tensor | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy.dim() != 2 or self.policy.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"policy errors must be float32 or float64 of shape (P, K), got {self.policy.dtype} "
                             f"{tuple(self.policy.shape)}; take the mean over all latent dimensions in float32, one number per sample")
        if not (math.isfinite(self.kappa) and self.kappa > 0):
            raise ValueError(f"kappa must be a finite number > 0, got {self.kappa}; to prefer the rejected sample use the loss 'npo'")
        for name in ("reference", "old", "reward", "label", "from_reference"):
            self._check_constant(name, self.policy.shape)
        self._check_constant("weight", self.policy.shape[:1])

    def _check_constant(self, name: str, shape: torch.Size) -> None:
        value: Tensor | None = getattr(self, name)
        if value is None:
            return
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} like the policy errors, got {tuple(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name} is a constant of the loss but carries gradient; compute it under torch.no_grad() or detach it")

    @property
    def num_candidates(self) -> int:
        """K."""
        return self.policy.shape[1]

    @property
    def delta(self) -> Tensor:
        """``e_reference - e_policy`` (P, K)."""
        if self.reference is None:
            raise ValueError("this loss compares with the reference but LossInput.reference is None; "
                             "declare reference=True and compute the reference's errors")
        return self.reference - self.policy

    @property
    def u(self) -> Tensor:
        """Implicit rewards ``kappa delta`` (P, K)."""
        return self.kappa * self.delta

    @property
    def margin(self) -> Tensor:
        """``u_w - u_l`` (P,)."""
        if self.num_candidates != 2:
            raise ValueError(f"a margin needs pairs, (P, 2); got groups of {self.num_candidates}")
        u = self.u
        return u[:, 0] - u[:, 1]

    def given(self, name: Literal["reference", "old", "reward", "label", "from_reference"]) -> Tensor:
        """The optional input ``name``.

        Raises:
            ValueError: it is ``None``.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs LossInput.{name}, which is None; {_HOW_TO_GIVE[name]}")
        return value


_HOW_TO_GIVE: Mapping[str, str] = {
    "reference": "compute the reference's errors on the same noised samples, without gradient",
    "old": "compute the errors of the previous round's policy on the same noised samples, without gradient",
    "reward": "score the samples, or choose a loss that reads the order alone (dpo, plackett_luce)",
    "label": "give +1 for good and -1 for bad samples",
    "from_reference": "mark the candidates that the reference generated",
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
    """

    group: Group
    reference: bool = True
    old: bool = False
    reward: bool = False
    from_reference: bool = False
    shared_noise: bool = True
    statistics: tuple[str, ...] = ()

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
    """
    needs = LossNeeds(group, reference, old, reward, from_reference, shared_noise, statistics)

    def declare(function: Callable[Concatenate[LossInput, Params], Tensor]) -> PreferenceLoss[Params]:
        hints = get_type_hints(function, include_extras=True)
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
            raise ValueError(f"the loss '{name}' needs LossInput.{key}, got None; {_HOW_TO_GIVE[key]}")
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
