"""Judgements as tensors, and their split into training, calibration and held-out prompts.

A prompt is on one side only. Prompts that differ in case or spacing alone are one prompt here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from visalign.preferences import PreferenceDataset, Problem
from visalign.preferences.candidates import Candidate, MediaCell, MediaFile
from visalign.preferences.ratings import aspect_values, rated_aspects
from visalign.preferences.records import Broken, PreferenceRecord, RowError


@dataclass(frozen=True)
class Examples:
    """n judgements over K candidates each.

    Attributes:
        media: int64 (n, K), rows of the table of media.
        text: int64 (n,), rows of the table of texts.
        cluster: int64 (n,), equal for equal prompts.
        scores: larger is better, float64 (n, K); only their order has a meaning.
        weight: of each judgement in a mean, float32 (n,).
        gold: a second opinion, float64 (n, K); NaN where there is none.
        ratings: float32 (n, K, A), NaN where an aspect was not rated.
    """

    media: Tensor
    text: Tensor
    cluster: Tensor
    scores: Tensor
    weight: Tensor
    gold: Tensor
    ratings: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def select(self, rows: Tensor) -> Examples:
        """Rows by mask or index."""
        return Examples(*(value[rows] for value in vars(self).values()))

    def pairs(self) -> Examples:
        """Every comparison inside every judgement, K = 2; those of one judgement share its weight."""
        size = self.media.shape[1]
        if size == 2:
            return self
        i, j = torch.tensor(list(combinations(range(size), 2))).T
        both = torch.stack([i, j], dim=1)
        repeated = replace(self, weight=self.weight / len(i)).select(torch.arange(len(self)).repeat_interleave(len(i)))

        def chosen(values: Tensor) -> Tensor:
            return values[:, both].flatten(0, 1)

        return replace(repeated, media=chosen(self.media), scores=chosen(self.scores), gold=chosen(self.gold), ratings=chosen(self.ratings))

    @property
    def label(self) -> Tensor:
        """Of pairs, int64 (n,): 1 the first is better, -1 the second, 0 a tie."""
        return torch.sign(self.scores[:, 0] - self.scores[:, 1]).long()

    @property
    def gold_label(self) -> Tensor:
        """Of pairs by the second opinion, int64 (n,); 0 also where there is none."""
        difference = self.gold[:, 0] - self.gold[:, 1]
        return torch.where(torch.isfinite(difference), torch.sign(difference), 0.0).long()


@dataclass(frozen=True)
class Corpus:
    """A data set's judgements and what they are about.

    Attributes:
        dataset: that they come from; example k is ``dataset.records[k]``.
        examples: of all records.
        media: the distinct candidates, in the order of ``Examples.media``.
        texts: the distinct prompt texts, in the order of ``Examples.text``.
        keys: what tells prompts apart, by ``Examples.cluster``.
    """

    dataset: PreferenceDataset
    examples: Examples
    media: tuple[MediaFile | MediaCell, ...]
    texts: tuple[str, ...]
    keys: tuple[str, ...]


def build_corpus(dataset: PreferenceDataset, aspects: Sequence[str] = (), gold: str | None = None, broken: Broken = "error") -> Corpus:
    """The corpus of a data set.

    Raises:
        PreferenceError: rows with latents and no media, or with ratings that are none; with ``broken`` "skip" they are left out.
        ValueError: one candidate per row, or an aspect that no row rates.
    """
    if dataset.num_candidates < 2:
        raise ValueError(f"{dataset.source}: one candidate per row; a reward is trained on comparisons of at least two")
    known = {name for record in dataset.records for name in rated_aspects(record)}
    if missing := [name for name in [*aspects, *([gold] if gold else [])] if name not in known]:
        raise ValueError(f"{dataset.source}: no row has a rating '{missing[0]}'; there are {', '.join(sorted(known)) or 'none'}. Rows give "
                         'them as "ratings": {"' + missing[0] + '": [0.9, 0.1]}, one number or null per candidate')
    asked = [*aspects, *([gold] if gold else [])]
    problems = [problem for record in dataset.records if (problem := _problem(record, asked)) is not None]
    dataset = dataset.without(problems, broken, "broken: skip leaves these rows out")
    candidates = [candidate for record in dataset.records for candidate in record.candidates]
    prompts = [record.prompt.text for record in dataset.records]
    media, text, cluster = _Distinct(map(_identity, candidates)), _Distinct(prompts), _Distinct(map(prompt_key, prompts))
    size = dataset.num_candidates
    rated = [[aspect_values(record, aspect) for aspect in aspects] for record in dataset.records]
    second = [aspect_values(record, gold) if gold else (math.nan,) * size for record in dataset.records]
    examples = Examples(
        media=media.rows.reshape(-1, size), text=text.rows, cluster=cluster.rows,
        scores=torch.tensor([record.scores for record in dataset.records], dtype=torch.float64),
        weight=torch.tensor([record.weight for record in dataset.records], dtype=torch.float32),
        gold=torch.tensor(second, dtype=torch.float64),
        ratings=torch.tensor(rated, dtype=torch.float32).reshape(len(dataset), len(aspects), size).transpose(1, 2))
    return Corpus(dataset, examples, tuple(candidates[k] for k in media.first),  # type: ignore[misc]
                  tuple(prompts[k] for k in text.first), tuple(prompt_key(prompts[k]) for k in cluster.first))


def _problem(record: PreferenceRecord, aspects: Sequence[str]) -> Problem | None:
    for candidate in record.candidates:
        if not isinstance(candidate, MediaFile | MediaCell):
            return Problem(record.row, "latents", f"{candidate.name} is a latent; a reward is trained on media: add 'media' to the row")
    try:
        for aspect in aspects:
            aspect_values(record, aspect)
    except RowError as error:
        return Problem(record.row, error.fault, str(error))
    return None


def _identity(candidate: Candidate) -> Hashable:
    """Equal for the same file or cell; media of equal content meet again in the cache of embeddings."""
    return candidate.path if isinstance(candidate, MediaFile) else candidate


class _Distinct:
    """Keys in the order of their first appearance: the row of every key, and where each row appeared first."""

    def __init__(self, keys: Iterable[Hashable]) -> None:
        row: dict[Hashable, int] = {}
        self.first: list[int] = []
        rows = []
        for position, key in enumerate(keys):
            if key not in row:
                row[key] = len(row)
                self.first.append(position)
            rows.append(row[key])
        self.rows = torch.tensor(rows)


def prompt_key(text: str) -> str:
    """The text without its case and spacing."""
    return " ".join(text.split()).casefold()
