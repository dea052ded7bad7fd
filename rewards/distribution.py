"""The Fréchet distance of a set of samples to exemplars (FID, FAD, ... by the choice of encoder), and the Vendi score of the set itself.

Source: FID, arXiv:1706.08500; FAD, arXiv:1812.08466; FAD-infinity, arXiv:2311.01616; Vendi, arXiv:2210.02410.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.maths.diversity import cosine_vendi
from visalign.maths.extrapolation import frechet_at_infinity
from visalign.maths.frechet import Moments, frechet_distance
from visalign.maths.influence import frechet_influence
from visalign.maths.set_objectives import FrechetObjective, VendiObjective
from visalign.protocols import ALL_MEDIA, RewardSpec
from visalign.rewards.exemplars import Exemplars, load_exemplars
from visalign.rewards.memory import Keep
from visalign.rewards.set_level import CreditRule, SetLevelReward, unit_features
from visalign.types import Measurement, Media, MediaKind, Prompt

logger = logging.getLogger(__name__)


class FrechetDistance(SetLevelReward):
    """Minus the Fréchet distance between a set of samples and the exemplars.

    While a set with its memory spans no more dimensions than it has members, credit "influence" is computed as "leave_one_out": there
    every member holds a dimension of its own, and removing it is no small change.
    """

    spec = RewardSpec(name="frechet_distance", arity="set", modality=ALL_MEDIA)

    def __init__(self, encoder: Any, reference: str | Path, *, credit: CreditRule = "membership", memory: int = 0, keep: Keep = "newest",
                 shrinkage: float = 0.0, sweeps: int = 2, modality: Sequence[MediaKind] | None = None, seed: int = 0,
                 name: str = "frechet_distance") -> None:
        """
        Args:
            encoder: see ``rewards.encoders``.
            reference: a folder of media, or a statistics file made with the same encoder (``visalign exemplars``).
            credit: see ``rewards.set_level``.
            memory: how many earlier samples count into every set; samples and memory together should well exceed the encoder's
                dimensions, or the covariance is singular.
            keep: which earlier samples, "newest" or a "reservoir" of all; see ``rewards.memory``.
            shrinkage: added to the diagonal of both covariances.
            sweeps: most passes of the swap search; each costs one O(d^3) distance per prompt (0.05 s at d = 512).
            modality: kinds of media an encoder *function* reads, images by default.
            seed: of the reservoir, and of the subsets that ``measure`` extrapolates from.
        Raises:
            ValueError: the reference is missing, or was made with another encoder.
        """
        if shrinkage < 0:
            raise ValueError(f"shrinkage {shrinkage} must be at least 0")
        super().__init__(name, encoder, modality, credit, sweeps, memory, keep, seed)
        self.exemplars: Exemplars = load_exemplars(reference, self.encoder, "sample")
        self.dims = len(self.exemplars.gaussian.mean)
        self.shrinkage = shrinkage
        self._warned = False

    def objective(self, memory: Tensor | None) -> FrechetObjective:
        """``-FD(set and memory, exemplars)``."""
        return FrechetObjective(self.exemplars.gaussian, None if memory is None else Moments.of(memory), self.shrinkage)

    def influence(self, features: Tensor) -> Tensor:
        moments = self.objective(self.memory.features).state(features)
        if moments.gaussian().factor.shape[1] >= moments.count - 1:
            return self.leave_one_out(features)
        return -frechet_influence(features, moments, self.exemplars.gaussian, self.shrinkage) / (moments.count - 1)

    def measure(self, features: Tensor) -> tuple[Measurement, ...]:
        """FID, FAD or FD, and its extrapolation to infinitely many samples where there are at least four per dimension.

        ``shrinkage`` is a training choice and not in it.
        """
        name = "FAD" if self.encoder.modality == {"audio"} else "FID" if self.encoder.name == "inception" else "FD"
        distance = frechet_distance(Moments.of(features).gaussian(), self.exemplars.gaussian)
        found = [Measurement(name, distance, -1, len(features))]
        if len(features) < 4 * features.shape[1]:
            logger.info("%s-inf needs at least 4 samples per dimension, %d here, and got %d", name, 4 * features.shape[1], len(features))
            return tuple(found)
        line = frechet_at_infinity(features, self.exemplars.gaussian, torch.Generator().manual_seed(self.seed))
        return (*found, Measurement(f"{name}-inf", line.intercept, -1, len(features), r_squared=line.r_squared))

    def credit(self, features: Tensor, group_id: Tensor) -> Tensor:
        dims = len(self.exemplars.gaussian.mean)
        size = len(features) // (2 if self.rule == "membership" else 1) + self.memory.capacity
        if size <= dims and not self._warned:
            self._warned = True
            logger.warning("%s: a set of %d samples cannot fill %d dimensions, the distance is mostly bias; set memory above %d, sample "
                           "more prompts, use an encoder with fewer dimensions, or a kernel distance (kad, kid, cmmd), which is unbiased",
                           self.spec.name, size, dims, 2 * dims)
        return super().credit(features, group_id)


class VendiScore(SetLevelReward):
    """Effective number of different samples in a set, by the cosine of their features; needs no exemplars."""

    rules = ("membership", "leave_one_out")

    spec = RewardSpec(name="vendi", arity="set", modality=ALL_MEDIA)

    def __init__(self, encoder: Any, *, q: float = 1.0, credit: CreditRule = "membership", memory: int = 0, keep: Keep = "newest",
                 sweeps: int = 2, modality: Sequence[MediaKind] | None = None, seed: int = 0, name: str = "vendi") -> None:
        """
        Args:
            encoder, credit, memory, keep, sweeps, modality, seed: as for ``FrechetDistance``; there is no "influence".
            q: order of the entropy; 1 is the usual score, larger orders count the dominant modes.
        """
        if not q > 0:
            raise ValueError(f"order q = {q} must be above 0")
        super().__init__(name, encoder, modality, credit, sweeps, memory, keep, seed)
        self.q = q

    def objective(self, memory: Tensor | None) -> VendiObjective:
        """Vendi score of the set and the memory."""
        return VendiObjective(memory, self.q)

    def measure(self, features: Tensor) -> tuple[Measurement, ...]:
        """The Vendi score, from 1 to n; comparable between sets of one size."""
        name = "Vendi" if self.q == 1 else f"Vendi, q = {self.q:g}"
        return (Measurement(name, cosine_vendi(features, self.q), 1, len(features)),)

    def features(self, media: Sequence[Media], prompts: Sequence[Prompt]) -> Tensor:
        """As in the base, with rows of length 1; a row without a direction becomes NaN."""
        return unit_features(super().features(media, prompts))
