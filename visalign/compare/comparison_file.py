"""What a comparison of two models found, and its file: ``evaluation.json`` of ``visalign eval`` (docs/evaluation.md explains every field).

The file is these dataclasses as JSON. ``format`` changes when a field changes its meaning or goes away; new fields may come at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from visalign.compare.breakdown import Breakdown
from visalign.compare.comparison import Contrast, Wins
from visalign.compare.set_contrast import SetContrast
from visalign.resumable import write_lines

FORMAT = "visalign evaluation 1"
RESULT, PAIRS = "evaluation.json", "pairs.jsonl"


@dataclass(frozen=True)
class Side:
    """One of the two: what the user called it, what it is, and the folder of its samples."""

    name: str
    kind: Literal["run", "pipeline", "samples"]
    samples: str


@dataclass(frozen=True)
class RewardResult:
    """One reward on both sides; ``axes`` are its details. Raw scale: ``direction`` says whether larger is better (1) or smaller (-1)."""

    direction: int
    whole: Contrast | None
    axes: Mapping[str, Contrast]
    valid_base: int
    valid_model: int
    invalid: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DiversityResult:
    """``measure`` is "vendi" (of the cosines of an encoder's features) or "difference" (RMS of pixels)."""

    measure: str
    encoder: str
    within: Contrast | None
    across: SetContrast | None

    @property
    def ruler(self) -> str:
        """The encoder without the folders it was loaded from."""
        return self.encoder.rpartition("/")[2]


@dataclass(frozen=True)
class DimensionsResult:
    """Test points by primary dimension, whose macro average is the overall one, and in full detail."""

    primary: Breakdown
    detailed: Breakdown


@dataclass(frozen=True)
class ComparisonResult:
    """Everything ``visalign eval`` found.

    Attributes:
        prompts, pairs: how many different prompts, and pairs of samples with equal prompt and seed.
        seeds: the smallest and the largest number of pairs of a prompt.
        rewards, wins, sets: by reward or judge.
        by: by metadata key, then by metric (``reward`` or ``reward/axis``).
        dimensions: of rewards that judge test points.
        notes: what a reader of the numbers must know.
    """

    model: Side
    base: Side
    prompts: int
    pairs: int
    seeds: tuple[int, int]
    rewards: Mapping[str, RewardResult] = field(default_factory=dict)
    wins: Mapping[str, Wins] = field(default_factory=dict)
    diversity: DiversityResult | None = None
    sets: Mapping[str, SetContrast] = field(default_factory=dict)
    by: Mapping[str, Mapping[str, Breakdown]] = field(default_factory=dict)
    dimensions: Mapping[str, DimensionsResult] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    format: str = FORMAT


_RESULT = TypeAdapter(ComparisonResult)
_ALL_OR_NOTHING = ("strict", "correct")


def headline(metrics: Iterable[str]) -> list[str]:
    """Rewards, and the all-or-nothing axes that benchmarks quote, out of all metrics."""
    return [metric for metric in metrics if metric.partition("/")[2] in ("", *_ALL_OR_NOTHING)]


def write_result(folder: Path, result: ComparisonResult, pairs: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``evaluation.json`` and ``pairs.jsonl``, one row per pair; folders of samples become relative to ``folder``.

    Args:
        result: with absolute folders of samples.
    """
    model, base = (replace(side, samples=os.path.relpath(side.samples, folder)) for side in (result.model, result.base))
    write_lines(folder / PAIRS, [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in pairs])
    write_lines(folder / RESULT, [_RESULT.dump_json(replace(result, model=model, base=base), indent=1).decode("utf-8")])
    return folder / RESULT


def read_result(folder: Path) -> ComparisonResult:
    """Inverse of ``write_result``: folders of samples are paths again that can be opened from here.

    Raises:
        ValueError: it is of another format, or damaged.
    """
    path = folder / RESULT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found.get("format") if isinstance(found, dict) else None
        if kind != FORMAT:
            raise ValueError(f"{path} is of format {kind!r}, expected {FORMAT!r}; visalign eval writes it anew")
        result = _RESULT.validate_python(found)
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return replace(result, model=_opened(result.model, folder), base=_opened(result.base, folder))


def _opened(side: Side, folder: Path) -> Side:
    return replace(side, samples=str(folder / side.samples))


def read_pairs(folder: Path, limit: int) -> list[dict[str, Any]]:
    """The first row of ``pairs.jsonl`` of each of the first prompts."""
    path = folder / PAIRS
    found: dict[int, dict[str, Any]] = {}
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                found.setdefault(row["group"], row)
                if len(found) == limit:
                    break
    return list(found.values())
