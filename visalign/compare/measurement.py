"""Ask rewards and judges about two aligned lists of samples, some prompts at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visalign import scoring
from visalign.compare.comparison import BothOrders, ask_both_orders, joined
from visalign.compare.pairing import prompt_key
from visalign.diversity import Measure
from visalign.media import Sample, load_media
from visalign.protocols import PairwiseReward, Reports, Reward, SetReward
from visalign.tally import concatenate_scores
from visalign.types import Media, Prompt, Scores

CHUNK = 128  # samples of a side in memory at once, unless a prompt has more


@dataclass(frozen=True)
class Spread:
    """How diversity is measured: ``features`` of media (n, d) under ``measure``; ``encoder`` is what results call it."""

    measure: Measure
    features: Callable[[Sequence[Media]], Tensor]
    encoder: str


@dataclass(frozen=True)
class Panel:
    """Who is asked."""

    rewards: Mapping[str, Reward | SetReward] = field(default_factory=dict)
    judges: Mapping[str, PairwiseReward] = field(default_factory=dict)
    spread: Spread | None = None

    def admit(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that someone cannot judge, before anything is generated."""
        scoring.admit({**self.rewards, **self.judges}, prompts)


@dataclass(frozen=True)
class Answers:
    """What was said about n pairs, in the order of ``prompts``; samples of one prompt are neighbours and share their entry in ``clusters``.

    ``features`` are those of ``Panel.spread``; ``self_agreement`` is what judges tell of themselves, by judge.
    """

    base_samples: Sequence[Sample]
    model_samples: Sequence[Sample]
    clusters: Tensor
    base: Mapping[str, Scores]
    model: Mapping[str, Scores]
    orders: Mapping[str, BothOrders]
    features: tuple[Tensor, Tensor] | None
    self_agreement: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> list[Prompt]:
        return [sample.prompt for sample in self.base_samples]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One JSON object per pair: the prompt's number, files, values by reward (larger is better; raw for details), what judges said."""
        for k, (base, model) in enumerate(zip(self.base_samples, self.model_samples, strict=True)):
            sides = {name: {"file": sample.file.name, "scores": _values(scores, k)}
                     for name, sample, scores in (("base", base, self.base), ("model", model, self.model))}
            judged = {name: {"prob": float(both.prob[k]), "outcome": float(both.outcome[k])} if both.valid[k] else
                      {"invalid": both.reasons[k] or "invalid"} for name, both in self.orders.items()}
            yield {"group": int(self.clusters[k]), "prompt": base.prompt.text, "seed": base.seed, **sides, "judges": judged}


def _values(scores: Mapping[str, Scores], row: int) -> dict[str, float]:
    found = {name: float(one.value[row]) for name, one in scores.items() if one.features is None}
    found |= {f"{name}/{axis}": float(column[row]) for name, one in scores.items() for axis, column in one.details.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def ask(panel: Panel, base: Sequence[Sample], model: Sequence[Sample], progress: Callable[[int, int], None] = lambda done, total: None,
        ) -> Answers:
    """Load the samples of both sides, whole prompts at a time, and ask everybody about them.

    Args:
        base, model: aligned, one entry per pair.
        progress: called with (pairs done, pairs in all).
    """
    number: dict[str, int] = {}
    clusters = torch.tensor([number.setdefault(prompt_key(sample.prompt), len(number)) for sample in base], dtype=torch.int64)
    order = clusters.argsort(stable=True)
    clusters, base, model = clusters[order], [base[k] for k in order.tolist()], [model[k] for k in order.tolist()]
    scored: list[tuple[dict[str, Scores], dict[str, Scores]]] = []
    judged: list[dict[str, BothOrders]] = []
    features: list[tuple[Tensor, Tensor]] = []
    told: dict[str, list[tuple[float, int]]] = {}
    for part in _chunks(clusters):
        prompts, group = [sample.prompt for sample in base[part]], clusters[part].tolist()
        sides = [[load_media(sample.file) for sample in side[part]] for side in (base, model)]
        first, second = (scoring.score(panel.rewards, media, prompts, group) for media in sides)
        scored.append((first, second))
        judged.append({name: _judged(name, judge, sides[1], sides[0], prompts) for name, judge in panel.judges.items()})
        for name, judge in panel.judges.items():
            if isinstance(judge, Reports) and "self_agreement" in (heard := judge.telemetry()):
                told.setdefault(name, []).append((heard["self_agreement"], len(prompts)))
        if panel.spread is not None:
            features.append((panel.spread.features(sides[0]), panel.spread.features(sides[1])))
        progress(part.stop, len(base))
    return Answers(base, model, clusters, base=concatenate_scores([one for one, _ in scored]),
                   model=concatenate_scores([one for _, one in scored]),
                   orders={name: joined([part[name] for part in judged]) for name in panel.judges},
                   features=(torch.cat([one for one, _ in features]), torch.cat([one for _, one in features])) if features else None,
                   self_agreement={name: sum(value * count for value, count in parts) / sum(count for _, count in parts)
                                   for name, parts in told.items()})


def _chunks(clusters: Tensor) -> Iterator[slice]:
    """Stretches of whole prompts of at most ``CHUNK`` pairs, or of one prompt."""
    ends = [*(k for k in range(1, len(clusters)) if clusters[k] != clusters[k - 1]), len(clusters)]
    start = 0
    for end, following in zip(ends, [*ends[1:], math.inf], strict=True):
        if following - start > CHUNK:
            yield slice(start, end)
            start = end


def _judged(name: str, judge: PairwiseReward, model: Sequence[Media], base: Sequence[Media], prompts: Sequence[Prompt]) -> BothOrders:
    for media in (model, base):
        scoring.check_inputs(judge.spec, media, prompts, name)
    return ask_both_orders(judge, model, base, prompts)
