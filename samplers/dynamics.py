"""How a sampler moves from one noise level to the next.

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
from dataclasses import dataclass
from typing import Any, Literal

from visalign.maths.process import FlowCoordinates, flow_coordinates
from visalign.protocols import Dynamics
from visalign.samplers.named import build_named
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
        steps: their indices, from a `visalign.samplers.steps.StepSelection`.
    Source: MixGRPO, arXiv:2507.21802.
    """

    dynamics: Dynamics
    steps: tuple[int, ...]

    def transition(self, levels: Sequence[NoiseLevel], index: int) -> Transition:
        """Scalars of step ``index``. Raises as the two dynamics do."""
        return (self.dynamics if index in self.steps else ODE()).transition(levels, index)


DYNAMICS: Mapping[str, type[Any]] = {"ode": ODE, "flow_sde": FlowSDE, "dance_sde": DanceSDE, "cps": CPS, "ddim": DDIM}


def build_dynamics(name: str, **params: Any) -> Dynamics:
    """The dynamics called ``name`` in :data:`DYNAMICS`, e.g. ``build_dynamics("flow_sde", noise=0.7)``.

    Raises:
        ValueError: an unknown name or parameter, or a value out of range.
    """
    return build_named("dynamics", DYNAMICS, name, params)


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
