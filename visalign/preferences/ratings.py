"""What a row says about its candidates beside the judgement: ratings by aspect, or the rewards that ``visalign pairs`` wrote down.

    metadata["ratings"] = {"colour": [0.9, 0.1], "shape": [None, 1.0]}          a number or nothing per candidate
    metadata["pair"]["rewards"] = {"captions": [1.0, 0.5], "clip": [0.3, 0.2]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from visalign.preferences.records import PreferenceRecord, RowError


def rated_aspects(record: PreferenceRecord) -> dict[str, Any]:
    """What there is by aspect, not yet checked; ratings come before rewards of the same name."""
    pair = record.prompt.metadata.get("pair")
    found: dict[str, Any] = {}
    for given in (pair.get("rewards") if isinstance(pair, Mapping) else None, record.prompt.metadata.get("ratings")):
        found |= dict(given) if isinstance(given, Mapping) else {}
    return found


def aspect_values(record: PreferenceRecord, aspect: str) -> tuple[float, ...]:
    """One number per candidate, NaN where it was not rated or the row does not know the aspect.

    Raises:
        RowError: not one finite number or null per candidate.
    """
    values, num = rated_aspects(record).get(aspect), len(record.candidates)
    if values is None:
        return (math.nan,) * num
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != num:
        raise RowError("judgement", f"ratings of '{aspect}' need a number or null per candidate, {num} of them, got {values!r}")
    if not all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in values):
        raise RowError("judgement", f"ratings of '{aspect}' need finite numbers or null, got {list(values)!r}")
    return tuple(math.nan if value is None else float(value) for value in values)
