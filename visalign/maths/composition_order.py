"""Hierarchical comparison: ordered signals, the first clear difference decides.

    level = min { l : |z_l(a) - z_l(b)| > margin_l },   a is better if z_level(a) > z_level(b);  no such level: a tie

With margins the relation may be intransitive, so that a group is ranked by the share of siblings each sample beats (Borda), not sorted.
Source: HERON, arXiv:2309.02632.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decided:
    """Outcome of comparisons, each field (...,): ``preference`` is 1 where a is better, 0 where b is, 0.5 for a tie; ``level`` decided
    (int64, 0 is the first), -1 for a tie."""

    preference: Tensor
    level: Tensor


def compare_hierarchically(a: Tensor, b: Tensor, margins: Tensor) -> Decided:
    """Compare pairs level by level.

    Args:
        a, b: (L, ...), most important level first; NaN where a level says nothing about a sample: it then decides nothing.
        margins: (L,), >= 0; standard deviations under the initial policy make a good measure.
    Raises:
        ValueError: a margin is negative or there is not one per level.
    """
    if margins.shape != a.shape[:1] or a.shape != b.shape or not bool((margins >= 0).all()):
        raise ValueError(f"{a.shape[0]} levels need as many margins >= 0, got {margins.tolist()} for {tuple(a.shape)} and {tuple(b.shape)}")
    difference = a - b
    clear = difference.abs() > margins.reshape(-1, *[1] * (a.dim() - 1))  # False where NaN
    any_clear = clear.any(dim=0)
    level = torch.where(any_clear, clear.int().argmax(dim=0), -1)
    deciding = difference.gather(0, level.clamp(min=0)[None]).squeeze(0)
    return Decided(torch.where(any_clear, (deciding > 0).to(a.dtype), 0.5), level)


def hierarchical_rank(values: Tensor, present: Tensor, margins: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Share of its siblings each sample beats, ties half.

    Args:
        values: (L, N), most important level first.
        present: bool (L, N); a sample that no level judges takes part in no comparison.
        margins: (L,), >= 0.
        group: int64 (N,).
    Returns:
        Shares in [0, 1], (N,), NaN without a sibling; and how many comparisons (ordered pairs) each level decided, the last entry
        counting ties, int64 (L + 1,).
    """
    known = torch.where(present, values.double(), torch.nan)
    judged = present.any(dim=0)
    share = torch.full(group.shape, torch.nan, dtype=torch.float64)
    decided = torch.zeros(len(values) + 1, dtype=torch.int64)
    for g in group[judged].unique():
        member = ((group == g) & judged).nonzero().squeeze(1)
        if len(member) < 2:
            continue
        z = known[:, member]
        outcome = compare_hierarchically(z[:, :, None].expand(-1, -1, len(member)), z[:, None, :].expand(-1, len(member), -1),
                                         margins.double())
        others = ~torch.eye(len(member), dtype=torch.bool)
        share[member] = torch.where(others, outcome.preference, 0.0).sum(dim=1) / (len(member) - 1)
        decided += torch.bincount(outcome.level[others] % len(decided), minlength=len(decided))
    return share, decided
