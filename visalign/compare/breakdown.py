"""A score taken apart: by what a prompt says of itself (GenEval's tags), or by the points it asks for (UniGenBench's dimensions).

Both benchmarks want the share of what was fulfilled per row, pooled over everything in the row (a micro average), and are summed up in two
ways that differ where rows differ in size:

    micro = sum of what was fulfilled / sum of what was asked, over all rows          macro = mean of the rows' averages
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from visalign.compare.comparison import Contrast, Estimate
from visalign.maths.bootstrap import cluster_sums, percentiles, resampled_sums
from visalign.types import Prompt, Scores


@runtime_checkable
class JudgesPoints(Protocol):
    """A reward whose details are the shares of a prompt's points that a sample fulfils, by dimension."""

    def points(self, prompt: Prompt) -> Mapping[str, int]:
        """How many points the prompt has in each dimension."""


@dataclass(frozen=True)
class Breakdown:
    """One metric by row, and both ways to sum the rows up.

    Attributes:
        rows: in the order in which they first occur; ``samples`` of an estimate counts what was asked (samples, or points).
        micro, macro: see the head of this file.
        invalid_base, invalid_model: how much of what was asked could not be judged.
    """

    rows: Mapping[str, Contrast]
    micro: Contrast
    macro: Contrast
    invalid_base: int = 0
    invalid_model: int = 0


@dataclass(frozen=True)
class Items:
    """What is averaged, m entries each: the row it belongs to, both sets' values, how much it counts for, and its prompt."""

    labels: tuple[str, ...]
    base: Tensor
    model: Tensor
    weights: Tensor
    clusters: Tensor


def by_key(key: str, prompts: Sequence[Prompt], base: Tensor, model: Tensor, clusters: Tensor) -> Breakdown | None:
    """Means by ``Prompt.metadata[key]``; prompts without it share the row "none". ``None`` if no pair is valid.

    Args:
        prompts, base, model, clusters: one entry per pair.
    Raises:
        ValueError: see ``labels_of``.
    """
    labels = labels_of(key, prompts)
    return _breakdown(Items(labels, base.double(), model.double(), torch.ones(len(labels), dtype=torch.float64), clusters))


def labels_of(key: str, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """The row of each prompt.

    Raises:
        ValueError: no prompt has the key, or a value is not a word or a number.
    """
    values = [prompt.metadata.get(key) for prompt in prompts]
    if all(value is None for value in values):
        raise ValueError(f"no prompt has '{key}' in its metadata (there is: "
                         f"{', '.join(sorted({name for prompt in prompts for name in prompt.metadata})) or 'nothing'})")
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"metadata '{key}' is {value!r}; a table needs a word or a number per prompt")
    return tuple("none" if value is None else str(value) for value in values)


def by_dimension(reward: JudgesPoints, prompts: Sequence[Prompt], base: Scores, model: Scores, clusters: Tensor,
                 primary: bool) -> Breakdown | None:
    """Points fulfilled by dimension, or by what stands before its " - " (``primary``). ``None`` if no pair is valid."""
    asked = [(row, name, count) for row, prompt in enumerate(prompts) for name, count in reward.points(prompt).items()]
    rows = torch.tensor([row for row, _, _ in asked], dtype=torch.int64)

    def column(scores: Scores) -> Tensor:
        missing = torch.full((len(prompts),), torch.nan)
        return torch.stack([scores.details.get(name, missing)[row] for row, name, _ in asked]).double()

    labels = tuple(primary_dimension(name) if primary else name for _, name, _ in asked)
    weights = torch.tensor([count for _, _, count in asked], dtype=torch.float64)
    return _breakdown(Items(labels, column(base), column(model), weights, clusters[rows]))


def primary_dimension(name: str) -> str:
    """``Attribute`` of "Attribute - Color"; names without a second part, such as "Style", stand for themselves.

    What is in brackets does not count ("Text Generation (Case-insensitive)"), and Chinese names have no spaces around the hyphen.
    """
    plain = re.sub(r"\s*[(（].*", "", name)
    head, hyphen, _ = plain.partition(" - ")
    return head if hyphen or " " in plain else plain.partition("-")[0]


def _breakdown(items: Items) -> Breakdown | None:
    valid = torch.isfinite(items.base) & torch.isfinite(items.model)
    if not bool(valid.any()):
        return None
    names = list(dict.fromkeys(name for name, ok in zip(items.labels, valid.tolist(), strict=True) if ok))
    index = torch.tensor([names.index(name) for name, ok in zip(items.labels, valid.tolist(), strict=True) if ok])
    weight, base, model, clusters = (one[valid] for one in (items.weights, items.base, items.model, items.clusters))
    # Per cluster and row: what was asked, and what both sets fulfilled of it.
    columns = torch.zeros(len(index), len(names), 3, dtype=torch.float64)
    columns[torch.arange(len(index)), index] = torch.stack([weight, weight * base, weight * model], dim=1)
    sums = cluster_sums(columns.flatten(1).numpy(), clusters).reshape(-1, len(names), 3)
    draws = resampled_sums(sums.reshape(len(sums), -1)).reshape(-1, len(names), 3)
    total, prompts = sums.sum(axis=0), (sums[:, :, 0] > 0).sum(axis=0)
    with np.errstate(invalid="ignore"):  # a row of few prompts may be absent from a resample, which then does not count for it
        rows, rows_drawn = total[:, 1:] / total[:, :1], draws[:, :, 1:] / draws[:, :, :1]
    micro, micro_drawn = total.sum(axis=0), draws.sum(axis=1)
    asked, everyone = round(float(micro[0])), len(sums)
    return Breakdown(
        rows={name: _contrast(rows[k], rows_drawn[:, k], round(float(total[k, 0])), int(prompts[k])) for k, name in enumerate(names)},
        micro=_contrast(micro[1:] / micro[0], micro_drawn[:, 1:] / micro_drawn[:, :1], asked, everyone),
        macro=_contrast(rows.mean(axis=0), np.nanmean(rows_drawn, axis=1), asked, everyone),
        invalid_base=_missing(items, items.base), invalid_model=_missing(items, items.model))


def _contrast(value: np.ndarray, drawn: np.ndarray, samples: int, prompts: int) -> Contrast:
    """Base, model and gain from the two values (2,) and their resamples (R, 2)."""
    parts = []
    for one, draws in ((value[0], drawn[:, 0]), (value[1], drawn[:, 1]), (value[1] - value[0], drawn[:, 1] - drawn[:, 0])):
        low, high = percentiles(draws, prompts) if prompts > 1 else (None, None)
        parts.append(Estimate(float(one), low, high, samples, prompts))
    return Contrast(*parts)


def _missing(items: Items, values: Tensor) -> int:
    return round(float(items.weights[~torch.isfinite(values)].sum()))
