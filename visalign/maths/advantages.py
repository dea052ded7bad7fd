"""Rewards of grouped samples to advantages: centre, scale, combine, clip.

    A_n = (r_n - centre_g) / (scale + eps)        group by group, in float64

Invalid samples are masked out of every statistic; groups that carry no information get exactly 0, never rounding noise.

Sources: group mean and std: GRPO, arXiv:2402.03300; leave-one-out: RLOO, arXiv:2402.14740; no scale: Dr. GRPO, arXiv:2503.20783;
rewards normalised one by one, then whitened: GDPO, arXiv:2601.05242.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Above the rounding of float32 rewards (6e-8), far below any difference a reward means.
_NO_SPREAD = 1e-6


@dataclass(frozen=True)
class AdvantageRule:
    """How rewards become advantages.

    Attributes:
        centre: "group" subtracts the mean of the group; "leave_one_out" the mean of the other members (unbiased, n / (n - 1)
            times larger); "rank" first replaces rewards by their rank in the group in [0, 1], ties averaged, then subtracts the mean.
        scale: "group" divides by the group's std; "global" by the std of all valid rewards, which contains the differences
            between prompts; "none" does not divide.
        level: several rewards are weighted and summed as "reward" values, or each becomes an "advantage" first.
        whiten: with level "advantage", divide the weighted sum by its std over the batch.
        ddof: 1 for the unbiased std, 0 for the population's.
        eps: added to every std.
        clip: largest absolute advantage, ``None`` for no limit.
    """

    centre: Literal["group", "leave_one_out", "rank"] = "group"
    scale: Literal["group", "global", "none"] = "group"
    level: Literal["reward", "advantage"] = "reward"
    whiten: bool = True
    ddof: Literal[0, 1] = 1
    eps: float = 1e-8
    clip: float | None = 5.0

    def __post_init__(self) -> None:
        allowed = {
            "centre": ("group", "leave_one_out", "rank"), "scale": ("group", "global", "none"),
            "level": ("reward", "advantage"), "ddof": (0, 1),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                options = ", ".join(map(str, values))
                raise ValueError(f"AdvantageRule.{name} must be one of {options}, got {getattr(self, name)!r}")
        if not self.eps >= 0:
            raise ValueError(f"AdvantageRule.eps must be >= 0, got {self.eps}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"AdvantageRule.clip must be > 0, or None for no limit, got {self.clip}")


@dataclass(frozen=True)
class Advantages:
    """What :func:`group_advantages` returns.

    Attributes:
        advantage: (N,), dtype of the rewards; exactly 0 for invalid samples, dropped groups and groups without spread.
        num_groups: distinct group ids.
        dropped_groups: groups with fewer than 2 valid samples, or no more than half of them valid.
        zero_spread: fraction of the kept groups whose weighted rewards are all equal.
        group_std: mean over the kept groups of the std of their weighted rewards (NaN if no group is kept).
    """

    advantage: Tensor
    num_groups: int
    dropped_groups: int
    zero_spread: float
    group_std: float


def group_advantages(
    rewards: Tensor, valid: Tensor, group_id: Tensor, rule: AdvantageRule | None = None, weights: Sequence[float] | None = None
) -> Advantages:
    """Advantages of N samples; groups are given by ``group_id`` alone, in any order.

    Args:
        rewards: larger is better, (N,) or (N, K) for K rewards; ignored (NaN allowed) where invalid.
        valid: bool (N,) or (N, K). A sample counts as valid if all its rewards with a non-zero weight are: members of a group are
            only compared on the same criteria.
        group_id: int64 (N,).
        rule: how; ``None`` for the defaults.
        weights: K factors, ``None`` for ones.
    Raises:
        ValueError: shapes or dtypes do not fit, or a valid reward is not finite.
    """
    rule = rule or AdvantageRule()
    table, mask, factors = _checked(rewards, valid, group_id, weights)
    group = _Groups(group_id, mask.all(dim=1), rule)
    total = (table * factors).sum(dim=1)
    if rule.level == "reward":
        advantage = group.normalise(total)
    else:
        advantage = torch.stack([w * group.normalise(r) for w, r in zip(factors.tolist(), table.unbind(1), strict=True)]).sum(0)
        if rule.whiten:
            # Every group sums to 0, so the batch mean is 0 already and groups without spread stay exactly 0. Rewards that cancel
            # leave rounding noise, which whitening would blow up to full size.
            std = _std(advantage[group.live], rule.ddof)
            advantage = torch.where(std < _NO_SPREAD, 0.0, advantage / (std + rule.eps))
    if rule.clip is not None:
        advantage = advantage.clamp(-rule.clip, rule.clip)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    group_std, flat = group.spread(total)
    kept = int(group.kept.sum())
    return Advantages(
        advantage=torch.where(group.live, advantage, torch.zeros_like(advantage)).to(dtype),
        num_groups=group.kept.shape[0],
        dropped_groups=group.kept.shape[0] - kept,
        zero_spread=float((flat & group.kept).sum()) / kept if kept else 0.0,
        group_std=float(group_std[group.kept].mean()),
    )


class _Groups:
    """Sums over groups, and who counts."""

    def __init__(self, group_id: Tensor, valid: Tensor, rule: AdvantageRule) -> None:
        unique, self.row = torch.unique(group_id, return_inverse=True)
        self.rule, self.valid, self.num = rule, valid, unique.shape[0]
        self.count = self.sum(valid.double())
        size = self.sum(torch.ones_like(self.count[self.row]))
        self.kept = (self.count >= 2) & (self.count > 0.5 * size)
        self.live = valid & self.kept[self.row]

    def sum(self, values: Tensor) -> Tensor:
        """Totals per group of (N,) values."""
        return torch.zeros(self.num, dtype=torch.float64, device=values.device).index_add_(0, self.row, values)

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(torch.where(self.valid, values, 0.0)) / self.count.clamp(min=1)

    def spread(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Std per group, and whether it is no more than rounding: below 1e-6 max(|r|, 1)."""
        deviation = torch.where(self.valid, values - self.mean(values)[self.row], 0.0)
        std = (self.sum(deviation.square()) / (self.count - self.rule.ddof).clamp(min=1)).sqrt()
        largest = torch.ones(self.num, dtype=torch.float64, device=values.device)
        largest = largest.scatter_reduce(0, self.row, torch.where(self.valid, values.abs(), 0.0), "amax")
        return std, std < _NO_SPREAD * largest

    def normalise(self, values: Tensor) -> Tensor:
        """(N,) values to advantages of live samples, exactly 0 in groups without spread."""
        # Judged before ranking: ranks would turn rounding noise into a full-sized spread.
        _, flat = self.spread(values)
        if self.rule.centre == "rank":
            values = self._ranks(values)
        centred = values - self.mean(values)[self.row]
        if self.rule.centre == "leave_one_out":
            centred = centred * (self.count / (self.count - 1).clamp(min=1))[self.row]
        if self.rule.scale == "group":
            centred = centred / (self.spread(values)[0] + self.rule.eps)[self.row]
        elif self.rule.scale == "global":
            centred = centred / (_std(values[self.valid], self.rule.ddof) + self.rule.eps)
        return torch.where(self.live & ~flat[self.row], centred, 0.0)

    def _ranks(self, values: Tensor) -> Tensor:
        """Share of the other valid members that each one beats, ties half: 0 for the worst, 1 for the best."""
        ranks = torch.zeros_like(values)
        for g in range(self.num):
            member = ((self.row == g) & self.valid).nonzero().squeeze(1)
            r = values[member]
            beaten = (r[:, None] > r).double().sum(1) + 0.5 * ((r[:, None] == r).double().sum(1) - 1)
            ranks[member] = beaten / max(len(member) - 1, 1)
        return ranks


def _std(values: Tensor, ddof: int) -> Tensor:
    return ((values - values.mean()).square().sum() / max(values.shape[0] - ddof, 1)).sqrt()


def _checked(rewards: Tensor, valid: Tensor, group_id: Tensor, weights: Sequence[float] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards float64 (N, K) with zeros where invalid, validity (N, K), weights (K,); rewards of weight 0 left out."""
    if rewards.dim() not in (1, 2) or valid.shape != rewards.shape or group_id.shape != rewards.shape[:1]:
        raise ValueError(
            "rewards and valid need one shape, (N,) or (N, K), and group_id (N,); got "
            f"{tuple(rewards.shape)}, {tuple(valid.shape)} and {tuple(group_id.shape)}"
        )
    if valid.dtype != torch.bool or group_id.dtype != torch.int64:
        raise ValueError(f"valid must be bool and group_id int64 (floats merge groups), got {valid.dtype} and {group_id.dtype}")
    table, mask = rewards.double().reshape(rewards.shape[0], -1), valid.reshape(rewards.shape[0], -1)
    factors = torch.tensor([1.0] * table.shape[1] if weights is None else list(weights), dtype=torch.float64)
    if factors.shape[0] != table.shape[1]:
        raise ValueError(f"{table.shape[1]} rewards need {table.shape[1]} weights, got {factors.shape[0]}")
    factors = factors.to(table.device)
    used = factors != 0
    if not bool(used.any()) or not bool(torch.isfinite(factors).all()):
        raise ValueError(f"weights must be finite and at least one must differ from 0, got {factors.tolist()}")
    table, mask, factors = table[:, used], mask[:, used], factors[used]
    if not bool(torch.isfinite(table[mask]).all()):
        raise ValueError("a reward marked valid is NaN or infinite; mark that sample invalid")
    return torch.where(mask, table, 0.0), mask, factors
