"""What rewards of whole sets share: features, a memory of earlier ones, and three ways to give each sample its part.

    credit "membership"       1 for the samples of D+, 0 for those of D-, two samples per prompt (the swap search of DRAGON)
    credit "leave_one_out"    r(D) - r(D without the sample), exact, any number of samples per prompt
    credit "influence"        the same to first order, for all samples at the price of one decomposition

Such a reward sees every process's samples at once. It judges them together with its memory, *before* they join it, so that a sample is
compared with others, never with a copy of itself. Memory is part of training alone: ``value`` and ``measure`` are about the features they
are given and nothing else, so that they evaluate a folder of samples the same at any time.

Source: DRAGON, arXiv:2504.15217 (membership); the other two are in ``maths.influence``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.maths.set_objectives import SetObjective
from visalign.maths.swap_search import leave_one_out, swap_search
from visalign.protocols import RewardSpec
from visalign.rewards.encoders import as_encoder, sample_features
from visalign.rewards.memory import Keep, Memory
from visalign.types import Measurement, Media, MediaKind, Prompt

logger = logging.getLogger(__name__)

CreditRule = Literal["membership", "leave_one_out", "influence"]


class SetLevelReward(ABC):
    """A reward of a set of features, larger is better, and its way to a credit per sample."""

    rules: tuple[CreditRule, ...] = ("membership", "leave_one_out", "influence")

    def __init__(self, name: str, encoder: Any, modality: Sequence[MediaKind] | None, credit: CreditRule, sweeps: int, memory: int,
                 keep: Keep, seed: int) -> None:
        if credit not in self.rules:
            raise ValueError(f"credit '{credit}' is not one of {', '.join(self.rules)}, which {name} offers: 'membership' makes D+ and D- "
                             "of two samples per prompt, the others take any number")
        if sweeps < 1:
            raise ValueError(f"sweeps {sweeps} must be at least 1")
        self.encoder = as_encoder(encoder, modality)
        self.rule = credit
        self.sweeps = sweeps
        self.seed = seed
        self.memory = Memory(memory, keep, seed)
        self.dims: int | None = None  # of the exemplars' features, where there are exemplars
        # The credit is larger for better samples whatever the direction of the metric behind it.
        self.spec = RewardSpec(name=name, arity="set", modality=self.encoder.modality, direction=1,
                               raw_range=(0.0, 1.0) if credit == "membership" else (float("-inf"), float("inf")),
                               model_ids=(self.encoder.name,), version=f"{credit}-{self.encoder.hash[:12]}")

    @abstractmethod
    def objective(self, memory: Tensor | None) -> SetObjective[Any]:
        """Reward of a set together with a memory, (m, d)."""

    @abstractmethod
    def measure(self, features: Tensor) -> tuple[Measurement, ...]:
        """The metric of a set of features (n, d) as it is published, without the memory.

        Raises:
            ValueError: too few features, or some that are not finite.
        """

    def features(self, media: Sequence[Media], prompts: Sequence[Prompt]) -> Tensor:
        """One feature per sample, the mean over its frames or windows, float64 (n, d) on the CPU."""
        return sample_features(self.encoder, media)

    def value(self, features: Tensor) -> float:
        """Reward of a set of features (n, d), larger is better: minus the metric where that is a distance. The memory does not count.

        Raises:
            ValueError: too few features, or some that are not finite.
        """
        objective = self.objective(None)
        return objective.value(objective.state(features.double()))

    def credit(self, features: Tensor, group_id: Tensor) -> Tensor:
        """What each sample earned, float32 (N,), larger is better; NaN for samples that could not be judged.

        A sample whose features are not finite is left out; under "membership" the other sample of its prompt with it. Call once per
        iteration: the features join the memory afterwards.

        Args:
            features: of all processes' samples, (N, d).
            group_id: int64 (N,), one id per prompt over all processes; the samples of a group need not be neighbours.
        Raises:
            ValueError: a group of other than two samples under "membership", too few samples for the reward, or features of another width.
        """
        if features.dim() != 2 or group_id.shape != features.shape[:1]:
            raise ValueError(f"features {tuple(features.shape)} and group_id {tuple(group_id.shape)} do not fit; expected (N, d) and (N,) "
                             "of the samples gathered from all processes")
        if self.dims not in (None, features.shape[1]):
            raise ValueError(f"features have {features.shape[1]} dimensions, the exemplars {self.dims}; was another encoder used?")
        features, group_id = features.detach().cpu().double(), group_id.cpu()
        finite = torch.isfinite(features).all(dim=1)
        credit = torch.full((len(features),), torch.nan, dtype=torch.float64)
        if self.rule == "membership":
            first, second = self._pairs(group_id)
            judged = finite[first] & finite[second]
            first, second = first[judged], second[judged]
            if not len(first):
                return credit.float()
            result = swap_search(features[first], features[second], self.objective(self.memory.features), sweeps=self.sweeps)
            credit[first], credit[second] = result.first_is_positive.double(), (~result.first_is_positive).double()
            logger.debug("%s: D+ from %.6g to %.6g in %d swaps of %d pairs", self.spec.name, result.start, result.value,
                         len(result.swaps), len(first))
        elif bool(finite.any()):
            judge = self.leave_one_out if self.rule == "leave_one_out" else self.influence
            credit[finite] = judge(features[finite])
        self.memory.add(features[finite])
        return credit.float()

    def leave_one_out(self, features: Tensor) -> Tensor:
        """``r(set and memory) - r(the same without the sample)`` of every row, float64 (n,)."""
        return leave_one_out(features, self.objective(self.memory.features))

    def influence(self, features: Tensor) -> Tensor:
        """``leave_one_out`` to first order, on its scale, float64 (n,)."""
        raise NotImplementedError(f"{type(self).__name__}.rules does not offer it")

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

    def state_dict(self) -> dict[str, Tensor]:
        """The memory, for a checkpoint."""
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.memory.load_state_dict(state)


def unit_features(features: Tensor) -> Tensor:
    """Rows of length 1; a row without a direction becomes NaN, and its sample invalid."""
    return features / features.norm(dim=1, keepdim=True)
