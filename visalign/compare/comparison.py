"""Two aligned sets of samples against each other: gains, win rates, tables; every number with a 95 % interval over prompts.

Sample k of both sets has the same prompt and the same seed. Everything here works on scores, or asks a judge about given media; nothing is
generated. Samples of one prompt share their entry in ``clusters`` and count as one unit of chance (``maths.bootstrap``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from visalign.maths.bootstrap import bootstrap_mean
from visalign.maths.winrate import combine_orders
from visalign.protocols import PairwiseReward
from visalign.types import Comparisons, Media, Prompt, Scores

TIE = 1e-6  # probabilities as near to one half are ties


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval, and what it stands on: ``samples`` of ``prompts``. One prompt tells nothing about others: no interval."""

    mean: float
    low: float | None
    high: float | None
    samples: int
    prompts: int

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly above or below ``value``."""
        return self.low is not None and self.high is not None and (self.low > value or self.high < value)


@dataclass(frozen=True)
class Contrast:
    """One number of both sets and the paired difference, over the pairs that are valid in both: ``gain = model - base`` exactly."""

    base: Estimate
    model: Estimate
    gain: Estimate


@dataclass(frozen=True)
class BothOrders:
    """What a judge says about n pairs (a, b), asked in both orders.

    Attributes:
        prob: P(a is better), the mean of both orders, float32 (n,); NaN where invalid.
        outcome: 1 if both orders say a, 0 if both say b, else 0.5: a judge that changes its mind with the order has none; float32 (n,), NaN
            where invalid.
        valid: bool (n,), answered in *both* orders: half a swap is the position bias itself.
        reasons: per pair ``None`` or why it is invalid.
        inconsistency: ``|P(a | a first) + P(b | b first) - 1|``, 0 for a consistent judge, 1 for one that prefers a position; float32 (n,).
        agreement: bool (n,), whether both orders gave the same verdict.
    """

    prob: Tensor
    outcome: Tensor
    valid: Tensor
    reasons: tuple[str | None, ...]
    inconsistency: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class Wins:
    """How often the model's sample beats the base's.

    Attributes:
        rate: mean outcome, a tie counts one half; ``None`` without a valid pair.
        wins, ties, losses: of the model, valid pairs.
        invalid: pairs left out, counted by reason.
        preference: mean probability that the model's sample is better, for judges.
        swap_inconsistency: see ``BothOrders``, mean over valid pairs; for judges.
        order_agreement: share of valid pairs whose two orders gave the same verdict; for judges.
        self_agreement: how often the judge repeats an answer, for judges that find out and tell.
    """

    rate: Estimate | None
    wins: int
    ties: int
    losses: int
    invalid: Mapping[str, int] = field(default_factory=dict)
    preference: Estimate | None = None
    swap_inconsistency: float | None = None
    order_agreement: float | None = None
    self_agreement: float | None = None


def estimate(values: Tensor, clusters: Tensor) -> Estimate | None:
    """Mean of the finite values (n,), drawn again by cluster; ``None`` without any."""
    known = torch.isfinite(values)
    if not bool(known.any()):
        return None
    found, prompts = bootstrap_mean(values, clusters=clusters), len(clusters[known].unique())
    low, high = (found.low, found.high) if prompts > 1 else (None, None)
    return Estimate(found.mean, low, high, found.count, prompts)


def contrast(base: Tensor, model: Tensor, clusters: Tensor) -> Contrast | None:
    """Both means and the paired gain over the pairs finite in both (n,); ``None`` without any."""
    base, model = base.double(), model.double()
    gain = model - base
    parts = [estimate(torch.where(torch.isfinite(gain), one, torch.nan), clusters) for one in (base, model, gain)]
    return None if parts[0] is None or parts[1] is None or parts[2] is None else Contrast(parts[0], parts[1], parts[2])


def ask(judge: PairwiseReward, first: Sequence[Media], second: Sequence[Media], prompts: Sequence[Prompt]) -> Comparisons:
    """A judge's answers about pairs in the order given.

    Raises:
        ValueError: not one per pair.
    """
    answer = judge.compare(first, second, prompts)
    if not len(answer.prob_first) == len(answer.valid) == len(answer.reasons) == len(prompts):
        raise ValueError(f"judge '{judge.spec.name}' answered {len(answer.prob_first)} of {len(prompts)} comparisons; expected one answer "
                         "per pair, invalid where it has none")
    return answer


def ask_both_orders(judge: PairwiseReward, first: Sequence[Media], second: Sequence[Media], prompts: Sequence[Prompt]) -> BothOrders:
    """Ask a judge about every pair (first, second) and (second, first), all in one call.

    Args:
        first, second, prompts: one entry per pair.
    Raises:
        ValueError: the judge's answer is not one per question.
    """
    answer = ask(judge, [*first, *second], [*second, *first], [*prompts, *prompts])
    (ij, ji), (valid_ij, valid_ji) = answer.prob_first.float().chunk(2), answer.valid.chunk(2)
    valid = valid_ij & valid_ji
    reasons = tuple(a or b for a, b in zip(answer.reasons[:len(prompts)], answer.reasons[len(prompts):], strict=True))
    verdict_ij, verdict_ji = _verdict(ij), -_verdict(ji)
    agreement = valid & (verdict_ij == verdict_ji)
    outcome = torch.where(agreement, (verdict_ij + 1) / 2, 0.5)
    prob, outcome, inconsistency = (torch.where(valid, one, torch.nan) for one in (combine_orders(ij, ji), outcome, (ij + ji - 1).abs()))
    return BothOrders(prob, outcome, valid, reasons, inconsistency, agreement)


def _verdict(prob: Tensor) -> Tensor:
    """1 for the first of the pair, -1 for the second, 0 for a tie."""
    return torch.where((prob - 0.5).abs() < TIE, 0.0, (prob - 0.5).sign())


def joined(parts: Sequence[BothOrders]) -> BothOrders:
    """The answers of several calls as those of one."""
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return BothOrders(prob=cat("prob"), outcome=cat("outcome"), valid=cat("valid"), inconsistency=cat("inconsistency"),
                      agreement=cat("agreement"), reasons=tuple(reason for part in parts for reason in part.reasons))


def wins_of_judge(model_first: BothOrders, clusters: Tensor) -> Wins:
    """Win rate of the first of every pair."""
    valid = model_first.valid
    found = _wins(model_first.outcome, clusters, model_first.reasons)
    if found.rate is None:
        return found
    return replace(found, preference=estimate(model_first.prob, clusters),
                   swap_inconsistency=float(model_first.inconsistency[valid].mean()),
                   order_agreement=float(model_first.agreement[valid].float().mean()))


def outcomes(base: Tensor, model: Tensor) -> Tensor:
    """1 where the model's value is larger, 0.5 for ties, 0 where it is smaller, NaN where one is not finite; (n,)."""
    gain = model - base
    return torch.where(torch.isfinite(gain), 0.5 * (gain.sign() + 1), torch.nan)


def wins_of_scores(base: Scores, model: Scores, clusters: Tensor) -> Wins:
    """Win rate by a reward of single samples: who has the larger value on the same prompt and seed; equal values are ties."""
    return _wins(outcomes(base.value, model.value), clusters, tuple(a or b for a, b in zip(model.reasons, base.reasons, strict=True)))


def _wins(outcome: Tensor, clusters: Tensor, reasons: Sequence[str | None]) -> Wins:
    wins, ties, losses = (int((outcome == value).sum()) for value in (1.0, 0.5, 0.0))
    invalid = Counter(reason or "invalid" for reason, ok in zip(reasons, outcome.isfinite().tolist(), strict=True) if not ok)
    return Wins(estimate(outcome, clusters), wins, ties, losses, dict(invalid))
