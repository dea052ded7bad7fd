"""The tables people publish preferences in, each as data: which columns hold what.

| format | media | judgement |
|---|---|---|
| pickapic | ``jpg_0``, ``jpg_1``: encoded bytes | ``label_0``: 1 the first is better, 0 the second, 0.5 a tie |
| hpd | ``image_path`` or ``file_path``: a list of paths | ``human_preference``: 1 for the preferred one, or its index |
| hpd, its test set | the same | ``rank``: places, 1 the best |
| hpd, version 3 | ``path1``, ``path2`` | the first is preferred |
| align_anything | ``image_1``, ``image_2``; also ``video_``, ``audio_`` and ``_path`` | ``better_id`` or ``overall_...``: 1 or 2, 0 a tie |

Sources: Pick-a-Pic, arXiv:2305.01569; HPDv2, arXiv:2306.09341; HPDv3, arXiv:2508.03789; Align-Anything, arXiv:2412.15838.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visalign.preferences.judgements import as_scores, scores_of_choice, scores_of_ranking
from visalign.preferences.records import RowError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        signature: columns that tell it from the others.
        prompt: columns of the prompt, the first that is there counts.
        columns: columns that may hold media; those that are there do, in this order.
        scores: (row, K) to K scores, larger is better.
        user: column of who judged.
        suffix: of media kept as bytes.
    """

    signature: tuple[str, ...]
    prompt: tuple[str, ...]
    columns: tuple[str, ...]
    scores: Callable[[Row, int], tuple[float, ...]]
    user: str | None = None
    suffix: str = ".png"

    def media(self, row: Row) -> list[Any]:
        """What the row gives as media: one list, or one per column."""
        given = [row[column] for column in self.columns if row.get(column) is not None]
        return list(given[0]) if len(given) == 1 and isinstance(given[0], list) else given


def sniff(columns: Sequence[str], format: str | None = None) -> Layout | None:
    """The layout (of this format) with these columns, if one is known."""
    known = [layout for name, layouts in FORMATS.items() if format in (None, name) for layout in layouts]
    return next((layout for layout in known if layout.signature and set(layout.signature) <= set(columns)
                 and any(column in columns for column in layout.columns)), None)


def _pick_a_pic(row: Row, num: int) -> tuple[float, ...]:
    label = row.get("label_0")
    if row.get("has_label") is False or label is None:
        raise RowError("judgement", "the row has no label")
    first, second = as_scores([label, row.get("label_1", 1 - label if isinstance(label, int | float) else None)], num, "label_0, label_1")
    if first not in (0.0, 0.5, 1.0) or not math.isclose(first + second, 1):
        raise RowError("judgement", f"labels are 1 and 0, 0 and 1, or 0.5 each, got label_0 {first:g} and label_1 {second:g}")
    return first, second


def _hpd(row: Row, num: int) -> tuple[float, ...]:
    if (ranking := row.get("rank")) is not None:
        return scores_of_ranking(ranking, num, "rank")
    judged = row.get("human_preference")
    if isinstance(judged, int) and not isinstance(judged, bool):
        return scores_of_choice(judged, num, "human_preference")
    if judged is None:
        raise RowError("judgement", "the row has neither 'human_preference' nor 'rank'")
    return as_scores(judged, num, "human_preference")


def _first_is_better(row: Row, num: int) -> tuple[float, ...]:
    return scores_of_choice(0, num, "path1")


def _one_or_two(row: Row, num: int) -> tuple[float, ...]:
    given = [key for key in _CHOICES if row.get(key) is not None]
    if not given:
        raise RowError("judgement", f"the row has none of {', '.join(_CHOICES)}")
    choice = row[given[0]]
    choice = int(choice) if isinstance(choice, str) and choice.strip().isdigit() else choice
    if choice not in (0, 1, 2) or isinstance(choice, bool):
        raise RowError("judgement", f"'{given[0]}' is 1 or 2 for the better one, 0 for a tie, got {choice!r}")
    return (0.5,) * num if choice == 0 else scores_of_choice(int(choice) - 1, num, given[0])


_CHOICES = ("better_id", "overall_preference", "overall_response", "overall_image", "overall_video", "overall_audio")


def _align_anything(kind: str, path: str, suffix: str) -> Layout:
    columns = (f"{kind}_1{path}", f"{kind}_2{path}")
    return Layout(columns, ("prompt", "question", "prompt_text"), columns, _one_or_two, suffix=suffix)


_LISTS = ("image_path", "file_path")
FORMATS: Mapping[str, tuple[Layout, ...]] = {
    "pickapic": (Layout(("caption", "jpg_0", "jpg_1", "label_0"), ("caption",), ("jpg_0", "jpg_1"), _pick_a_pic, "user_id", ".jpg"),),
    "hpd": (Layout(("prompt", "path1", "path2"), ("prompt",), ("path1", "path2"), _first_is_better),
            Layout(("prompt", "human_preference"), ("prompt",), _LISTS, _hpd, "user_hash"),
            Layout(("prompt", "rank"), ("prompt",), _LISTS, _hpd, "user_hash")),
    "align_anything": tuple(_align_anything(kind, path, suffix) for path in ("", "_path")
                            for kind, suffix in (("image", ".png"), ("video", ".mp4"), ("audio", ".wav"))),
}
