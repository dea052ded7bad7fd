"""The measured numbers of a run folder that its documents quote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


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
