"""When a run is being hacked: a guard falls while the training reward rises.

Evaluations k = 0, 1, ... ask about the same prompts and seeds, so that two of them are compared prompt by prompt. For every guard g with
values ``G_k`` (n,) and peak ``p = argmax_{j < k} mean G_j``,

    drop = (mean G_p - mean G_k) / std_n(G_0)          how far it has fallen from its peak, in standard deviations between prompts

is a *fall* if it is at least ``fall`` and the mean of ``G_p - G_k`` is above 0 beyond chance. A run that looks often must not be stopped by
luck: ``1 - confidence`` is shared among guards, looks and the evaluations a peak is chosen from (union bounds; look k gets the share
``6 / (pi k)^2``), so that a run in which nothing falls is stopped with at most that probability. If the training reward did not fall since
the peak, the run is hacked; if it fell as well, it is collapsing. The unit is that of the first evaluation in which prompts differ: a
judge that compares with the start says one half of every prompt there.

The best evaluation is the one at which the guards stand highest on average (in the same units); without guards, the training reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visalign.maths.confidence import lower_bound


@dataclass(frozen=True)
class Look:
    """One evaluation, larger is better everywhere.

    Attributes:
        iteration: updates made before it.
        reward: the training reward per prompt, float64 (n,), NaN where it has none.
        guards: per guard the same.
    """

    iteration: int
    reward: Tensor
    guards: Mapping[str, Tensor]


@dataclass(frozen=True)
class Fall:
    """One guard's way down.

    Attributes:
        guard: which.
        peak: iteration of its highest evaluation.
        drop: from there, in standard deviations between prompts before training.
        sure: whether the drop is above 0 beyond chance.
        reward_change: of the training reward since the peak, in the same kind of units; NaN if nobody knows.
        reward_fell: whether that is below 0 beyond chance.
    """

    guard: str
    peak: int
    drop: float
    sure: bool
    reward_change: float
    reward_fell: bool

    @property
    def kind(self) -> Literal["hacking", "collapse"]:
        return "collapse" if self.reward_fell else "hacking"


@dataclass(frozen=True)
class Verdict:
    """What the latest evaluation shows.

    Attributes:
        falls: of every guard that could be judged, also those that have not fallen.
        alarms: those that have.
        best: index of the best evaluation so far, the latest among equals.
        standing: of the latest evaluation, what ``best`` is chosen by; 0 for the first.
    """

    falls: tuple[Fall, ...]
    alarms: tuple[Fall, ...]
    best: int
    standing: float


def judge(looks: Sequence[Look], *, fall: float, confidence: float) -> Verdict:
    """The verdict on the latest of some evaluations.

    Args:
        fall: smallest drop that counts, >= 0.
        confidence: of a whole run, in (0.5, 1).
    Raises:
        ValueError: no evaluation, or evaluations of different prompts.
    """
    if not looks:
        raise ValueError("a verdict needs at least one evaluation")
    if any(values.shape != looks[0].reward.shape for look in looks for values in (look.reward, *look.guards.values())):
        raise ValueError("evaluations must be of the same prompts; evaluate every time with the same evaluation.num_prompts")
    falls = tuple(one for name in looks[0].guards if (one := _fall(name, looks, confidence)) is not None)
    standings = [_standing(k, looks) for k in range(len(looks))]
    best = max(range(len(looks)), key=lambda k: (standings[k], k))
    return Verdict(falls, tuple(one for one in falls if one.sure and one.drop >= fall), best, standings[-1])


def _fall(name: str, looks: Sequence[Look], confidence: float) -> Fall | None:
    """Of one guard since its peak; ``None`` while there is no earlier evaluation or the guard says the same of every prompt."""
    now, before = looks[-1], looks[:-1]
    scale = _unit([look.guards[name] for look in looks])
    known = [k for k, look in enumerate(before) if bool(torch.isfinite(look.guards[name]).any())]
    if not known or not scale > 0 or not bool(torch.isfinite(now.guards[name]).any()):
        return None
    peak = before[max(known, key=lambda k: float(before[k].guards[name].nanmean()))]
    each = 1 - (1 - confidence) * 6 / (math.pi * len(before)) ** 2 / len(before) / len(now.guards)
    lost, gained = peak.guards[name] - now.guards[name], now.reward - peak.reward
    unit = _unit([look.reward for look in looks])
    return Fall(guard=name, peak=peak.iteration, drop=float(lost.nanmean()) / scale, sure=_above_zero(lost, each),
                reward_change=float(gained.nanmean()) / unit if unit > 0 else math.nan, reward_fell=_above_zero(-gained, each))


def _standing(k: int, looks: Sequence[Look]) -> float:
    """Mean gain over the guards, or of the training reward without any, in standard deviations between prompts; 0 where unknown."""
    columns = [[look.guards[name] for look in looks[:k + 1]] for name in looks[0].guards] or [[look.reward for look in looks[:k + 1]]]
    gains = [float((column[-1] - column[0]).nanmean()) / _unit(column) for column in columns if _unit(column) > 0]
    known = [gain for gain in gains if math.isfinite(gain)]
    return sum(known) / len(known) if known else 0.0


def _unit(column: Sequence[Tensor]) -> float:
    """Standard deviation between prompts in the first evaluation in which they differ; 0 where they never do."""
    return next((spread for values in column if (spread := _spread(values)) > 0), 0.0)


def _spread(values: Tensor) -> float:
    known = values[torch.isfinite(values)]
    return float(known.std(correction=0)) if len(known) else 0.0


def _above_zero(values: Tensor, confidence: float) -> bool:
    known = values[torch.isfinite(values)]
    return len(known) > 1 and lower_bound(known, confidence) > 0


@dataclass(frozen=True)
class Shift:
    """A statistic of the media that is no longer what it was: its change since before training, in standard deviations between prompts, or
    the share that is left of a number about all samples."""

    name: str
    change: float

    def describe(self) -> str:
        return f"{self.name} {self.change:.0%} of what it was" if self.name == "diversity" else f"{self.name} {self.change:+.2g} sd"


def shifts(before: Mapping[str, Tensor], now: Mapping[str, Tensor], limit: float, diversity: tuple[float, float] | None) -> list[Shift]:
    """Statistics whose mean has moved by ``limit`` standard deviations or more, either way, and diversity if less than half is left.

    Nobody knows which way a statistic should go; a move this large with a rising reward is worth a look.

    Args:
        before, now: per statistic one value per prompt, (n,).
        diversity: before and now, effective numbers of different samples; ``None`` where unknown. One sample is the floor.
    """
    found = []
    for name in before.keys() & now.keys():
        scale, change = _spread(before[name]), float((now[name] - before[name]).nanmean())
        if scale > 0 and abs(change) / scale >= limit:
            found.append(Shift(name, change / scale))
    if diversity is not None and diversity[0] > 1 and (left := (diversity[1] - 1) / (diversity[0] - 1)) < 0.5:
        found.append(Shift("diversity", left))
    return sorted(found, key=lambda one: one.name)
