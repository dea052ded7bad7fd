"""Rewards of a whole set of features, larger is better, that follow a change of one member without starting over.

    FrechetObjective     -FD(set, reference)                 O(d^2) per exchange, O(d^3) per value
    KernelObjective      -scale MMD^2_u(set, reference)      O((n + m) d) per exchange, O(1) per value
    VendiObjective       VS_q(set)                           O(d^2) per exchange, O(d^3) per value

A set is its own members and those of a memory, which never change: statistics of a small set are mostly noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from visalign.maths.diversity import spectral_diversity, unit_rows
from visalign.maths.frechet import Gaussian, Moments, frechet_distance
from visalign.maths.influence import member_sums
from visalign.maths.mmd import KernelReference, KernelSet, KernelSums, kernel_sums

State = TypeVar("State")


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
class KernelState:
    """The members themselves, without the memory, (n, d), and the kernel sums of set and memory."""

    members: Tensor
    sums: KernelSums


class KernelObjective:
    """``-scale MMD^2_u(set and memory, reference)``: a kernel row per exchange, O((n + m) d) with n exemplars and m members."""

    def __init__(self, reference: KernelReference, memory: Tensor | None = None, scale: float = 1.0) -> None:
        """
        Args:
            reference: the exemplars and the kernel.
            memory: earlier features, counted into every set.
            scale: of the published metric.
        """
        self.reference = reference
        self.memory = None if memory is None or not len(memory) else KernelSet(memory, reference)
        self.scale = scale

    def state(self, features: Tensor) -> KernelState:
        return KernelState(features, member_sums(features, self.reference, self.memory).whole)

    def swap(self, state: KernelState, leave: Tensor, enter: Tensor) -> KernelState:
        row = self._row(state, leave)
        others = torch.cat([state.members[:row], state.members[row + 1:]])
        change = self._change(others, enter) - self._change(others, leave)
        members = state.members.clone()
        members[row] = enter
        return KernelState(members, self._moved(state.sums, state.sums.count, change))

    def remove(self, state: KernelState, leave: Tensor) -> KernelState:
        row = self._row(state, leave)
        others = torch.cat([state.members[:row], state.members[row + 1:]])
        return KernelState(others, self._moved(state.sums, state.sums.count - 1, -self._change(others, leave)))

    def value(self, state: KernelState) -> float:
        return -self.scale * state.sums.mmd2(self.reference)

    def _change(self, others: Tensor, feature: Tensor) -> Tensor:
        """What a feature beside the others adds to ``pairs`` and to ``attraction``, (2,)."""
        one, kernel = feature[None], self.reference.kernel
        pairs = kernel_sums(one, others, kernel) + (0 if self.memory is None else kernel_sums(one, self.memory.features, kernel))
        return torch.cat([2 * pairs, self.reference.attraction(one)])

    @staticmethod
    def _moved(sums: KernelSums, count: int, change: Tensor) -> KernelSums:
        return KernelSums(count, sums.pairs + float(change[0]), sums.attraction + float(change[1]))

    @staticmethod
    def _row(state: KernelState, leave: Tensor) -> int:
        found = (state.members == leave).all(dim=1).nonzero()
        if not len(found):
            raise ValueError("the feature that is to leave is no member of the set")
        return int(found[0])


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
