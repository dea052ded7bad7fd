"""How a sampler moves from one noise level to the next, and which of its steps are stochastic.

Every step is three scalars, ``x_next = A x0_pred + B x1_pred + std noise``. They are written once, for a rectified flow from
``s`` to ``s' = s - h``; any other process is a rescaled flow (``c = alpha + sigma``, ``s = sigma / c``), so its scalars are those
of the flow times ``c'``. This is how flow-matching samplers work on VP and EDM models too.

    ODE        A = alpha'   B = sigma'                          std = 0
    SDE (g)    A = alpha'   B = sigma' - c' g^2 h / (2 s)       std = c' g sqrt(h)
    CPS        A = alpha'   B = sigma' cos(eta pi / 2)          std = sigma' sin(eta pi / 2)
    DDIM       A = alpha'   B = sqrt(sigma'^2 - std^2)          std = eta sigma'/sigma sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2)

All A equal alpha': no sampler changes the signal level, they differ in how much of the noise is fresh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from visalign.maths.process import FlowCoordinates, flow_coordinates
from visalign.maths.seeds import derive_seed
from visalign.protocols import Dynamics
from visalign.types import NoiseLevel, Transition


@dataclass(frozen=True)
class ODE:
    """The probability-flow ODE, one Euler step in flow coordinates (DDIM with eta = 0). Any direction: inversion uses it too."""

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """``(alpha', sigma', 0)``.

        Raises:
            ValueError: ``index`` is not a step of ``levels``.
        """
        _check_index(levels, index)
        return Transition(A=float(levels[index + 1].alpha), B=float(levels[index + 1].sigma), std=0.0)


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's marginal-preserving SDE, ``g = noise sqrt(s / (1 - s))``.

    Attributes:
        noise: the paper's ``a``; 0 gives the ODE, sqrt(2) makes the path memoryless (arXiv:2409.08861).
        guard: keeps ``g`` finite at s = 1, where ``1 - s`` becomes ``1 - min(s, guard)``. "next" takes the schedule's second
            level; then the first step has ``std = noise`` and ``c_x = 1 - noise^2 / 2`` on every schedule that starts at 1.
            A number, such as 0.98, is a fixed ceiling.
    Source: Flow-GRPO, arXiv:2505.05470.
    """

    noise: float = 0.7
    guard: Literal["next"] | float = "next"

    def __post_init__(self) -> None:
        _check_range(self, "noise", self.noise, 0.0, math.inf)
        if self.guard != "next" and not (isinstance(self.guard, int | float) and 0 < self.guard < 1):
            raise ValueError(f"FlowSDE.guard must be 'next' or a number between 0 and 1 (exclusive), got {self.guard!r}")

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """Scalars of step ``index``; see the module's table.

        Raises:
            ValueError: the levels do not descend, or the step is so large that the coefficient of ``x`` would be negative.
        """
        if _is_last(levels, index):
            return ODE().transition(levels, index)
        here, there = _flow_step(levels, index)
        # A minimum, not a test for s == 1: schedules that start at 0.9999 would otherwise get g = noise * 100.
        ceiling = flow_coordinates(levels[1]).s if self.guard == "next" else float(self.guard)
        g = self.noise * math.sqrt(here.s / (1 - min(here.s, ceiling)))
        hint = ", or set guard='next'" if self.guard != "next" and here.s > ceiling else ""
        return _sde(levels, index, here, there, g, repr(self), hint)


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's marginal-preserving SDE, constant ``g = eta``: small noise at every level, regular at s = 1.

    Source: DanceGRPO, arXiv:2505.07818.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        _check_range(self, "eta", self.eta, 0.0, math.inf)

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """Scalars of step ``index``; see the module's table. Raises as :meth:`FlowSDE.transition`."""
        if _is_last(levels, index):
            return ODE().transition(levels, index)
        here, there = _flow_step(levels, index)
        return _sde(levels, index, here, there, self.eta, repr(self), hint="")


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling: rotate part of the predicted noise into fresh noise, ``B^2 + std^2 = sigma'^2``.

    The noise of a step does not shrink with the step, so the same ``eta`` at another number of steps is another sampler.
    Source: CPS, arXiv:2509.05952.
    """

    eta: float = 0.8

    def __post_init__(self) -> None:
        _check_range(self, "eta", self.eta, 0.0, 1.0)

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """Scalars of step ``index``; see the module's table.

        Raises:
            ValueError: the levels do not descend.
        """
        if _is_last(levels, index) or self.eta == 0:
            return ODE().transition(levels, index)
        _flow_step(levels, index)
        angle, after = self.eta * math.pi / 2, levels[index + 1]
        return Transition(A=float(after.alpha), B=after.sigma * math.cos(angle), std=after.sigma * math.sin(angle))


@dataclass(frozen=True)
class DDIM:
    """DDIM with stochasticity ``eta``: DDPM's posterior at 1 for VP models, ancestral Euler for sigma-space (alpha = 1) models.

    Source: DDIM, arXiv:2010.02502, eq. 12 and 16; used for RL by DDPO, arXiv:2305.13301.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self, "eta", self.eta, 0.0, 1.0)

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """Scalars of step ``index``; see the module's table.

        Raises:
            ValueError: the levels do not descend.
        """
        if _is_last(levels, index) or self.eta == 0:
            return ODE().transition(levels, index)
        _flow_step(levels, index)
        now, after = levels[index], levels[index + 1]
        kept = now.alpha / after.alpha * after.sigma
        std = self.eta * after.sigma / now.sigma * math.sqrt(now.sigma**2 - kept**2)
        return Transition(A=float(after.alpha), B=math.sqrt(max(after.sigma**2 - std**2, 0.0)), std=std)


@dataclass(frozen=True)
class Mixed:
    """``dynamics`` on the given steps, the ODE on all others (MixGRPO, Flow-GRPO-Fast).

    Attributes:
        dynamics: what the selected steps follow.
        steps: their indices, from a :class:`StepSelection`.
    Source: MixGRPO, arXiv:2507.21802.
    """

    dynamics: Dynamics
    steps: tuple[int, ...]

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """Scalars of step ``index``. Raises as the two dynamics do."""
        return (self.dynamics if index in self.steps else ODE()).transition(levels, index)


class StepSelection(Protocol):
    """Which steps of a sampler are stochastic, and therefore trained."""

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        """Ascending indices in ``0 .. num_steps - 2``; the last step never. A pure function: the same on every rank."""


@dataclass(frozen=True)
class NoSteps:
    """Nothing is stochastic and nothing is stored: for algorithms that learn from clean samples."""

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class AllSteps:
    """Every step but the last."""

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        return tuple(range(_num_trainable(num_steps)))


@dataclass(frozen=True)
class Window:
    """Steps ``start .. end - 1``, the same in every iteration."""

    start: int
    end: int

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        start, end = _check_window(self, self.start, self.end, num_steps)
        return tuple(range(start, end))


@dataclass(frozen=True)
class RandomWindow:
    """``size`` consecutive steps inside ``start .. end - 1``, drawn anew per iteration. Source: Flow-GRPO-Fast, arXiv:2505.05470.

    Attributes:
        size: number of stochastic steps.
        start, end: where the window may lie, ``end`` exclusive; ``None`` means up to the last trainable step.
    """

    size: int
    start: int = 0
    end: int | None = None

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        start, end = _check_window(self, self.start, self.end, num_steps, self.size)
        first = start + derive_seed(seed, iteration) % (end - start - self.size + 1)
        return tuple(range(first, first + self.size))


@dataclass(frozen=True)
class SingleStep:
    """One stochastic step: ``index``, or with ``None`` a random one per iteration. Source: TempFlow-GRPO, arXiv:2508.04324."""

    index: int | None = None

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        if self.index is None:
            return RandomWindow(size=1).select(num_steps, iteration, seed)
        _check_window(self, self.index, self.index + 1, num_steps)
        return (self.index,)


@dataclass(frozen=True)
class ProgressiveWindow:
    """MixGRPO's window: ``size`` steps that move from noise to data as training goes on, then start over.

    Positions are 0, ``stride``, ``2 stride``, ... and always the one that ends at the last trainable step T - 2, which
    the published code never trains. A position ``l`` lasts

        progressive   interval iterations
        decay         interval -> final_interval, linear in l / (T - 2)
        exp_decay     ceil(interval exp(-decay_rate max(0, l - decay_start)))
        random        interval iterations, then l is drawn anew from all positions (stride does not apply)

    Source: MixGRPO, arXiv:2507.21802.
    """

    size: int = 4
    interval: int = 25
    stride: int = 1
    strategy: Literal["progressive", "random", "decay", "exp_decay"] = "progressive"
    final_interval: int = 1
    decay_rate: float = 0.1
    decay_start: int = 13

    def __post_init__(self) -> None:
        for name in ("size", "interval", "stride", "final_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"ProgressiveWindow.{name} must be at least 1, got {getattr(self, name)}")
        if self.strategy not in ("progressive", "random", "decay", "exp_decay"):
            raise ValueError(f"unknown ProgressiveWindow.strategy {self.strategy!r}; use progressive, random, decay or exp_decay")

    def select(self, num_steps: int, iteration: int, seed: int) -> tuple[int, ...]:
        _, end = _check_window(self, 0, None, num_steps, self.size)
        last = end - self.size
        if self.strategy == "random":
            first = derive_seed(seed, iteration // self.interval) % (last + 1)
            return tuple(range(first, first + self.size))
        positions = [*range(0, last, self.stride), last]
        durations = [self._duration(position, num_steps) for position in positions]
        remaining = iteration % sum(durations)
        for position, duration in zip(positions, durations, strict=True):
            if remaining < duration:
                return tuple(range(position, position + self.size))
            remaining -= duration
        raise AssertionError("unreachable: the remainder is below the sum of the durations")

    def _duration(self, position: int, num_steps: int) -> int:
        if self.strategy == "decay":
            return max(1, round(self.interval + (self.final_interval - self.interval) * position / max(num_steps - 2, 1)))
        if self.strategy == "exp_decay":
            return math.ceil(self.interval * math.exp(-self.decay_rate * max(0, position - self.decay_start)))
        return self.interval


DYNAMICS: Mapping[str, type[Any]] = {"ode": ODE, "flow_sde": FlowSDE, "dance_sde": DanceSDE, "cps": CPS, "ddim": DDIM}
STEP_SELECTIONS: Mapping[str, type[Any]] = {
    "none": NoSteps,
    "all": AllSteps,
    "window": Window,
    "random_window": RandomWindow,
    "single": SingleStep,
    "progressive_window": ProgressiveWindow,
}


def build_dynamics(name: str, **params: Any) -> Dynamics:
    """The dynamics called ``name`` in :data:`DYNAMICS`, e.g. ``build_dynamics("flow_sde", noise=0.7)``.

    Raises:
        ValueError: an unknown name or parameter, or a value out of range.
    """
    return _build("dynamics", DYNAMICS, name, params)


def build_selection(name: str, **params: Any) -> StepSelection:
    """The step selection called ``name`` in :data:`STEP_SELECTIONS`, e.g. ``build_selection("window", start=0, end=3)``.

    Raises:
        ValueError: an unknown name, an unknown or missing parameter, or a value out of range.
    """
    return _build("step selection", STEP_SELECTIONS, name, params)


def _build(what: str, registry: Mapping[str, type[Any]], name: str, params: Mapping[str, Any]) -> Any:
    if name not in registry:
        raise ValueError(f"unknown {what} {name!r}; use one of {', '.join(registry)}")
    known = [f.name for f in fields(registry[name])]
    unknown = [param for param in params if param not in known]
    if unknown:
        raise ValueError(f"{what} {name!r} has no parameter {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
    try:
        return registry[name](**params)
    except TypeError as error:
        raise ValueError(f"{what} {name!r} takes {', '.join(known)}; got {dict(params)}: {error}") from error


def _sde(
    levels: Sequence[NoiseLevel], index: int, here: FlowCoordinates, there: FlowCoordinates, g: float, who: str, hint: str
) -> Transition:
    h = here.s - there.s
    drift = g * g * h / (2 * here.s)
    # One ulp of slack: noise = sqrt(2) puts the first step's coefficient of x at exactly 0.
    if drift > 1 + 1e-12:
        raise ValueError(
            f"{who} overshoots at step {index} (s {here.s:.4g} -> {there.s:.4g}): the coefficient of x, 1 - g^2 h / (2 s), is "
            f"{1 - drift:.3g}; scale its noise by at most {drift**-0.5:.3g}, use more steps, make this step deterministic{hint}"
        )
    after = levels[index + 1]
    return Transition(A=float(after.alpha), B=after.sigma - there.scale * drift, std=there.scale * g * math.sqrt(h))


def _flow_step(levels: Sequence[NoiseLevel], index: int) -> tuple[FlowCoordinates, FlowCoordinates]:
    here, there = flow_coordinates(levels[index]), flow_coordinates(levels[index + 1])
    if not there.s < here.s:
        raise ValueError(
            f"step {index} does not reduce the noise (s = sigma / (alpha + sigma) goes from {here.s:.6g} to {there.s:.6g}); "
            "stochastic dynamics need strictly descending levels: remove duplicated timesteps or use ODE"
        )
    return here, there


def _is_last(levels: Sequence[NoiseLevel], index: int) -> bool:
    _check_index(levels, index)
    return index == len(levels) - 2


def _check_index(levels: Sequence[NoiseLevel], index: int) -> None:
    if not 0 <= index < len(levels) - 1:
        raise ValueError(f"step {index} does not exist: {len(levels)} levels have the steps 0 to {len(levels) - 2}")


def _check_range(owner: object, name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        allowed = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"a finite number >= {low:g}"
        raise ValueError(f"{type(owner).__name__}.{name} must be {allowed}, got {value}")


def _num_trainable(num_steps: int) -> int:
    if num_steps < 2:
        raise ValueError(f"{num_steps} sampler steps leave none to train: the last step is always deterministic; use at least 2")
    return num_steps - 1


def _check_window(owner: object, start: int, end: int | None, num_steps: int, size: int = 1) -> tuple[int, int]:
    trainable = _num_trainable(num_steps)
    end = trainable if end is None else end
    if size < 1 or start < 0 or end > trainable or end - start < size:
        raise ValueError(
            f"{owner} does not fit {num_steps} sampler steps: it needs 0 <= start, start + size <= end and end <= {trainable} "
            f"(the last step is always deterministic), got start {start}, end {end}, size {size}"
        )
    return start, end
