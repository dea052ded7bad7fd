"""Between pointwise scores and pairwise preferences: a Bradley-Terry judge from any score, win rates from any judge.

``WinRate`` with GRPO is Pref-GRPO (arXiv:2508.20751): the update sees who beats whom within a group, not by how much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from visalign.compare.comparison import ask, ask_both_orders
from visalign.maths.winrate import all_pairs, bradley_terry, cyclic_triads, d_regular, ring, win_rates
from visalign.protocols import ALL_MEDIA, PairwiseReward, Reports, Reward, RewardSpec
from visalign.types import Comparisons, Media, Prompt, Scores

Pairs = Sequence[tuple[int, int]]


class BradleyTerry:
    """The preference a pointwise reward implies: ``P(i beats j) = sigmoid(scale (value_i - value_j))``."""

    spec = RewardSpec(name="bradley_terry", arity="pairwise", modality=ALL_MEDIA, raw_range=(0.0, 1.0))

    def __init__(self, pointwise: Reward, scale: float = 1.0) -> None:
        """
        Args:
            pointwise: the reward to lift.
            scale: 1 for rewards fitted as log-odds (PickScore raw, ImageReward, HPSv3); cosines need a larger one, e.g. 100.
        """
        if not isinstance(pointwise, Reward) or pointwise.spec.arity != "pointwise":
            raise ValueError(f"{type(pointwise).__name__} gives no score per sample; Bradley-Terry lifts pointwise rewards only")
        if not scale > 0:
            raise ValueError(f"scale {scale} must be above 0; the reward's own direction is already applied")
        self.pointwise = pointwise
        self.scale = scale
        self.spec = replace(pointwise.spec, arity="pairwise", direction=1, differentiable=False, raw_range=(0.0, 1.0))

    def compare(self, first: Sequence[Media], second: Sequence[Media], prompts: Sequence[Prompt]) -> Comparisons:
        """Each distinct sample is scored once, however many comparisons it takes part in; a pair is valid if both scores are."""
        asked = list(zip([*first, *second], [*prompts, *prompts], strict=True))
        row = {key: index for index, key in enumerate(dict.fromkeys((id(sample), id(prompt)) for sample, prompt in asked))}
        distinct = {(id(sample), id(prompt)): (sample, prompt) for sample, prompt in asked}
        group = {key: index for index, key in enumerate(dict.fromkeys(id(prompt) for prompt in prompts))}
        media, texts = zip(*(distinct[key] for key in row), strict=True)
        scores = self.pointwise.score(media, texts, [group[id(prompt)] for prompt in texts])
        rows = torch.tensor([row[id(sample), id(prompt)] for sample, prompt in asked])
        i, j = rows.chunk(2)
        reasons = tuple(scores.reasons[a] or scores.reasons[b] for a, b in zip(i.tolist(), j.tolist(), strict=True))
        return Comparisons(prob_first=bradley_terry(scores.value[i], scores.value[j], self.scale),
                           valid=scores.valid[i] & scores.valid[j], reasons=reasons)


class WinRate:
    """Win rate of each sample within its group: the mean over its valid comparisons of the probability that it is the better one.

    Details per sample: ``tie_rate`` (share of its comparisons that end at 0.5), ``comparisons`` (how many were valid), ``cyclic_triads``
    (see ``maths.winrate``) and, with ``swap``, ``swap_inconsistency`` (mean of ``|P(i > j | i first) + P(j > i | j first) - 1|``, 0 for
    a consistent judge, 1 for one that always prefers the same position).
    """

    spec = RewardSpec(name="win_rate", arity="groupwise", modality=ALL_MEDIA, raw_range=(0.0, 1.0))

    def __init__(self, judge: PairwiseReward, schedule: Literal["all_pairs", "ring"] | int = "all_pairs", swap: bool = True,
                 name: str | None = None) -> None:
        """
        Args:
            judge: compares two samples of one prompt.
            schedule: "all_pairs", G (G - 1) / 2 comparisons; "ring", G; a number d, each sample in d comparisons.
            swap: ask every pair in both orders and average, which removes position bias at twice the cost. A pair that fails in
                one order is left out: half a swap is the bias itself.
        """
        if isinstance(judge, str):
            raise ValueError(f"judge '{judge}' is only a name; write judge: {{reward: {judge}, ...}} with its parameters")
        if not isinstance(judge, PairwiseReward):
            raise ValueError(f"{type(judge).__name__} compares nothing; lift a pointwise reward with "
                             "judge: {reward: bradley_terry, pointwise: {reward: ...}}")
        if not (schedule in ("all_pairs", "ring") or (isinstance(schedule, int) and not isinstance(schedule, bool))):
            raise ValueError(f"schedule {schedule!r} is neither 'all_pairs', 'ring' nor a number of comparisons per sample")
        self.judge = judge
        self.schedule = schedule
        self.swap = swap
        self.spec = replace(
            self.spec, name=name or f"{judge.spec.name}_win_rate", modality=judge.spec.modality, requires=judge.spec.requires,
            deterministic=judge.spec.deterministic, model_ids=judge.spec.model_ids, licence=judge.spec.licence,
            version=f"{judge.spec.version}-{schedule}-{'swap' if swap else 'one-order'}")

    def telemetry(self) -> Mapping[str, float]:
        """What the judge tells of its latest call; empty for judges that tell nothing."""
        return self.judge.telemetry() if isinstance(self.judge, Reports) else {}

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Win rates of all groups; the judge is asked once, about all pairs of all groups.

        Raises:
            ValueError: the schedule does not fit a group's size, or the judge's answer is not one per pair.
        """
        members: dict[int, list[int]] = {}
        for index, group in enumerate(group_id):
            members.setdefault(int(group), []).append(index)
        pairs = {group: self._pairs(len(rows)) for group, rows in members.items() if len(rows) > 1}
        asked = [(members[group][i], members[group][j]) for group, own in pairs.items() for i, j in own]
        shared = [prompts[members[int(group)][0]] for group in group_id]
        prob, valid, reasons, inconsistency = self._judge(asked, media, shared)

        raw = torch.full((len(media),), torch.nan)
        details = {name: torch.full_like(raw, torch.nan) for name in ("tie_rate", "comparisons", "cyclic_triads", "swap_inconsistency")}
        why: list[str | None] = ["no comparison"] * len(media)
        start = 0
        for group, own in pairs.items():
            part, rows = slice(start, start + len(own)), torch.tensor(members[group])
            start += len(own)
            rates = win_rates(own, prob[part], valid[part], len(rows))
            raw[rows] = rates.value
            details["comparisons"][rows] = rates.num_comparisons.float()
            details["cyclic_triads"][rows] = cyclic_triads(own, prob[part], valid[part], len(rows))
            details["tie_rate"][rows] = _per_sample(((prob[part] - 0.5).abs() < 1e-6).float(), own, valid[part], len(rows))
            details["swap_inconsistency"][rows] = _per_sample(inconsistency[part], own, valid[part], len(rows))
            for member, row in enumerate(rows.tolist()):
                causes = Counter(cause for cause, pair in zip(reasons[part], own, strict=True) if cause and member in pair)
                why[row] = None if rates.valid[member] else next(iter(dict(causes.most_common(1))), "no comparison")
        if not self.swap:
            del details["swap_inconsistency"]
        return Scores(raw=raw, value=raw.clone(), valid=raw.isfinite(), reasons=tuple(why), details=details)

    def _pairs(self, num_samples: int) -> Pairs:
        if isinstance(self.schedule, int):
            return d_regular(num_samples, self.schedule)
        return all_pairs(num_samples) if self.schedule == "all_pairs" else ring(num_samples)

    def _judge(self, asked: Pairs, media: Sequence[Media],
               prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Sequence[str | None], Tensor]:
        """Per pair: P(first is better), valid, reason, and how far the two orders contradict each other."""
        if not asked:
            return torch.empty(0), torch.empty(0, dtype=torch.bool), (), torch.empty(0)
        first, second = [media[i] for i, _ in asked], [media[j] for _, j in asked]
        texts = [prompts[i] for i, _ in asked]
        if self.swap:
            both = ask_both_orders(self.judge, first, second, texts)
            return both.prob, both.valid, both.reasons, both.inconsistency
        answer = ask(self.judge, first, second, texts)
        return answer.prob_first.float(), answer.valid, answer.reasons, torch.zeros(len(asked))


def _per_sample(values: Tensor, pairs: Pairs, valid: Tensor, num_samples: int) -> Tensor:
    """Mean of ``values`` over each sample's valid comparisons, (G,); NaN without any."""
    index = torch.tensor(pairs)[valid]
    total = torch.zeros(num_samples).index_add(0, index.flatten(), values[valid].repeat_interleave(2))
    return total / torch.bincount(index.flatten(), minlength=num_samples)
