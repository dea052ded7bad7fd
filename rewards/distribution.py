"""Rewards that compare distributions: Fréchet distance to exemplars and Vendi diversity of a whole set, and one sample against exemplars.

Set-level rewards (``FrechetDistance``, ``VendiScore``) see every process's samples at once and give each its part:

    credit "membership"       1 for the samples of D+, 0 for those of D-, two samples per prompt (the swap search of DRAGON)
    credit "leave_one_out"    r(D) - r(D without the sample), any number of samples per prompt; a weight rather than a rule

``ExemplarDistance`` scores each sample alone. Sources: DRAGON, arXiv:2504.15217; FAD, arXiv:1812.08466; Vendi, arXiv:2210.02410.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.maths.frechet import Gaussian, Moments, frechet_distance, mahalanobis, point_distances
from visalign.maths.set_objectives import FrechetObjective, SetObjective, VendiObjective
from visalign.maths.swap_search import leave_one_out, swap_search
from visalign.protocols import RewardSpec
from visalign.rewards.encoders import as_encoder, sample_features
from visalign.rewards.exemplars import Exemplars, load_exemplars
from visalign.types import Media, MediaKind, Prompt, Scores

logger = logging.getLogger(__name__)


class _SetReward(ABC):
    """What the set-level rewards share: features, memory and the two kinds of credit."""

    def __init__(self, name: str, encoder: Any, modality: Sequence[MediaKind] | None, credit: Literal["membership", "leave_one_out"],
                 sweeps: int, memory: int) -> None:
        if credit not in ("membership", "leave_one_out"):
            raise ValueError(f"credit '{credit}' is neither 'membership' (D+ and D-, two samples per prompt) nor 'leave_one_out'")
        if sweeps < 1 or memory < 0:
            raise ValueError(f"sweeps {sweeps} must be at least 1 and memory {memory} at least 0")
        self.encoder = as_encoder(encoder, modality)
        self.rule = credit
        self.sweeps = sweeps
        self.capacity = memory
        self.memory: Tensor | None = None
        # The credit is larger for better samples whatever the direction of the metric behind it.
        self.spec = RewardSpec(name=name, arity="set", modality=self.encoder.modality, direction=1,
                               raw_range=(0.0, 1.0) if credit == "membership" else (float("-inf"), float("inf")),
                               model_ids=(self.encoder.name,), version=f"{credit}-{self.encoder.hash[:12]}")

    @abstractmethod
    def objective(self) -> SetObjective[Any]:
        """Reward of a set together with the memory."""

    def features(self, media: Sequence[Media], prompts: Sequence[Prompt]) -> Tensor:
        """One feature per sample, the mean over its frames, float64 (n, d) on the CPU."""
        return sample_features(self.encoder, media)

    def value(self, features: Tensor) -> float:
        """Reward of a set of features (n, d) together with the memory, larger is better."""
        objective = self.objective()
        return objective.value(objective.state(features.double()))

    def credit(self, features: Tensor, group_id: Tensor) -> Tensor:
        """What each sample earned, float32 (N,), larger is better; NaN for samples that could not be judged.

        A sample whose features are not finite is left out; under "membership" the other sample of its prompt with it. Call once per
        iteration: the features join the memory afterwards.

        Args:
            features: of all processes' samples, (N, d).
            group_id: int64 (N,), one id per prompt over all processes; the samples of a group need not be neighbours.
        Raises:
            ValueError: a group of other than two samples under "membership", or too few samples for the reward.
        """
        if features.dim() != 2 or group_id.shape != features.shape[:1]:
            raise ValueError(f"features {tuple(features.shape)} and group_id {tuple(group_id.shape)} do not fit; expected (N, d) and (N,) "
                             "of the samples gathered from all processes")
        features, group_id = features.detach().cpu().double(), group_id.cpu()
        finite = torch.isfinite(features).all(dim=1)
        credit = torch.full((len(features),), torch.nan, dtype=torch.float64)
        if self.rule == "membership":
            first, second = self._pairs(group_id)
            judged = finite[first] & finite[second]
            first, second = first[judged], second[judged]
            if not len(first):
                return credit.float()
            result = swap_search(features[first], features[second], self.objective(), sweeps=self.sweeps)
            credit[first], credit[second] = result.first_is_positive.double(), (~result.first_is_positive).double()
            logger.debug("%s: D+ from %.6g to %.6g in %d swaps of %d pairs", self.spec.name, result.start, result.value,
                         len(result.swaps), len(first))
        else:
            credit[finite] = leave_one_out(features[finite], self.objective())
        self._remember(features[finite])
        return credit.float()

    def _pairs(self, group_id: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of each group's first and second sample, groups in the order in which they first appear."""
        members: dict[int, list[int]] = {}
        for row, group in enumerate(group_id.tolist()):
            members.setdefault(group, []).append(row)
        for group, own in members.items():
            if len(own) != 2:
                raise ValueError(f"{self.spec.name}: group {group} has {len(own)} samples; one goes to D+ and one to D-, so set "
                                 "train.group_size: 2, or credit: leave_one_out for other sizes")
        rows = torch.tensor(list(members.values()), dtype=torch.int64).reshape(-1, 2)
        return rows[:, 0], rows[:, 1]

    def _remember(self, features: Tensor) -> None:
        if self.capacity:
            known = features if self.memory is None else torch.cat([self.memory, features])
            self.memory = known[-self.capacity:].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The memory, for a checkpoint."""
        return {} if self.memory is None else {"memory": self.memory}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.memory = state["memory"].double() if "memory" in state else None


class FrechetDistance(_SetReward):
    """Minus the Fréchet distance between a set of samples and the exemplars (FID, FAD, ... by the choice of encoder)."""

    def __init__(self, encoder: Any, reference: str | Path, *, credit: Literal["membership", "leave_one_out"] = "membership",
                 memory: int = 0, shrinkage: float = 0.0, sweeps: int = 2, modality: Sequence[MediaKind] | None = None,
                 name: str = "frechet_distance") -> None:
        """
        Args:
            encoder: ``{reward: clip, ...}``, ``"package.module:function"`` or an ``Encoder``.
            reference: a folder of media, or a statistics file made with the same encoder.
            credit: see the module.
            memory: how many earlier samples count into every set; samples and memory together should well exceed the encoder's
                dimensions, or the covariance is singular.
            shrinkage: added to the diagonal of both covariances.
            sweeps: most passes of the swap search; each costs one O(d^3) distance per prompt (0.05 s at d = 512).
            modality: kinds of media an encoder *function* reads, images by default.
        Raises:
            ValueError: the reference is missing, or was made with another encoder.
        """
        if shrinkage < 0:
            raise ValueError(f"shrinkage {shrinkage} must be at least 0")
        super().__init__(name, encoder, modality, credit, sweeps, memory)
        self.exemplars: Exemplars = load_exemplars(reference, self.encoder, "sample")
        self.shrinkage = shrinkage
        self._warned = False

    def objective(self) -> FrechetObjective:
        """``-FD(set and memory, exemplars)``."""
        memory = None if self.memory is None else Moments.of(self.memory)
        return FrechetObjective(self.exemplars.gaussian, memory, self.shrinkage)

    def credit(self, features: Tensor, group_id: Tensor) -> Tensor:
        dims = len(self.exemplars.gaussian.mean)
        if features.dim() == 2 and features.shape[1] != dims:
            raise ValueError(f"features have {features.shape[1]} dimensions, the exemplars {dims}; was another encoder used?")
        size = len(features) // (2 if self.rule == "membership" else 1) + self.capacity
        if size <= dims and not self._warned:
            self._warned = True
            logger.warning("%s: a set of %d samples cannot fill %d dimensions, the distance is mostly bias; set memory above %d, sample "
                           "more prompts, or use an encoder with fewer dimensions", self.spec.name, size, dims, 2 * dims)
        return super().credit(features, group_id)


class VendiScore(_SetReward):
    """Effective number of different samples in a set, by the cosine of their features; needs no exemplars."""

    def __init__(self, encoder: Any, *, q: float = 1.0, credit: Literal["membership", "leave_one_out"] = "membership", memory: int = 0,
                 sweeps: int = 2, modality: Sequence[MediaKind] | None = None, name: str = "vendi") -> None:
        """
        Args:
            encoder, credit, memory, sweeps, modality: as for ``FrechetDistance``.
            q: order of the entropy; 1 is the usual score, larger orders count the dominant modes.
        """
        if not q > 0:
            raise ValueError(f"order q = {q} must be above 0")
        super().__init__(name, encoder, modality, credit, sweeps, memory)
        self.q = q

    def objective(self) -> VendiObjective:
        """Vendi score of the set and the memory."""
        return VendiObjective(self.memory, self.q)

    def features(self, media: Sequence[Media], prompts: Sequence[Prompt]) -> Tensor:
        """As in the base, with rows of length 1; a row without a direction becomes NaN."""
        features = super().features(media, prompts)
        return features / features.norm(dim=1, keepdim=True)


class ExemplarDistance:
    """Distance of one sample from the exemplars' Gaussian N(mu, C); raw is the distance, smaller is better.

        "frechet"        FD(N(m, S), N(mu, C)) with mean m and covariance S of the sample's own frames or windows (per-song FAD);
                         a sample of one frame, such as an image, has S = 0:  |x - mu|^2 + tr C
        "mahalanobis"    mean over frames of (x - mu)^T C^{-1} (x - mu), minus twice the log-density without its constant
    """

    def __init__(self, encoder: Any, reference: str | Path, *, distance: Literal["frechet", "mahalanobis"] = "frechet",
                 shrinkage: float = 0.0, modality: Sequence[MediaKind] | None = None, name: str = "exemplar_distance") -> None:
        """
        Args:
            encoder, modality: as for ``FrechetDistance``.
            reference: a folder of media, or statistics of *frames* made with the same encoder.
            shrinkage: added to the diagonal of both covariances, S and C, where a sample has several frames, and to C for
                "mahalanobis".
        Raises:
            ValueError: the reference is missing or was made otherwise, or C is singular and ``distance`` is "mahalanobis".
        """
        if distance not in ("frechet", "mahalanobis"):
            raise ValueError(f"distance '{distance}' is neither 'frechet' nor 'mahalanobis'")
        self.encoder = as_encoder(encoder, modality)
        self.exemplars: Exemplars = load_exemplars(reference, self.encoder, "frame")
        self.reference: Gaussian = self.exemplars.gaussian.shrunk(shrinkage)
        if distance == "mahalanobis":
            mahalanobis(self.reference.mean[None], self.reference)  # refuse a singular covariance now
        self.distance = distance
        self.shrinkage = shrinkage
        self.spec = RewardSpec(name=name, modality=self.encoder.modality, direction=-1, raw_range=(0.0, float("inf")),
                               model_ids=(self.encoder.name,), version=f"{distance}-{self.encoder.hash[:12]}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One distance per sample; features that are not finite make it invalid."""
        return Scores.from_values([self._distance(rows) for rows in self.encoder.encode(media)], direction=-1)

    def _distance(self, rows: Tensor) -> float:
        if not bool(torch.isfinite(rows).all()):
            return float("nan")
        if self.distance == "mahalanobis":
            return float(mahalanobis(rows, self.reference).mean())
        if len(rows) == 1:
            return float(point_distances(rows, self.exemplars.gaussian)[0])
        return frechet_distance(Moments.of(rows).gaussian(self.shrinkage), self.reference)
