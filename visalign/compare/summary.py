"""What rewards and judges said about two aligned lists of samples, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visalign.compare.breakdown import Breakdown, JudgesPoints, by_dimension, by_key
from visalign.compare.comparison import Wins, contrast, wins_of_judge, wins_of_scores
from visalign.compare.comparison_file import ComparisonResult, DimensionsResult, DiversityResult, RewardResult, Side
from visalign.compare.measurement import Answers, Panel
from visalign.compare.set_contrast import SetContrast, compare_sets
from visalign.diversity import across_prompts, within_prompts
from visalign.protocols import Measures, SetReward, ValuesSets
from visalign.types import Scores
from visalign.versions import versions


def summarise(panel: Panel, answers: Answers, model: Side, base: Side, by: Sequence[str] = (),
              notes: Sequence[str] = ()) -> ComparisonResult:
    """The answers in numbers.

    Args:
        by: metadata keys to make tables by.
    Raises:
        ValueError: no prompt has such a key, or a set-level reward gives no value.
    """
    counts = Counter(answers.clusters.tolist()).values()
    return ComparisonResult(
        model=model, base=base, prompts=len(counts), pairs=len(answers.clusters), seeds=(min(counts), max(counts)),
        rewards=_reward_results(panel, answers), wins=_win_results(panel, answers), diversity=_diversity_result(panel, answers),
        sets=_set_results(panel, answers), by={key: _breakdowns(panel, answers, key) for key in by},
        dimensions=_dimension_results(panel, answers), notes=tuple(notes), versions=versions())


def _reward_results(panel: Panel, answers: Answers) -> dict[str, RewardResult]:
    """Means and gains of rewards that score samples; dimensions of test points have a table of their own."""
    found = {}
    for name, reward in panel.rewards.items():
        if isinstance(reward, SetReward):
            continue
        base, model = answers.base[name], answers.model[name]
        shared = [] if isinstance(reward, JudgesPoints) else [axis for axis in base.details if axis in model.details]
        axes = {axis: contrast(base.details[axis], model.details[axis], answers.clusters) for axis in shared}
        reasons = Counter(reason for one in (base, model) for reason in one.reasons if reason)
        found[name] = RewardResult(reward.spec.direction, contrast(base.raw, model.raw, answers.clusters),
                                   {axis: one for axis, one in axes.items() if one is not None}, int(base.valid.sum()),
                                   int(model.valid.sum()), dict(reasons))
    return found


def _win_results(panel: Panel, answers: Answers) -> dict[str, Wins]:
    """Win rates by pointwise rewards and by judges."""
    found = {name: wins_of_scores(answers.base[name], answers.model[name], answers.clusters) for name, reward in panel.rewards.items()
             if reward.spec.arity == "pointwise"}
    judged = {name: replace(wins_of_judge(both, answers.clusters), self_agreement=answers.self_agreement.get(name))
              for name, both in answers.orders.items()}
    return {**found, **judged}


def _diversity_result(panel: Panel, answers: Answers) -> DiversityResult | None:
    """Diversity of both sides, over samples whose features are finite on both."""
    if panel.spread is None or answers.features is None:
        return None
    base, model, clusters = _finite(*answers.features, answers.clusters)
    if not len(clusters):
        return None
    measure = panel.spread.measure
    return DiversityResult(measure.name, panel.spread.encoder, within_prompts(measure, base, model, clusters),
                           across_prompts(measure, base, model, clusters))


def _set_results(panel: Panel, answers: Answers) -> dict[str, SetContrast]:
    """Set-level rewards of both sides, larger is better; over samples whose features are finite on both.

    Raises:
        ValueError: a reward gives credit for sets but no value.
    """
    found = {}
    for name, reward in panel.rewards.items():
        if not isinstance(reward, SetReward):
            continue
        if not isinstance(reward, ValuesSets):
            raise ValueError(f"'{name}' gives credit to samples but no value of a set; a set-level reward that is evaluated needs "
                             "value(features)")
        base, model, clusters = _finite(_features(answers.base[name]), _features(answers.model[name]), answers.clusters)
        if len(clusters):
            measured = [reward.measure(side) if isinstance(reward, Measures) else () for side in (base, model)]
            found[name] = replace(compare_sets(reward.value, base, model, clusters), measured_base=measured[0], measured_model=measured[1])
    return found


def _features(scores: Scores) -> Tensor:
    assert scores.features is not None, "scoring gives the features of a set-level reward"
    return scores.features


def _finite(base: Tensor, model: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    good = torch.isfinite(base).all(dim=1) & torch.isfinite(model).all(dim=1)
    return base[good], model[good], clusters[good]


def _breakdowns(panel: Panel, answers: Answers, key: str) -> dict[str, Breakdown]:
    """Every metric by a metadata key; axes that only some rows have cannot be compared between rows and are left out."""
    found: dict[str, Breakdown] = {}
    for name, reward in panel.rewards.items():
        if isinstance(reward, SetReward):
            continue
        base, model = answers.base[name], answers.model[name]
        columns = {name: (base.raw, model.raw)}
        if not isinstance(reward, JudgesPoints):
            columns |= {f"{name}/{axis}": (base.details[axis], model.details[axis]) for axis in base.details if axis in model.details}
        tables = {metric: by_key(key, answers.prompts, *pair, answers.clusters) for metric, pair in columns.items()}
        rows = max((len(table.rows) for table in tables.values() if table is not None), default=0)
        found |= {metric: table for metric, table in tables.items() if table is not None and len(table.rows) == rows}
    return found


def _dimension_results(panel: Panel, answers: Answers) -> dict[str, DimensionsResult]:
    """Tables of the rewards that judge test points."""
    found = {}
    for name, reward in panel.rewards.items():
        if isinstance(reward, JudgesPoints):
            primary, detailed = (by_dimension(reward, answers.prompts, answers.base[name], answers.model[name], answers.clusters, level)
                                 for level in (True, False))
            if primary is not None and detailed is not None:
                found[name] = DimensionsResult(primary, detailed)
    return found

