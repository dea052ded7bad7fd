"""The way from rewards to advantages.

    raw -> direction -> frozen standardisation -> shape -> combine -> group advantage          level="reward"
    raw -> direction -> frozen standardisation -> shape -> group advantage -> combine          level="advantage" (GDPO, Pref-GRPO)

``Scores.value`` already carries the direction; shapes and combiners are in ``composition/``. Everything here is a function of gathered
scores: every process that holds all samples computes the same credit. Only ``CircuitBreaker`` and some combiners keep a memory, and it
is checkpointed.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visalign.composition.fixed import Weighted
from visalign.composition.shapes import Shape, reference_scores
from visalign.composition.table import Combiner, Table
from visalign.maths.advantages import AdvantageRule, group_advantages
from visalign.protocols import RecordedScores, Reward, SetReward
from visalign.types import Prompt, Scores


@dataclass(frozen=True)
class RewardTerm:
    """One reward's part in the objective.

    Attributes:
        name: key of its scores and logs.
        reward: what scores the samples.
        weight: not 0; negative to punish. Of the standardised value or of the advantage, see ``assign_credit``.
        required: a sample without this score is left out of the update. If false, a group that lacks some of these scores is
            judged by the other rewards alone, with their weights enlarged to the same total.
        shift, scale: frozen standardisation ``(value - shift) / scale``, ``scale > 0``; for example mean and standard deviation
            under the initial policy, or 26 for PickScore. At level "advantage" group statistics cancel them, unless there is a shape.
        shape: applied to the standardised value, or ``None``.
    """

    name: str
    reward: Reward | SetReward | RecordedScores
    weight: float = 1.0
    required: bool = True
    shift: float = 0.0
    scale: float = 1.0
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"reward '{self.name}': weight {self.weight} does nothing; remove it, or watch it as a guard")
        if not (math.isfinite(self.scale) and self.scale > 0 and math.isfinite(self.shift)):
            raise ValueError(f"reward '{self.name}': standardisation (value - {self.shift}) / {self.scale} needs a finite shift and "
                             "a scale above 0; a reward that is better when smaller declares direction=-1 in its spec")

    def transform(self, value: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """``shape((value - shift) / scale)``, float64 (n,); NaN stays NaN.

        Args:
            value: with the direction applied, (n,), as in ``Scores.value``.
            prompts: one per score; may be empty if the shape reads none.
        Raises:
            ValueError: a prompt lacks the references the shape needs.
        """
        standard = (value.double() - self.shift) / self.scale
        if self.shape is None:
            return standard
        if not self.shape.reads_prompts:
            return self.shape.apply(standard, None)
        references = self.reward.spec.direction * reference_scores(self.name, prompts)
        return self.shape.apply(standard, (references - self.shift) / self.scale)


def check_prompts(terms: Sequence[RewardTerm], combiner: Combiner, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that a shape or the combiner cannot use, before anything is generated.

    Raises:
        ValueError: names the row and what it lacks.
    """
    for term in terms:
        if term.shape is not None and term.shape.reads_prompts:
            reference_scores(term.name, prompts)
    combiner.check_prompts([term.name for term in terms], prompts)


def asked(terms: Sequence[RewardTerm]) -> dict[str, Reward | SetReward]:
    """The rewards that score new samples, by name; recorded scores come with theirs."""
    return {term.name: term.reward for term in terms if not isinstance(term.reward, RecordedScores)}


def judge_sets(terms: Sequence[RewardTerm], scores: Mapping[str, Scores], group_id: Tensor) -> dict[str, Scores]:
    """Scores with every set-level reward's judgement of all N gathered samples in place of its zeros.

    Groups with a sample that has no features are left out of the set, so that sets of equal size are compared.
    """
    judged = dict(scores)
    for term in terms:
        found = scores[term.name]
        if found.features is None or not isinstance(term.reward, SetReward):
            continue
        group = group_id.unique(return_inverse=True)[1]
        broken = torch.zeros(int(group.max()) + 1, dtype=torch.bool).index_put((group[~found.valid],), torch.tensor(True))
        whole = ~broken[group]
        values = torch.full(found.raw.shape, torch.nan)
        if bool(whole.any()):
            values[whole] = term.reward.credit(found.features[whole], group_id[whole]).float()
            whole = whole & torch.isfinite(values)
        reasons = tuple(None if ok else reason or "its group is incomplete"
                        for ok, reason in zip(whole.tolist(), found.reasons, strict=True))
        judged[term.name] = replace(found, raw=term.reward.spec.direction * values, value=values, valid=whole, reasons=reasons)
    return judged


@dataclass(frozen=True)
class Credit:
    """What the update learns from.

    Attributes:
        advantage: float32 (N,); exactly 0 where invalid and in groups without spread.
        valid: bool (N,); invalid samples count nowhere, neither in a statistic nor in a loss denominator.
        scores: each reward's scores.
        reward: the combination of standardised values, float32 (N,), NaN where invalid.
        metrics: ``reward/<name>/...`` per reward and ``credit/...`` over all.
    """

    advantage: Tensor
    valid: Tensor
    scores: Mapping[str, Scores]
    reward: Tensor
    metrics: Mapping[str, float]


def assign_credit(terms: Sequence[RewardTerm], scores: Mapping[str, Scores], group_id: Tensor,
                  rule: AdvantageRule | None = None, combiner: Combiner | None = None, prompts: Sequence[Prompt] = ()) -> Credit:
    """Advantages of N gathered samples.

        level "reward":     A = advantage( combine(z_1 .. z_K) )         weighted sum: the reward with the largest spread dominates
        level "advantage":  A = sum_k w_k advantage( z_k )               every reward has the influence its weight says

    with ``z_k`` the standardised and shaped value of reward k, ``w_k`` the combiner's weights and ``advantage`` as in
    ``maths.advantages``. An invalid sample changes nobody else's advantage. A group with no more than half of its samples valid, or fewer
    than two, is left out.

    Args:
        terms: the rewards; at least one is required.
        scores: by term name, n = N each.
        group_id: int64 (N,).
        rule: centre, scale, level, clip; ``None`` for the defaults. ``rule.whiten`` counts at level "advantage" alone.
        combiner: ``None`` for the weighted sum. One that remembers moves on with every call.
        prompts: the prompt of every group, in the order of ascending group ids; may be left out if no shape and no combiner reads them.
    Raises:
        ValueError: a term without scores, scores of another length, two terms of one name, no required term, prompts that are missing, or
            advantages to be weighed by a combiner without weights.
    Sources: GRPO, arXiv:2402.03300 (group statistics); GDPO, arXiv:2601.05242 (per-reward normalisation, batch whitening).
    """
    rule = rule or AdvantageRule()
    _check(terms, scores, group_id)
    group = group_id.unique(return_inverse=True)[1]
    valid, healthy = _valid_samples(terms, scores, group)
    combiner = Weighted() if combiner is None else combiner
    if prompts and len(prompts) != len(healthy):
        raise ValueError(f"{len(prompts)} prompts for {len(healthy)} groups; give the prompt of every group, in the order of group ids")
    if not prompts and (combiner.reads_prompts or any(term.shape is not None and term.shape.reads_prompts for term in terms)):
        raise ValueError("a shape or the combiner reads the prompts; give assign_credit the prompt of every group")
    lacking = _lacking(terms, scores, group, valid)
    present = valid & ~lacking[:, group]
    of_samples = [prompts[g] for g in group.tolist()] if prompts else []
    values = torch.stack([term.transform(scores[term.name].value, of_samples) for term in terms])
    values = torch.where(present, values, 0.0)  # a reward its group does without may be NaN there
    weight = torch.tensor([term.weight for term in terms], dtype=torch.float64)
    combined = combiner.combine(Table(tuple(term.name for term in terms), weight, values, present, group, tuple(prompts)))
    reward = torch.where(valid, combined.value, torch.nan)
    if not bool(torch.isfinite(reward[valid]).all()):
        raise ValueError(f"{type(combiner).__name__} gave {int((~torch.isfinite(reward[valid])).sum())} valid samples no finite number; "
                         "check shift, scale and shape of the rewards")
    once = replace(rule, level="reward")
    if rule.level == "reward":
        advantage = group_advantages(reward, valid, group_id, once).advantage
    else:
        weights = combined.weights
        if weights is None:
            raise ValueError(f"{type(combiner).__name__} is no weighted sum, so that advantages cannot be weighed; use level 'reward'")
        unclipped = replace(once, clip=None)
        each = [group_advantages(value, there, group_id, unclipped).advantage for value, there in zip(values, present, strict=True)]
        advantage = (weights * torch.stack(each)).sum(dim=0)
        if rule.whiten:
            # Every group sums to 0 by now, so that centring does nothing and the global std is the batch's.
            once = replace(once, centre="group", scale="global")
            advantage = group_advantages(advantage, valid, group_id, once).advantage
        elif rule.clip is not None:
            advantage = advantage.clamp(-rule.clip, rule.clip)

    metrics: dict[str, float] = {}
    for term, absent in zip(terms, lacking, strict=True):
        metrics |= reward_metrics(term.name, scores[term.name], group)
        if not term.required:
            metrics[f"reward/{term.name}/groups_without"] = _mean(absent[healthy])
    metrics |= {
        "credit/valid_rate": _mean(valid),
        "credit/dropped_group_fraction": _mean(~healthy),
        "credit/zero_spread_fraction": _mean((_group_sum(advantage.abs(), group) == 0)[healthy]),
        "credit/clipped_fraction": _mean((advantage.abs() >= (rule.clip or math.inf))[valid]),
        "credit/advantage_std": _rms(advantage[valid]),
        "credit/reward_mean": _mean(reward[valid]),
        **combined.metrics,
    }
    return Credit(advantage=advantage.float(), valid=valid, scores=dict(scores), reward=reward.float(),
                  metrics={name: value for name, value in metrics.items() if not math.isnan(value)})


def reward_metrics(name: str, scores: Scores, group: Tensor) -> dict[str, float]:
    """``reward/<name>/`` mean, std, group_std (mean over groups of the spread within), valid_rate, and the mean of every detail.

    On the reward's own raw scale, over valid samples; NaN where there is none.
    """
    valid, raw = scores.valid, scores.raw.double()
    known = torch.where(valid, raw, 0.0)
    count = _group_sum(valid.double(), group)
    centred = torch.where(valid, raw - (_group_sum(known, group) / count.clamp(min=1))[group], 0.0)
    group_std = (_group_sum(centred.square(), group) / count.clamp(min=1)).sqrt()
    metrics = {"mean": _mean(raw[valid]), "std": _rms(raw[valid] - _mean(raw[valid])), "group_std": _mean(group_std[count > 0]),
               "valid_rate": _mean(valid)}
    for axis, detail in scores.details.items():
        metrics[axis] = _mean(detail[torch.isfinite(detail)])
    return {f"reward/{name}/{key}": value for key, value in metrics.items()}


def _check(terms: Sequence[RewardTerm], scores: Mapping[str, Scores], group_id: Tensor) -> None:
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"two rewards share a name: {', '.join(names)}; give each its own")
    if not any(term.required for term in terms):
        raise ValueError(f"no reward among {', '.join(names) or 'none'} is required; set required=True for one, or a group could "
                         "be left without any")
    for name in names:
        if name not in scores:
            raise ValueError(f"no scores for the reward '{name}'; scored were: {', '.join(scores) or 'none'}")
        if len(scores[name].valid) != len(group_id):
            raise ValueError(f"reward '{name}' scored {len(scores[name].valid)} samples, there are {len(group_id)} group ids; "
                             "gather scores and group ids alike before assigning credit")
    if group_id.is_floating_point():
        raise ValueError(f"group_id is {group_id.dtype}; keep it int64: floats merge large ids")


def _valid_samples(terms: Sequence[RewardTerm], scores: Mapping[str, Scores], group: Tensor) -> tuple[Tensor, Tensor]:
    """Samples with every required score, (N,), in groups with enough of them, (P,)."""
    valid = torch.stack([scores[term.name].valid for term in terms if term.required]).all(dim=0)
    count, size = _group_sum(valid.double(), group), _group_sum(torch.ones_like(group, dtype=torch.float64), group)
    healthy = (count >= 2) & (count > 0.5 * size)
    return valid & healthy[group], healthy


def _lacking(terms: Sequence[RewardTerm], scores: Mapping[str, Scores], group: Tensor, valid: Tensor) -> Tensor:
    """Which rewards a group does without, bool (K, P).

    One missing optional score removes that reward from its whole group: siblings judged on different sums would be incomparable.
    """
    return torch.stack([_group_sum((valid & ~scores[term.name].valid).double(), group) > 0 for term in terms])


def _group_sum(x: Tensor, group: Tensor) -> Tensor:
    """Sum over each group's samples, (P,), in float64."""
    return torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, x.double())


def _mean(x: Tensor) -> float:
    return float(x.double().mean())


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


class RewardFailureError(RuntimeError):
    """A required reward failed too often for a run to go on: masking keeps a failure out of the statistics, it replaces no signal."""


class CircuitBreaker:
    """Stops a run whose rewards fail.

    Show it required rewards only: an optional one may well not apply to most prompts. It trips when, for some reward, more than
    ``threshold * window`` of its last ``window`` samples were invalid (counted in whole updates), or when one update left it
    without a single score.
    """

    def __init__(self, threshold: float = 0.05, window: int = 1000) -> None:
        """
        Args:
            threshold: largest tolerated fraction of invalid samples, in (0, 1].
            window: how many recent samples are remembered per reward.
        """
        if not 0 < threshold <= 1 or window < 1:
            raise ValueError(f"threshold {threshold} must lie in (0, 1] and window {window} be at least 1")
        self.threshold = threshold
        self.window = window
        self._updates: dict[str, deque[tuple[int, Counter[str]]]] = {}

    def update(self, scores: Mapping[str, Scores]) -> None:
        """Count one update's scores, those of required rewards over all processes.

        Raises:
            RewardFailureError: a reward failed too often; says how often and why.
        """
        for name, answer in scores.items():
            failures = Counter(reason or "unknown" for reason, ok in zip(answer.reasons, answer.valid.tolist(), strict=True) if not ok)
            if failures and failures.total() == len(answer.valid):
                raise RewardFailureError(self._message(name, f"gave no score for any of {len(answer.valid)} samples", failures))
            updates = self._updates.setdefault(name, deque())
            updates.append((len(answer.valid), failures))
            while len(updates) > 1 and sum(size for size, _ in updates) - updates[0][0] >= self.window:
                updates.popleft()
            reasons = sum((of_update for _, of_update in updates), Counter[str]())
            if reasons.total() > self.threshold * self.window:
                total = sum(size for size, _ in updates)
                raise RewardFailureError(self._message(name, f"failed for {reasons.total()} of the last {total} samples (tolerated: "
                                                 f"{self.threshold:.0%} of {self.window})", reasons))

    @staticmethod
    def _message(name: str, what: str, reasons: Counter[str]) -> str:
        causes = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        return (f"reward '{name}' {what}: {causes}. Check its server, its prompt format and the media it gets, then resume from the last "
                "checkpoint; train.max_failed tolerates more, required: false lets the other rewards decide alone where it fails")

    def state_dict(self) -> dict[str, Any]:
        return {name: [[size, dict(failures)] for size, failures in updates] for name, updates in self._updates.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._updates = {name: deque((size, Counter(failures)) for size, failures in updates) for name, updates in state.items()}
