"""UniGenBench's prompt files: prompts with test points, one dimension and one description each.

    index,prompt,sub_dims                        also prompt_en, sub_dims_en, prompt_zh, sub_dims_zh
    0,"two pandas, ink painting","{""Testpoints"": [""Style"", ""Attribute - Quantity""],
                                   ""Testpoint Description"": [""ink painting"", ""two pandas""], ""Subjects"": ""Animal"", ...}"

A prompt's ``metadata["testpoints"]`` is then ``[{"dimension": "Style", "description": "ink painting"}, ...]``; the other keys of
``sub_dims`` stand beside it as they are. Source: UniGenBench, arXiv:2508.20751 and arXiv:2510.18701.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visalign.types import Prompt

logger = logging.getLogger(__name__)

TESTPOINTS = "testpoints"
_SUFFIXES = ("", "_en", "_zh")
_POINTS, _DESCRIPTIONS = ("Testpoints", "考点"), ("Testpoint Description", "考点对应描述")


def read_rows(path: Path) -> tuple[list[Prompt], list[str]]:
    """Prompts of a file, and what is wrong with it, one message per bad row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        return [], [f"not a CSV file in UTF-8: {error}"]
    suffix = next((one for one in _SUFFIXES if f"prompt{one}" in columns and f"sub_dims{one}" in columns), None)
    if suffix is None:
        return [], [f"columns {', '.join(columns) or 'none'}; expected UniGenBench's index, prompt and sub_dims, or prompt_en and "
                    "sub_dims_en"]
    prompts, problems = [], []
    for number, row in enumerate(rows):
        try:
            prompts.append(_prompt(row[f"prompt{suffix}"], row[f"sub_dims{suffix}"], row.get("index") or str(number)))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    return prompts, problems


def _prompt(text: str | None, sub_dims: str | None, index: str) -> Prompt:
    if not text or not text.strip():
        raise ValueError("the prompt is empty")
    try:
        given = json.loads(sub_dims or "")
    except json.JSONDecodeError as error:
        raise ValueError(f"sub_dims is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(given, dict):
        raise ValueError(f"sub_dims must be an object, got {type(given).__name__}")
    points, descriptions = (_texts(given, names) for names in (_POINTS, _DESCRIPTIONS))
    if len(descriptions) < len(points):
        raise ValueError(f"{len(points)} test points and {len(descriptions)} descriptions; expected one description each")
    if len(descriptions) > len(points):  # the benchmark's own scripts pair them by position and never read the rest
        logger.warning("prompt %s has %d test points and %d descriptions; the last ones belong to no point", index, len(points),
                       len(descriptions))
    rest = {key: value for key, value in given.items() if key not in (*_POINTS, *_DESCRIPTIONS)}
    paired = [{"dimension": point.strip(), "description": text} for point, text in zip(points, descriptions, strict=False)]
    return Prompt(text.strip(), metadata={"index": index, **rest, TESTPOINTS: paired})


def _texts(given: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    found = next((given[name] for name in names if name in given), None)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"'{names[0]}' must be a list of texts, got {found!r}")
    return found
