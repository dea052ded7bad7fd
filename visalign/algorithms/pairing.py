"""From scores to what a preference loss compares: pairs, ranked lists, labelled or weighted samples. Ties and invalid samples form none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from visalign.maths.preference_selection import Rule, select_pairs
from visalign.maths.seeds import derive_seed
from visalign.types import Experience

PAIRS = 2  # what a seed is for, beside noising.TIME and noising.NOISE


@dataclass(frozen=True)
class Groups:
    """What the loss compares: ``rows`` (P, K) of the trajectory, best first, with reward (P, K) and label (P, K) float64."""

    rows: Tensor
    reward: Tensor
    label: Tensor

    def select(self, at: Tensor) -> Groups:
        return Groups(self.rows[at], self.reward[at], self.label[at])


@dataclass(frozen=True)
class Pairing:
    """How scores become groups.

    Attributes:
        rule, margin, max_pairs, temperature: of pairs, see ``maths.preference_selection.select_pairs``.
        threshold: labels: good above it, bad below; ``None`` compares with the group's mean.
        keep: weights: only this many best samples of every group.
        flip: exchange chosen and rejected, good and bad: a negative model (Diffusion-NPO, arXiv:2505.11245).
        by_advantage: the loss reads the group-normalised advantage in place of the reward.
    """

    rule: Rule = "best_worst"
    margin: float = 0.0
    max_pairs: int | None = None
    temperature: float = 1.0
    threshold: float | None = None
    keep: int | None = None
    flip: bool = False
    by_advantage: bool = False

    def groups(self, kind: str, experience: Experience, rows: Tensor, seed: int) -> Groups:
        """Groups of one optimizer step; ``rows`` are whole groups of the trajectory. Ties and invalid samples form none."""
        if not len(rows):  # a process may have no group in a step of which others have some
            return Groups(rows.reshape(0, 1), torch.empty(0, 1, dtype=torch.float64), torch.empty(0, 1, dtype=torch.float64))
        group = experience.trajectory.group_id[rows].unique(return_inverse=True)[1]
        size = int((group == 0).sum())
        values = experience.advantage[:, 0] if self.by_advantage and experience.advantage.shape[1] else experience.reward
        reward = torch.where(experience.valid[rows], values[rows].double().cpu(), torch.nan) * (-1 if self.flip else 1)
        reward, valid = reward.reshape(-1, size), experience.valid[rows].reshape(-1, size)
        table = rows.reshape(-1, size)
        if kind == "pair":
            found = [select_pairs(reward[p:p + 1], valid[p:p + 1], self.rule, self.margin, max_pairs=self.max_pairs,
                                  temperature=self.temperature, generator=self._generator(experience, table[p, 0], seed))
                     for p in range(len(table))]
            places = torch.cat([torch.stack([pair.chosen, pair.rejected], dim=1) + p * size for p, pair in enumerate(found)])
        elif kind == "list":
            complete = valid.all(dim=1) & (reward.amax(dim=1) > reward.amin(dim=1))
            order = reward.argsort(dim=1, descending=True, stable=True) + torch.arange(len(table)).unsqueeze(1) * size
            places = order[complete]
        else:
            kept = valid.clone()
            if self.keep is not None:
                rank = reward.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                kept &= rank < self.keep
            places = kept.flatten().nonzero()
        threshold = reward.nanmean(dim=1, keepdim=True).expand_as(reward) if self.threshold is None else \
            torch.full_like(reward, self.threshold * (-1 if self.flip else 1))
        label = (reward - threshold).sign().nan_to_num(0.0)
        groups = Groups(rows[places], reward.flatten()[places], label.flatten()[places])
        return groups.select(groups.label[:, 0] != 0) if kind == "label" else groups

    @staticmethod
    def _generator(experience: Experience, first: Tensor, seed: int) -> Generator:
        return Generator().manual_seed(derive_seed(seed, int(experience.trajectory.sample_index[first]), PAIRS))
