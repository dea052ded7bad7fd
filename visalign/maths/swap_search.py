"""DRAGON's demonstration sets: split pairs of samples into D+ and D- so that the *set* D+ has a high reward.

    each prompt gives one sample to D+ and one to D-; starting from one of the two halves, exchange the samples of one prompt
    whenever that raises r(D+), prompt by prompt, until a sweep changes nothing

A distributional reward cannot rank the two samples of a prompt: what is better depends on the rest of the set. Source: DRAGON,
arXiv:2504.15217; the start, the order, the tolerance and the number of sweeps are choices made here, so that every process finds
the same sets. The greedy search fits estimator noise on small sets: pool many prompts, or earlier samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visalign.maths.set_objectives import SetObjective, State

IMPROVEMENT = 1e-12


@dataclass(frozen=True)
class SwapResult:
    """What the search found.

    Attributes:
        first_is_positive: bool (n,), whether pair i gave its first sample to D+.
        value: r(D+) at the end.
        start: r(D+) before any swap.
        swaps: the accepted swaps in order, pair numbers from 0.
        sweeps: passes over all pairs, the last one without a change if fewer than allowed.
    """

    first_is_positive: Tensor
    value: float
    start: float
    swaps: tuple[int, ...]
    sweeps: int


def swap_search(first: Tensor, second: Tensor, objective: SetObjective[State], *, sweeps: int = 2,
                start: Literal["better", "first"] = "better", order: Sequence[int] | None = None) -> SwapResult:
    """Coordinate ascent on r(D+) over the 2^n ways of taking one sample of each pair.

    A swap is kept if it raises r(D+) by more than 1e-12. D+ and D- always have n members each: distances from few samples are
    biased, only sets of equal size compare.

    Args:
        first, second: features of the pairs' two samples, (n, d) each.
        sweeps: most passes over all pairs; the search ends earlier when one changes nothing.
        start: initial D+: whichever of the two halves has the higher reward (the first on a tie), or ``first``.
        order: in which the pairs are visited, a permutation of 0 .. n - 1; ``None`` is ascending.
    Raises:
        ValueError: the halves differ in shape or are empty, no sweep is allowed, or ``order`` is no permutation.
    """
    if first.shape != second.shape or first.dim() != 2 or not len(first):
        raise ValueError(f"D1 is {tuple(first.shape)} and D2 {tuple(second.shape)}; expected two features per prompt, (n, d) each: "
                         "only sets of equal size compare")
    if sweeps < 1:
        raise ValueError(f"sweeps {sweeps} must be at least 1")
    visit = list(range(len(first))) if order is None else list(order)
    if sorted(visit) != list(range(len(first))):
        raise ValueError(f"order must be a permutation of 0 .. {len(first) - 1}, got {visit[:20]}")

    state, is_first = objective.state(first), True
    value = objective.value(state)
    if start == "better":
        other = objective.state(second)
        other_value = objective.value(other)
        if other_value > value:
            state, value, is_first = other, other_value, False
    initial = value
    positive = torch.full((len(first),), is_first)
    swaps: list[int] = []
    done, before = 0, -1
    while done < sweeps and len(swaps) > before:
        done, before = done + 1, len(swaps)
        for i in visit:
            leave, enter = (first[i], second[i]) if positive[i] else (second[i], first[i])
            candidate = objective.swap(state, leave, enter)
            candidate_value = objective.value(candidate)
            if candidate_value > value + IMPROVEMENT:
                state, value = candidate, candidate_value
                positive[i] = ~positive[i]
                swaps.append(i)
    return SwapResult(first_is_positive=positive, value=value, start=initial, swaps=tuple(swaps), sweeps=done)


def leave_one_out(features: Tensor, objective: SetObjective[State]) -> Tensor:
    """``r(D) - r(D without i)``, float64 (n,): positive where a member helps its set.

    A weight for samples, not a rule for D+ and D-. Costs n evaluations of the reward.
    """
    state = objective.state(features)
    value = objective.value(state)
    return torch.tensor([value - objective.value(objective.remove(state, feature)) for feature in features], dtype=torch.float64)
