"""Pairs out of scored groups: which sample is preferred over which, under one rule, a margin and a cap.

A pair (i, j) of one group *qualifies* if both samples are valid, ``r_i - r_j > margin`` and, where several criteria are given, enough of
them agree. The rule chooses among the qualifying pairs. Ties never qualify, so a group of equal rewards gives no pair.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from visalign.types import PreferencePairs

Rule = Literal["best_worst", "random", "all", "rso"]
Agreement = Literal["combined", "majority", "unanimous"]


def select_pairs(
    reward: Tensor, valid: Tensor, rule: Rule = "best_worst", margin: float = 0.0, generator: Generator | None = None, *,
    max_pairs: int | None = None, agreement: Agreement = "combined", criteria: Tensor | None = None, temperature: float = 1.0,
    num_accepted: int | None = None,
) -> PreferencePairs:
    """Preferred and rejected samples of P groups of G; sample (p, g) is row ``p G + g``.

    Args:
        reward: (P, G), larger is better; ignored (NaN allowed) where invalid.
        valid: bool (P, G).
        rule: "best_worst" pairs the largest with the smallest reward; "random" draws from the qualifying pairs; "all" takes all, of
            the largest gaps if capped; "rso" first draws samples by rejection (:func:`rejection_sample`) and takes pairs among them.
        margin: the gap must be larger, >= 0.
        generator: for "random" and "rso", on the CPU.
        max_pairs: most pairs per group; 1 for "best_worst" and, unless given, for "random"; ``None``: no cap.
        agreement: with "majority" more than half of the criteria, with "unanimous" all of them must strictly prefer the same sample.
        criteria: (P, G, R), the single rewards, larger is better; required unless agreement is "combined".
        temperature, num_accepted: of "rso"; half of the group, at least 2, is accepted by default.
    Returns:
        Rows by group, larger gaps first.
    Raises:
        ValueError: shapes, options or a missing generator; a valid reward that is not finite.
    Sources: best against worst and rejection sampling: RSO, arXiv:2309.06657; agreement of several scorers: arXiv:2503.12575.
    """
    _check(reward, valid, rule, margin, generator, max_pairs, agreement, criteria)
    score = reward.detach().double().cpu()
    usable = valid.cpu()
    gap = score[:, :, None] - score[:, None, :]
    qualifies = usable[:, :, None] & usable[:, None, :] & (gap > margin)
    if agreement != "combined" and criteria is not None:
        single = criteria.detach().double().cpu()
        share = (single[:, :, None, :] > single[:, None, :, :]).double().mean(dim=-1)
        qualifies &= share > 0.5 if agreement == "majority" else share == 1
    size = score.shape[1]
    rows: list[Tensor] = []
    gaps: list[Tensor] = []
    for p in range(score.shape[0]):
        allowed = qualifies[p]
        if rule == "best_worst":
            allowed = allowed & _best_worst(score[p], usable[p])
        elif rule == "rso" and usable[p].any():
            members = usable[p].nonzero().squeeze(1)
            wanted = max(2, size // 2) if num_accepted is None else num_accepted
            accepted = rejection_sample(score[p][members], temperature, wanted, _need(generator, rule))
            kept = torch.zeros_like(usable[p])
            kept[members[accepted]] = True
            allowed = allowed & kept[:, None] & kept[None, :]
        pairs = allowed.nonzero()
        limit = max_pairs if max_pairs is not None else (1 if rule == "random" else len(pairs))
        if rule in ("random", "rso") and len(pairs) > limit:
            pairs = pairs[torch.randperm(len(pairs), generator=_need(generator, rule))[:limit]]
        found = gap[p][pairs[:, 0], pairs[:, 1]]
        order = found.argsort(descending=True, stable=True)[:limit]
        rows.append(pairs[order] + p * size)
        gaps.append(found[order])
    chosen, rejected = torch.cat([torch.empty(0, 2, dtype=torch.int64), *rows]).unbind(1)
    margins = torch.cat([torch.empty(0, dtype=torch.float64), *gaps]).float()
    return PreferencePairs(chosen.to(reward.device), rejected.to(reward.device), margins.to(reward.device))


def rso_acceptance(reward: Tensor, temperature: float) -> Tensor:
    """``exp((r - max r) / temperature)`` over the last axis: the best is always accepted.

    Accepted samples follow ``pi exp(r / temperature)``; temperature towards 0 gives best-of-n, towards infinity accepts all alike.

    Raises:
        ValueError: temperature <= 0.
    Source: RSO, arXiv:2309.06657.
    """
    if not temperature > 0:
        raise ValueError(f"rejection sampling needs a temperature > 0, got {temperature}")
    return ((reward - reward.amax(dim=-1, keepdim=True)) / temperature).exp()


def rejection_sample(reward: Tensor, temperature: float, num_accepted: int, generator: Generator) -> Tensor:
    """Indices (m,), ascending, of ``m = min(num_accepted, n)`` samples accepted without replacement.

    Sweeps over the remaining samples, accepting each with :func:`rso_acceptance` against the best remaining one, until enough are.

    Args:
        reward: (n,), finite.
    Raises:
        ValueError: temperature <= 0 or num_accepted < 1.
    """
    if num_accepted < 1:
        raise ValueError(f"rejection sampling needs num_accepted >= 1, got {num_accepted}")
    accepted: list[int] = []
    remaining = list(range(reward.shape[0]))
    while remaining and len(accepted) < num_accepted:
        chance = rso_acceptance(reward[remaining].double(), temperature)
        drawn = torch.rand(len(remaining), generator=generator, dtype=torch.float64) < chance
        # A random order, so that the samples left over when enough are accepted do not depend on their position.
        order = torch.randperm(len(remaining), generator=generator).tolist()
        accepted += [remaining[i] for i in order if drawn[i]][: num_accepted - len(accepted)]
        remaining = [i for i in remaining if i not in accepted]
    return torch.tensor(sorted(accepted), dtype=torch.int64)


def _best_worst(score: Tensor, usable: Tensor) -> Tensor:
    """bool (G, G), true at (best, worst) of the usable samples; the first of equals."""
    mask = torch.zeros(score.shape[0], score.shape[0], dtype=torch.bool)
    if usable.any():
        best = torch.where(usable, score, -torch.inf).argmax()
        worst = torch.where(usable, score, torch.inf).argmin()
        mask[best, worst] = True
    return mask


def _need(generator: Generator | None, rule: str) -> Generator:
    if generator is None:
        raise ValueError(f"the rule '{rule}' draws at random: give a seeded torch.Generator")
    return generator


def _check(
    reward: Tensor, valid: Tensor, rule: str, margin: float, generator: Generator | None, max_pairs: int | None, agreement: str,
    criteria: Tensor | None,
) -> None:
    if rule not in get_args(Rule) or agreement not in get_args(Agreement):
        raise ValueError(f"unknown rule {rule!r} or agreement {agreement!r}; rules: {', '.join(get_args(Rule))}; "
                         f"agreements: {', '.join(get_args(Agreement))}")
    if reward.dim() != 2 or valid.shape != reward.shape or valid.dtype != torch.bool:
        raise ValueError(f"reward and the boolean valid need one shape (P, G), got {tuple(reward.shape)} and {valid.dtype} "
                         f"{tuple(valid.shape)}")
    if not torch.isfinite(reward[valid]).all():
        raise ValueError("a reward marked valid is NaN or infinite; mark that sample invalid")
    if not margin >= 0:
        raise ValueError(f"margin must be >= 0, got {margin}: a smaller reward is never preferred")
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"max_pairs must be >= 1, or None for no cap, got {max_pairs}")
    if agreement != "combined" and (criteria is None or criteria.shape[:-1] != reward.shape):
        got = None if criteria is None else tuple(criteria.shape)
        raise ValueError(f"agreement '{agreement}' needs criteria of shape (P, G, R) with the single rewards, got {got}")
    if rule in ("random", "rso"):
        _need(generator, rule)
