"""Rankings, labels and choices as scores, larger is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from visalign.preferences.records import RowError


def as_scores(values: Any, num: int, what: str) -> tuple[float, ...]:
    """``num`` finite numbers.

    Raises:
        RowError: they are not.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != num:
        raise RowError("judgement", f"'{what}' needs one number per candidate, {num} of them, got {values!r}")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise RowError("judgement", f"'{what}' needs finite numbers, got {list(values)!r}")
    return tuple(float(value) for value in values)


def scores_of_ranking(ranking: Any, num: int, what: str = "ranking") -> tuple[float, ...]:
    """``ranking[k]`` is the place of candidate k, 1 the best; places may be shared or averaged. The score is its negative.

    Raises:
        RowError: not ``num`` numbers from 1 to ``num``.
    """
    places = as_scores(ranking, num, what)
    if not all(1 <= place <= num for place in places):
        raise RowError("judgement", f"'{what}' gives places from 1 (the best) to {num}, got {list(places)}")
    return tuple(-place for place in places)


def scores_of_choice(choice: int, num: int, what: str) -> tuple[float, ...]:
    """1 for the candidate that was chosen (counted from 0), 0 for the others.

    Raises:
        RowError: there is no such candidate.
    """
    if not 0 <= choice < num:
        raise RowError("judgement", f"'{what}' chooses candidate {choice} of {num}, counted from 0")
    return tuple(float(k == choice) for k in range(num))
