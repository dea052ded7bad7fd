"""Every noise level a denoiser was trained on, by the scheduler's own timestep.

A sampling schedule visits a few levels; losses on noised data need all of them. The map is read from the scheduler's tables and proved on
the levels of the captured schedule:

    flow     sigma = t / N                                alpha = 1 - sigma
    VP       bar = alphas_cumprod[t]                      alpha = sqrt(bar), sigma = sqrt(1 - bar)
    sigma    the same table with alpha = 1, or one of the published formulas: exp(4 t) (EDM), tan(pi t / 2) (cosine EDM), t
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.samplers.observe import CaptureError
from visalign.samplers.schedule import ScheduleFit
from visalign.types import NoiseLevel, PredictionKind

# Schedulers round flow timesteps to whole numbers, 1 / N of the range, and interpolate tables in float32.
TOLERANCE = 2e-3
_FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "exp(4 t)": (lambda t: (4 * t).exp(), lambda sigma: math.log(sigma) / 4),
    "tan(pi t / 2)": (lambda t: (t * math.pi / 2).tan(), lambda sigma: math.atan(sigma) * 2 / math.pi),
    "t": (lambda t: t, lambda sigma: sigma),
}


@dataclass(frozen=True)
class SchedulerTimes:
    """``protocols.TrainingTimes`` of a captured scheduler.

    Attributes:
        kind, sigma_data: the network's own prediction kind.
        process: "flow", "VP" or "sigma" (alpha = 1).
        low, high: first and last timestep of the training range.
        whole: timesteps are entries of a table of 1000 or so.
    """

    kind: PredictionKind
    sigma_data: float
    process: str
    low: float
    high: float
    whole: bool
    ratio: Callable[[Tensor], Tensor]

    def level(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma``, float64 (B,) each.

        Raises:
            ValueError: a timestep lies outside the training range.
        """
        t = timesteps.detach().to("cpu", torch.float64)
        if bool((t < self.low - 1e-6).any() or (t > self.high + 1e-6).any()):
            raise ValueError(f"timesteps {float(t.min()):.6g}..{float(t.max()):.6g} leave the training range "
                             f"{self.low:.6g}..{self.high:.6g}")
        ratio = self.ratio(t)  # sigma / alpha, or sigma itself for flow
        if self.process == "flow":
            return 1 - ratio, ratio
        if self.process == "sigma":
            return torch.ones_like(ratio), ratio
        alpha = (1 + ratio * ratio).rsqrt()
        return alpha, torch.where(torch.isinf(ratio), 1.0, ratio * alpha)

    def timestep(self, fraction: Tensor) -> Tensor:
        """The scheduler's timestep at a fraction of the training range, float64 (B,); tables are entered at ``floor(fraction N)``."""
        u = fraction.to(torch.float64)
        if self.whole:
            return (u * (self.high + 1)).floor().clamp(self.low, self.high)
        return self.low + u * (self.high - self.low)


def fit_times(scheduler: Any, fit: ScheduleFit) -> SchedulerTimes:
    """The training range behind a captured schedule.

    Raises:
        CaptureError: no known map from timesteps to levels reproduces the levels the schedule visits.
    """
    config, tried = scheduler.config, []
    known: list[tuple[str, float, float, bool, Callable[[Tensor], Tensor]]] = []
    count = int(config.get("num_train_timesteps") or 1000)
    if fit.process == "flow":
        known.append((f"t / {count}", 0.0, float(count), False, lambda t: t / count))
        known.append(("t", 0.0, 1.0, False, lambda t: t))
    else:
        bars = getattr(scheduler, "alphas_cumprod", None)
        if isinstance(bars, Tensor):
            known.append(("alphas_cumprod", 0.0, float(len(bars) - 1), True, _Table.of(bars)))
        low, high = (config.get(name) for name in ("sigma_min", "sigma_max"))
        if low and high:
            known += [(name, inverse(low), inverse(high), False, formula) for name, (formula, inverse) in _FORMULAS.items()]
    for name, low, high, whole, ratio in known:
        times = SchedulerTimes(fit.kind, fit.sigma_data, fit.process, low, high, whole, ratio)
        error = _error(times, fit.schedule.timesteps, fit.schedule.levels)
        if error < TOLERANCE:
            return times
        tried.append(f"{name} off by {error:.2g}")
    raise CaptureError(
        f"{type(scheduler).__name__}: which noise level belongs to a timestep between those of its schedule is not known "
        f"({'; '.join(tried) or 'no table, no sigma_min and sigma_max'}), and losses on noised data need it. Use a scheduler of the same "
        "model with alphas_cumprod or a flow schedule, or an algorithm that trains on the sampler's own steps (grpo)"
    )


@dataclass(frozen=True)
class _Table:
    """``sigma / alpha`` by timestep: exact at whole timesteps, log-linear between them."""

    log_ratio: Tensor

    @staticmethod
    def of(bars: Tensor) -> _Table:
        bars = bars.detach().to("cpu", torch.float64)
        return _Table(0.5 * ((1 - bars).log() - bars.log()))

    def __call__(self, t: Tensor) -> Tensor:
        below = t.floor().clamp(0, len(self.log_ratio) - 1).long()
        above = (below + 1).clamp(max=len(self.log_ratio) - 1)
        part = t - below
        between = torch.where(part > 0, (1 - part) * self.log_ratio[below] + part * self.log_ratio[above], self.log_ratio[below])
        return between.exp()


def _error(times: SchedulerTimes, timesteps: Sequence[float], levels: Sequence[NoiseLevel]) -> float:
    """Largest deviation from the captured levels, in units where signal plus noise is 1."""
    t = torch.tensor(timesteps, dtype=torch.float64)
    if bool((t < times.low - 1e-6).any() or (t > times.high + 1e-6).any()):
        return math.inf
    alpha, sigma = times.level(t)
    wanted = torch.tensor([[level.alpha, level.sigma] for level in levels[: len(timesteps)]], dtype=torch.float64)
    share = sigma / (alpha + sigma)
    return float((share - wanted[:, 1] / wanted.sum(dim=1)).abs().max())
