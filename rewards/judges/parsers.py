"""From what a judge wrote to a verdict. Every parser returns ``None`` unless the answer says one thing, in the place for it.

What a judge quotes is not its verdict: quotations are taken out before sentences and scores are looked for, so a caption that says
"answer Image 1" changes nothing when the judge repeats it. Markdown emphasis is ignored.

Sources: UnifiedReward, arXiv:2503.05236; UnifiedReward-Think, arXiv:2505.03318; Pref-GRPO, arXiv:2508.20751.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from visalign.rewards.judges.question import Verdict

# Whole, and neither a range (1-5, 1 to 5) nor the beginning of another number (1e3, 5%).
NUMBER = r"([-+]?\d+(?:\.\d+)?)(?![\d.]*\d|[-–]\d|\s+to\s+\d|e[-+]?\d|\s*%)"
_OUT_OF = r"(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?"
_QUOTATION = re.compile(r"<caption>.*?</caption>|\"[^\"\n]*\"|“[^”\n]*”|«[^»\n]*»|`[^`\n]*`|(?<![\w'])'[^'\n]*'(?!\w)",
                        re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(r"^\W*(i(?:'m| am) sorry|sorry,|i can(?:'t|not) |i(?:'m| am) (?:not able|unable) to |i won't )", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:neither|nor|not|never|cannot|whether|if)\b|n['’]t\b", re.IGNORECASE)
_TIE_WORDS = re.compile(r"\b(tie|tied|equal|equally|both|neither|draw|same)\b", re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """Whether the answer opens as a refusal does."""
    return bool(_REFUSAL.match(text.replace("’", "'")))


def own_words(text: str) -> str:
    """The text without emphasis and quotations; an answer that is one quotation as a whole is unwrapped instead."""
    plain = re.sub(r"[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}", "", text)
    rest = _QUOTATION.sub(" ", plain)
    return rest if re.search(r"\w", rest) else plain.strip().strip("\"“”«»`'")


def after_thinking(text: str) -> str | None:
    """What follows the reasoning; ``None`` if it never ends. Text without ``<think>`` is all answer."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return None if "<think>" in text else text


def unit(score: float, low: float, high: float) -> float | None:
    """``(score - low) / (high - low)``; ``None`` outside the scale."""
    return (score - low) / (high - low) if low <= score <= high else None


def better(text: str, noun: str) -> Verdict | None:
    """ "Image 1 is better" (1), "Image 2 is better" (0) or "Both images are equally good" (0.5), in the judge's own words.

    Where several are said, the last line that says one decides, if it says only one. A clause that denies or doubts ("neither Image 1
    nor Image 2 is better") and a question say none, and neither does their line.
    """
    found = re.compile(rf"\b{noun}\s*([12])\s+is\s+(?:the\s+)?better\b|\b(both {noun}s are equally good)\b", re.IGNORECASE)
    for line in reversed(own_words(text).splitlines()):
        matches = list(found.finditer(line))
        said = {match[1] or "tie" for match in matches}
        if said:
            plain = len(said) == 1 and not any(_denied(line, match) for match in matches)
            return Verdict({"1": 1.0, "2": 0.0, "tie": 0.5}[said.pop()]) if plain else None
    return None


def _denied(line: str, match: re.Match[str]) -> bool:
    """Whether the clause before a match takes it back, or its sentence is a question."""
    clause = re.split(r"[.;:!?,]", line[:match.start()])[-1]
    ending = re.search(r"[.!?]", line[match.end():])
    return bool(_DENIED.search(clause)) or (ending is not None and ending[0] == "?")


def tagged_better(text: str, noun: str) -> Verdict | None:
    """The sentence inside ``<answer>``, after the reasoning; several tags must agree."""
    answer = after_thinking(text)
    said = re.findall(r"<answer>(.*?)</answer>", answer or "", re.DOTALL | re.IGNORECASE)
    verdicts = [better(one, noun) for one in said]
    values = {verdict.value if verdict else None for verdict in verdicts}
    return verdicts[0] if len(values) == 1 else None


def final_score(text: str, low: float, high: float) -> Verdict | None:
    """``Final Score: x``, ``x/high`` or ``x out of high``; several must agree, and another scale (8/10 of 5) is none."""
    said = set(re.findall(rf"Final Score\s*:?\s*[\[(]?\s*{NUMBER}{_OUT_OF}", own_words(text), re.IGNORECASE))
    scores = {float(score) for score, _ in said}
    one_scale = all(not scale or float(scale) == high for _, scale in said)
    value = unit(next(iter(scores)), low, high) if len(scores) == 1 and one_scale else None
    return None if value is None else Verdict(value, {"score": scores.pop()})


def axis_scores(text: str, axes: Sequence[str], low: float, high: float) -> Verdict | None:
    """Lines ``Axis Score (1-5): x``, one for every axis; the value is the mean over all axes, each mapped to [0, 1]. Another scale, as
    ``(1-10)`` or ``x/10``, is none."""
    words, details = own_words(text), {}
    for axis in axes:
        said = set(re.findall(rf"\b{axis}\s+Score\s*(?:\(\s*[\d.]+\s*-\s*([\d.]+)\s*\))?\s*:\s*{NUMBER}{_OUT_OF}", words, re.IGNORECASE))
        scores = {float(value) for _, value, _ in said}
        scales = {scale for label, _, out_of in said for scale in (label, out_of) if scale}
        if len(scores) != 1 or not scales <= {f"{high:g}", f"{high:.1f}"}:
            return None
        details[axis.lower()] = scores.pop()
    values = [unit(score, low, high) for score in details.values()]
    known = [value for value in values if value is not None]
    return Verdict(sum(known) / len(known), details) if len(known) == len(axes) else None


def axis_shares(text: str, axes: Sequence[str], noun: str) -> Verdict | None:
    """Blocks ``Axis Score:`` with ``Image 1: x`` and ``Image 2: y``, where x + y = 1; the value is the mean of x over all axes."""
    words, details = own_words(text), {}
    for axis in axes:
        said = {(float(x), float(y)) for x, y in re.findall(
            rf"\b{axis}\s+Score\s*:\s*{noun}\s*1\s*:\s*{NUMBER}\s*{noun}\s*2\s*:\s*{NUMBER}", words, re.IGNORECASE)}
        if len(said) != 1:
            return None
        x, y = said.pop()
        if abs(x + y - 1) >= 0.02 or min(x, y) < 0:
            return None
        details[axis.lower()] = x
    return Verdict(min(1.0, sum(details.values()) / len(axes)), details)


def listed_scores(text: str, names: Sequence[str], high: float, combine: Literal["mean", "geometric"]) -> Verdict | None:
    """JSON with ``score``: one number in [0, high] per name; in a geometric mean one failure is a failure."""
    scores = last_object(text, "score").get("score")
    if not isinstance(scores, list) or len(scores) != len(names) or not all(_is_number(score) and 0 <= score <= high for score in scores):
        return None
    parts = [float(score) / high for score in scores]
    value = sum(parts) / len(parts) if combine == "mean" else math.prod(parts) ** (1 / len(parts))
    return Verdict(value, dict(zip(names, map(float, scores), strict=True)))


def verdict_list(text: str, names: Sequence[str]) -> Verdict | None:
    """``<score>[1, 0, ...]</score>`` after the reasoning, one 0 or 1 per name in order; several must agree.

    The value is the share of ones, the details that of each name; a name that occurs twice has the mean of its entries.
    """
    said = {re.sub(r"\s", "", one) for one in re.findall(r"<score>(.*?)</score>", after_thinking(text) or "", re.DOTALL | re.IGNORECASE)}
    if len(said) != 1:
        return None
    entries = re.fullmatch(r"\[([01](?:,[01])*)\]", said.pop())
    met = [float(entry) for entry in entries[1].split(",")] if entries else []
    if not met or len(met) != len(names):
        return None
    by_name: dict[str, list[float]] = {}
    for name, value in zip(names, met, strict=True):
        by_name.setdefault(name, []).append(value)
    return Verdict(sum(met) / len(met), {name: sum(values) / len(values) for name, values in by_name.items()})


def signed_scores(text: str, noun: str) -> Verdict | None:
    """Two signed numbers, one per image, labelled ("Edited image 1: -0.53") or alone; the value is ``sigmoid(first - second)``."""
    words = own_words(text)
    label = rf"\b{noun}\s*{{}}\b(?:\s+scores?)?\s*[:=]\s*{NUMBER}"
    labelled = [re.findall(label.format(index), words, re.IGNORECASE) for index in (1, 2)]
    if all(len(set(found)) == 1 for found in labelled):
        first, second = (float(found[0]) for found in labelled)
    else:
        bare = re.fullmatch(rf"[\s\[(]*{NUMBER}[\s,;]+{NUMBER}[\s\])]*", words)
        if bare is None:
            return None
        first, second = float(bare[1]), float(bare[2])
    gap = max(-700.0, min(700.0, first - second))
    return Verdict(1 / (1 + math.exp(-gap)), {"first": first, "second": second})


def categories(text: str, noun: str, overall_weight: float, category_weights: Sequence[float]) -> Verdict | None:
    """JSON with the ``winner`` and the ``cat_winner`` of the first categories, known by their position, not by their free names.

        value = (w_o win + sum_k w_k cat_k / sum_k w_k (1 - w_o))
    """
    answer = after_thinking(text)
    found = last_object(answer or "", "winner")
    listed = found.get("categories")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed) or len(listed) < len(category_weights):
        return None
    overall = _winner(found.get("winner"), noun)
    by_category = [_winner(one.get("cat_winner"), noun) for one in listed[:len(category_weights)]]
    known = [value for value in by_category if value is not None]
    if overall is None or len(known) < len(category_weights):
        return None
    dims = sum(weight * value for weight, value in zip(category_weights, known, strict=True)) / sum(category_weights)
    details = {"overall": overall, **{f"category_{index + 1}": value for index, value in enumerate(known)}}
    return Verdict(overall_weight * overall + (1 - overall_weight) * dims, details)


def last_object(text: str, key: str) -> dict[str, Any]:
    """The last whole JSON object in a text that has ``key``; empty if there is none. Objects inside others do not count.

    Commas before a closing bracket are forgiven: published templates show the format with one.
    """
    text = re.sub(r",(\s*[}\]])", r"\1", text)
    return next((found for found in reversed(list(_objects(text))) if key in found), {})


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, start = json.JSONDecoder(strict=False), text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except ValueError:
            end = start + 1
        else:
            if isinstance(found, dict):
                yield found
        start = text.find("{", end)


def _winner(said: Any, noun: str) -> float | None:
    """1, 0, or 0.5 for both or a tie; ``None`` for anything else."""
    words = str(said if said is not None else "").strip()
    named = {digit for pair in re.findall(rf"\b{noun}\s*([12])\b(?:\s*/\s*([12])\b)?", words, re.IGNORECASE) for digit in pair if digit}
    named = named or ({words} & {"1", "2"})
    if len(named) == 2 or (not named and _TIE_WORDS.search(words)):
        return 0.5
    return {"1": 1.0, "2": 0.0}[named.pop()] if named else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
