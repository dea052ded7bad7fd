"""The measured numbers of a run folder that its documents quote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from visalign.compare.comparison import Estimate


def mean_text(one: Estimate, sign: str = "") -> str:
    """A mean with the decimals that its interval leaves meaning, two digits of the interval's width."""
    return _rounded(one.mean, one, sign)


def interval_text(one: Estimate, sign: str = "") -> str:
    """``[low, high]`` with as many decimals as the mean; empty where there is no interval."""
    if one.low is None or one.high is None:
        return ""
    return f"[{_rounded(one.low, one, sign)}, {_rounded(one.high, one, sign)}]"


def _rounded(value: float, one: Estimate, sign: str) -> str:
    half = 0.0 if one.low is None or one.high is None else (one.high - one.low) / 2
    if not half > 1e-9 * abs(one.mean):
        return f"{value:{sign}.4g}"
    return f"{value:{sign}.{min(max(0, 1 - math.floor(math.log10(half))), 9)}f}"


@dataclass(frozen=True)
class Compared:
    """One metric of ``evaluation.json``: mean, low and high before, after, and of the paired gain."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    gain: Mapping[str, float]

    @property
    def sure(self) -> bool:
        """Whether the interval of the gain excludes 0."""
        return self.gain["low"] > 0 or self.gain["high"] < 0


def read_comparison(run: Path) -> dict[str, Compared]:
    """Metrics of ``evaluation.json``; empty while the run goes on."""
    path = run / "evaluation.json"
    if not path.is_file():
        return {}
    return {name: Compared(**row) for name, row in json.loads(path.read_text(encoding="utf-8")).items()}


def read_references(run: Path) -> dict[str, dict[str, float]]:
    """Means of further evaluations left beside before and after (the base with guidance, say), by their label."""
    found = {}
    for path in sorted((run / "evaluations").glob("*.json")):
        if path.stem not in ("before", "after") and not path.stem.startswith("iteration-"):
            values = json.loads(path.read_text(encoding="utf-8"))["values"]
            known = {name: [v for v in column if v is not None] for name, column in values.items()}
            found[path.stem] = {name: sum(column) / len(column) for name, column in known.items() if column}
    return found
