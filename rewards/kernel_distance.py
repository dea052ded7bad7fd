"""Kernel distances of a set of samples to exemplars: KID, KAD and CMMD, which small sets do not bias.

    kid     MMD^2_u, k = (x . y / d + 1)^3
    kad     100 MMD^2_u, Gaussian kernel, bandwidth the median distance within the exemplars, frozen with them
    cmmd    1000 MMD^2_u, Gaussian kernel of bandwidth 10 on features of length 1; published with CLIP ViT-L/14 at 336 pixels

All compare with the exemplars' kept features. All are 0 on average where samples and exemplars have one distribution, and may be
negative. CMMD was published with the terms i = j in, which adds (1 / m + 1 / n) 1000 (1 - mean k): numbers of papers from few samples
are larger. On unit features it is nearly 10 |mean - mean|^2: it sees means only.

Sources: KID, arXiv:1801.01401; KAD, arXiv:2502.15602; CMMD, arXiv:2401.09603.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.maths.influence import MemberSums, member_sums, mmd2_influence, mmd2_without_each
from visalign.maths.mmd import (
    GaussianKernel,
    Kernel,
    KernelReference,
    KernelSet,
    PolynomialKernel,
    check_subsets,
    mmd2,
    mmd2_over_subsets,
)
from visalign.maths.set_objectives import KernelObjective
from visalign.protocols import ALL_MEDIA, RewardSpec
from visalign.rewards.exemplars import Exemplars, load_exemplars
from visalign.rewards.memory import Keep
from visalign.rewards.set_level import CreditRule, SetLevelReward, unit_features
from visalign.types import Measurement, Media, MediaKind, Prompt


class KernelDistance(SetLevelReward):
    """Minus a scaled ``MMD^2_u`` between a set of samples and the exemplars."""

    metric: str
    scale: float = 1.0
    unit_rows: bool = False

    def __init__(self, encoder: Any, reference: str | Path, *, credit: CreditRule = "membership", memory: int = 0, keep: Keep = "newest",
                 sweeps: int = 2, modality: Sequence[MediaKind] | None = None, seed: int = 0, name: str | None = None) -> None:
        """
        Args:
            encoder: see ``rewards.encoders``.
            reference: a folder of media, or a statistics file made with the same encoder (``visalign exemplars``).
            credit: see ``rewards.set_level``; "leave_one_out" is exact here and as cheap as "influence".
            memory: how many earlier samples count into every set.
            keep: which earlier samples, "newest" or a "reservoir" of all; see ``rewards.memory``.
            sweeps: most passes of the swap search; each costs one kernel row per prompt.
            modality: kinds of media an encoder *function* reads, images by default.
            seed: of the reservoir.
        Raises:
            ValueError: the reference is missing, was made with another encoder, or keeps no features.
        """
        super().__init__(name or self.metric.lower(), encoder, modality, credit, sweeps, memory, keep, seed)
        exemplars = load_exemplars(reference, self.encoder, "sample")
        rows = exemplars.rows(self.metric)
        self.dims = rows.shape[1]
        self.reference = KernelReference(unit_features(rows) if self.unit_rows else rows, self.kernel(exemplars))

    @abstractmethod
    def kernel(self, exemplars: Exemplars) -> Kernel:
        """The metric's kernel."""

    def objective(self, memory: Tensor | None) -> KernelObjective:
        """``-scale MMD^2_u(set and memory, exemplars)``."""
        return KernelObjective(self.reference, memory, self.scale)

    def features(self, media: Sequence[Media], prompts: Sequence[Prompt]) -> Tensor:
        """As in the base; rows of length 1 where the metric is defined on those."""
        features = super().features(media, prompts)
        return unit_features(features) if self.unit_rows else features

    def value(self, features: Tensor) -> float:
        """Minus the metric of all features; the memory does not count.

        Raises:
            ValueError: fewer than two features, some that are not finite, or not of length 1 where the metric is defined on those.
        """
        self._check_length(features)
        return -self.scale * mmd2(features, self.reference)

    def credit(self, features: Tensor, group_id: Tensor) -> Tensor:
        self._check_length(features)
        return super().credit(features, group_id)

    def leave_one_out(self, features: Tensor) -> Tensor:
        return self.scale * mmd2_without_each(self._sums(features))

    def influence(self, features: Tensor) -> Tensor:
        sums = self._sums(features)
        return -self.scale * mmd2_influence(sums) / (sums.whole.count - 1)

    def measure(self, features: Tensor) -> tuple[Measurement, ...]:
        """The metric on its published scale."""
        return (Measurement(self.metric, -self.value(features), -1, len(features)),)

    def _check_length(self, features: Tensor) -> None:
        length = features.norm(dim=-1)
        if self.unit_rows and not bool(((length - 1).abs() < 1e-6)[torch.isfinite(length)].all()):
            raise ValueError(f"{self.metric} is defined on features of length 1, got lengths up to {float(length.max()):.4g}; take them "
                             "from this reward's features()")

    def _sums(self, features: Tensor) -> MemberSums:
        memory = self.memory.features
        return member_sums(features, self.reference, None if memory is None else KernelSet(memory, self.reference))


class KID(KernelDistance):
    """Kernel distance with KID's polynomial kernel; it is *KID* with Inception features."""

    metric = "KID"
    spec = RewardSpec(name="kid", arity="set", modality=ALL_MEDIA)

    def __init__(self, encoder: Any, reference: str | Path, *, num_subsets: int = 100, subset_size: int = 1000,
                 credit: CreditRule = "membership", memory: int = 0, keep: Keep = "newest", sweeps: int = 2,
                 modality: Sequence[MediaKind] | None = None, seed: int = 0, name: str | None = None) -> None:
        """
        Args:
            num_subsets, subset_size: of ``measure``; credit and value are about all samples.
            seed: of the subsets and of the reservoir.
        """
        super().__init__(encoder, reference, credit=credit, memory=memory, keep=keep, sweeps=sweeps, modality=modality, seed=seed,
                         name=name)
        check_subsets(num_subsets, subset_size)
        self.num_subsets, self.subset_size = num_subsets, subset_size

    def kernel(self, exemplars: Exemplars) -> Kernel:
        return PolynomialKernel()

    def measure(self, features: Tensor) -> tuple[Measurement, ...]:
        """Mean and spread over the subsets, or one estimate of all where either side has fewer rows than a subset."""
        generator = torch.Generator().manual_seed(self.seed)
        found = mmd2_over_subsets(features.double(), self.reference, generator, self.num_subsets, self.subset_size)
        return (Measurement(self.metric, found.mean, -1, len(features), std=found.std),)


class KAD(KernelDistance):
    """Kernel audio distance; the bandwidth comes with the exemplars."""

    metric = "KAD"
    spec = RewardSpec(name="kad", arity="set", modality=ALL_MEDIA)
    scale = 100.0

    def kernel(self, exemplars: Exemplars) -> Kernel:
        assert exemplars.bandwidth is not None, "kept features come with their bandwidth"
        return GaussianKernel(exemplars.bandwidth)


class CMMD(KernelDistance):
    """CLIP maximum mean discrepancy, unbiased."""

    metric = "CMMD"
    spec = RewardSpec(name="cmmd", arity="set", modality=ALL_MEDIA)
    scale = 1000.0
    unit_rows = True

    def kernel(self, exemplars: Exemplars) -> Kernel:
        return GaussianKernel(10.0)
