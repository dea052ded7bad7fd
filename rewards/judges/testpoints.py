"""Test points of a prompt, each fulfilled or not: UniGenBench's question, one call per sample.

    raw = fulfilled points / points          details: the share of each dimension, "Attribute - Color"

A sample whose answer cannot be read has no points: none of them counts as failed. Tables by dimension (``breakdown``) pool points over
prompts and samples. UniGenBench's published numbers are judged by Gemini 2.5 Pro or by its own 72B model; another judge gives others, and
a checkpoint that was tuned on exact words judges best by them (``wording``). Source: UniGenBench, arXiv:2508.20751.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from visalign.protocols import RewardSpec
from visalign.rewards.judges import parsers
from visalign.rewards.judges.backends import backend_from
from visalign.rewards.judges.captions import CLOSE, NOTICE, OPEN, fill
from visalign.rewards.judges.images import files
from visalign.rewards.judges.inquiry import Inquiry, Read, scores_of
from visalign.rewards.judges.question import Answer, Backend, Question
from visalign.types import Media, MediaKind, Prompt, Scores

_WORDING = ("An image (or the frames of a video, in order) was generated from a caption. Check point by point whether it shows what the "
            f"caption asks for.\nCaption: {OPEN}{{prompt}}{CLOSE}\n{NOTICE}\n"
            "Points, each with its dimension and the part of the caption it is about:\n{points}\n"
            "Go by what is plainly visible. First say for each point in one sentence what you see. Then conclude with one list that has 1 "
            "for every point that is fulfilled and 0 for every other, in the order of the points: <score>[1, 0, ...]</score>")
_REMINDER = "Give the list alone, one 0 or 1 per point, in order: <score>[1, 0, ...]</score>"


class TestpointJudge:
    """Share of a prompt's test points (``metadata["testpoints"]``, see ``unigenbench``) that a vision-language model finds fulfilled."""

    spec = RewardSpec(name="testpoint_judge", modality=frozenset({"image", "video"}), raw_range=(0.0, 1.0),
                      requires=frozenset({"prompt", "testpoints"}))
    __test__ = False  # no test class, whatever its name suggests to pytest

    def __init__(self, backend: Backend | Mapping[str, Any], *, wording: str | None = None, modality: MediaKind = "image",
                 max_tokens: int = 4096, num_frames: int = 8, max_side: int | None = None, repairs: int = 1,
                 name: str = "testpoint_judge") -> None:
        """
        Args:
            backend: {base_urls: ..., model: ...} or {folder: ...}.
            wording: other words for the question, with ``{prompt}`` and ``{points}``, that end in ``<score>[1, 0, ...]</score>``.
            max_tokens: of an answer.
            num_frames: shown of a video.
            max_side: pictures are reduced to it; ``None`` sends them as they are.
            repairs: how often an unreadable answer is asked about again.
        Raises:
            ValueError: a parameter is wrong.
        """
        if modality not in ("image", "video"):
            raise ValueError(f"modality {modality!r} must be 'image' or 'video'")
        self.wording = _WORDING if wording is None else wording
        if missing := [slot for slot in ("{prompt}", "{points}") if slot not in self.wording]:
            raise ValueError(f"the wording lacks {' and '.join(missing)}: answers would not depend on what is asked")
        self.inquiry = Inquiry(backend_from(backend), repairs)
        self.max_tokens, self.num_frames, self.max_side = max_tokens, num_frames, max_side
        self.spec = replace(self.spec, name=name, modality=frozenset({modality}), model_ids=(self.inquiry.backend.model,))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, naming the row, for test points that cannot be asked about."""
        for row, prompt in enumerate(prompts):
            _points(prompt, f"reward '{self.spec.name}', prompt {row}")

    def points(self, prompt: Prompt) -> dict[str, int]:
        """How many test points the prompt has in each dimension."""
        return dict(Counter(dimension for dimension, _ in _points(prompt, f"reward '{self.spec.name}'")))

    def telemetry(self) -> dict[str, float]:
        """Of the latest ``score``: questions, valid rate, reasons, latency."""
        return dict(self.inquiry.telemetry)

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One share per sample, invalid with its reason where the answer is not one verdict per point.

        Raises:
            ValueError: the back end's set-up is wrong, or test points are not of their form.
        """
        asked = [_points(prompt, f"reward '{self.spec.name}', sample {row}") for row, prompt in enumerate(prompts)]
        questions = [Question(text=fill(self.wording, prompt.text, points=[f"{dimension}: {text}" for dimension, text in points]),
                              images=files(sample, self.num_frames, self.max_side), max_tokens=self.max_tokens)
                     for sample, prompt, points in zip(media, prompts, asked, strict=True)]
        readers = [_reader([dimension for dimension, _ in points]) for points in asked]
        return scores_of(self.inquiry.ask(questions, readers, _REMINDER))


def _reader(dimensions: Sequence[str]) -> Read:
    def read(answer: Answer) -> Any:
        return parsers.verdict_list(answer.text, dimensions) or "parse"

    return read


def _points(prompt: Prompt, where: str) -> list[tuple[str, str]]:
    """Dimension and description of each test point."""
    given = prompt.metadata.get("testpoints")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"{where}: testpoints must be a list of {{dimension: ..., description: ...}}, got {given!r}")
    found = []
    for one in given:
        texts = [one.get(key) for key in ("dimension", "description")] if isinstance(one, Mapping) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f'{where}: test point {one!r} must be {{"dimension": "Attribute - Color", "description": "a red ball"}}')
        found.append((str(texts[0]), str(texts[1])))
    return found
