"""Rows of results, as the benchmarks left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def rows(name: str) -> list[dict[str, Any]]:
    """Of ``benchmarks/results/NAME.jsonl``; none where there is no such file."""
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
