"""How good a trained reward's preferences are on prompts it never saw, with intervals over prompts.

    accuracy   ranking accuracy; ties of the label are left out, ties of the reward count half
    ece        expected calibration error of sigmoid(log-odds), 10 bins, less its bias; "plain" is with it
    log_loss   mean -log probability of the winner, nats

Intervals are bootstraps that draw whole prompts: judgements of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visalign.maths.bootstrap import bootstrap_statistic
from visalign.maths.calibration import Calibration, calibration, fit_temperature, log_loss, ranking_accuracy
from visalign.maths.reward_noise import fit_flips
from visalign.reward_training.examples import Examples
from visalign.reward_training.features import Embeddings

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Judged:
    """Statistics of one set of labels: each a value with the ends of its 95 % interval, and the reliability table."""

    statistics: dict[str, dict[str, float]]
    count: int
    prompts: int
    table: Calibration

    def as_json(self) -> dict[str, Any]:
        rows = zip(self.table.confidence.tolist(), self.table.accuracy.tolist(), self.table.count.tolist(), strict=True)
        return {"judgements": self.count, "prompts": self.prompts, **self.statistics,
                "reliability": [{"confidence": stated, "accuracy": found, "count": int(count)} for stated, found, count in rows if count]}


def check_prompts(label: Tensor, cluster: Tensor, what: str = "heldout") -> int:
    """How many prompts have a judgement with a winner.

    Raises:
        ValueError: fewer than two.
    """
    decided = label != 0
    num_prompts = len(cluster[decided].unique())
    if num_prompts < 2:
        gold = what != "heldout"
        kind = f"judgements on which {what} has a winner" if gold else "judgements with a winner"
        raise ValueError(f"{int(decided.sum())} held-out {kind}, of {num_prompts} prompts; an interval over prompts needs two of them: "
                         f"raise data.heldout, or give more judgements{f', or leave out data.{what}' if gold else ''}")
    return num_prompts


def judge(odds: Tensor, label: Tensor, cluster: Tensor, seed: int = 0) -> Judged:
    """Statistics of log-odds (n,) against labels (n,).

    Raises:
        ValueError: fewer than two prompts have a judgement with a winner.
    """
    num_prompts, decided = check_prompts(label, cluster), label != 0
    odds, label, cluster = odds[decided], label[decided], cluster[decided]
    statistics = {
        "accuracy": lambda weight: ranking_accuracy(odds, label, weight),
        "ece": lambda weight: calibration(odds, label, weight).error,
        "log_loss": lambda weight: log_loss(odds, label, weight),
    }
    generator = torch.Generator().manual_seed(seed)
    found = {name: asdict(bootstrap_statistic(one, cluster, generator, num_resamples=NUM_RESAMPLES, reflect=name == "ece"))
             for name, one in statistics.items()}
    table = calibration(odds, label)
    found["ece"] = {key: max(0.0, value) for key, value in found["ece"].items()} | {"plain": table.error}
    return Judged(found, len(label), num_prompts, table)


def gain_over(own: Tensor, odds: Tensor, label: Tensor, cluster: Tensor, seed: int = 0) -> dict[str, float]:
    """Ranking accuracy of log-odds less that of the encoder's own score on the same judgements, with its interval."""
    decided = label != 0
    odds, own, label, cluster = odds[decided], own[decided], label[decided], cluster[decided]

    def gain(weight: Tensor) -> float:
        return ranking_accuracy(odds, label, weight) - ranking_accuracy(own, label, weight)

    return asdict(bootstrap_statistic(gain, cluster, torch.Generator().manual_seed(seed), num_resamples=NUM_RESAMPLES))


def temperature_of(odds: Tensor, label: Tensor, flip_rate: float) -> tuple[float, str]:
    """The temperature that makes log-odds of calibration pairs most likely, under flips of a known rate; 1 and why where there is none."""
    margin = (odds * label)[label != 0]
    if not len(margin):
        return 1.0, "no calibration judgements with a winner"
    try:
        return (fit_flips(margin, flip_rate).temperature if flip_rate else fit_temperature(margin, torch.ones(len(margin)))), ""
    except ValueError as error:
        return 1.0, str(error)


def encoder_odds(embeddings: Embeddings, pairs: Examples) -> Tensor | None:
    """What the encoder itself prefers, ``<m_first, t> - <m_second, t>`` of unit embeddings, (n,); ``None`` where there is no such score."""
    if embeddings.text is None or embeddings.text.shape[1] != embeddings.media.shape[1]:
        return None
    text = normalize(embeddings.text[pairs.text], dim=-1)
    first, second = normalize(embeddings.media[pairs.media], dim=-1).unbind(1)
    return ((first - second) * text).sum(dim=-1).double()


def finite(value: Any) -> Any:
    """Nested values for JSON: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
