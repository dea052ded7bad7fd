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
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from visalign.maths.diversity import spectral_diversity, unit_rows
from visalign.maths.frechet import Gaussian, Moments, frechet_distance

State = TypeVar("State")
IMPROVEMENT = 1e-12


class SetObjective(Protocol[State]):
    """Reward of a set of features, larger is better, that follows the exchange of one member without starting over."""

    def state(self, features: Tensor) -> State:
        """What the reward needs to know of the set (n, d); states are never changed in place."""

    def swap(self, state: State, leave: Tensor, enter: Tensor) -> State:
        """With ``enter`` in the place of its member ``leave``, (d,) each."""

    def remove(self, state: State, leave: Tensor) -> State:
        """Without its member ``leave``, (d,)."""

    def value(self, state: State) -> float:
        """Reward of the set."""


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


class FrechetObjective:
    """``-FD(set and memory, reference)``: O(d^2) per exchange for the moments, O(d^3) for the distance (0.05 s at d = 512)."""

    def __init__(self, reference: Gaussian, memory: Moments | None = None, shrinkage: float = 0.0) -> None:
        """
        Args:
            reference: the exemplars, without shrinkage.
            memory: moments of earlier features, counted into every set: a covariance in d dimensions wants n well above d.
            shrinkage: added to the diagonal of both covariances.
        """
        self.reference = reference.shrunk(shrinkage)
        self.memory = memory
        self.shrinkage = shrinkage

    def state(self, features: Tensor) -> Moments:
        moments = Moments.of(features)
        return moments if self.memory is None else moments.merge(self.memory)

    def swap(self, state: Moments, leave: Tensor, enter: Tensor) -> Moments:
        return state.swap(leave, enter)

    def remove(self, state: Moments, leave: Tensor) -> Moments:
        return state.remove(leave)

    def value(self, state: Moments) -> float:
        return -frechet_distance(state.gaussian(self.shrinkage), self.reference)


@dataclass(frozen=True)
class SecondMoments:
    """``X^T X`` of unit rows, float64 (d, d), and their number."""

    count: int
    products: Tensor


class VendiObjective:
    """Vendi score of the set and its memory under the cosine kernel, through the d x d dual: O(d^2) per exchange, O(d^3) per value.

    Give it rows of length 1 (``unit_rows``).
    """

    def __init__(self, memory: Tensor | None = None, q: float = 1.0) -> None:
        """
        Args:
            memory: earlier features, (m, d), counted into every set.
            q: order of the entropy.
        """
        self.memory = None if memory is None or not len(memory) else unit_rows(memory)
        self.q = q

    def state(self, features: Tensor) -> SecondMoments:
        if not torch.allclose(features.norm(dim=1), torch.ones(len(features), dtype=features.dtype), atol=1e-6, rtol=0):
            raise ValueError("the Vendi score of a set wants rows of length 1; pass unit_rows(features)")
        rows = features if self.memory is None else torch.cat([features, self.memory])
        return SecondMoments(len(rows), rows.T @ rows)

    def swap(self, state: SecondMoments, leave: Tensor, enter: Tensor) -> SecondMoments:
        return SecondMoments(state.count, torch.addr(torch.addr(state.products, enter, enter), leave, leave, alpha=-1))

    def remove(self, state: SecondMoments, leave: Tensor) -> SecondMoments:
        if state.count == 1:
            raise ValueError("cannot remove the only member of a set: the Vendi score of nothing is not defined")
        return SecondMoments(state.count - 1, torch.addr(state.products, leave, leave, alpha=-1))

    def value(self, state: SecondMoments) -> float:
        return spectral_diversity(torch.linalg.eigvalsh(state.products / state.count), self.q)
