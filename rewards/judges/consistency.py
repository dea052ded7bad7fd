"""Do pictures belong together? PaCo-Reward's question, of the parts of one picture or of an edit and its source.

    p(a, b) = P(yes) / (P(yes) + P(no)) at the first token
    grid:  mean over dimensions of the mean over criteria of the mean over all pairs of parts of p
    edit:  sqrt(p(source, edited) * P(yes | the instruction was followed))

A picture of equal parts is perfectly consistent, which a policy finds out: the detail ``copies`` is the share of pairs that are the
same picture up to two grey levels; guard it. Source: PaCo-RL, arXiv:2512.04784.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from visalign.media import load_media
from visalign.protocols import RewardSpec
from visalign.rewards.judges.backends import backend_from
from visalign.rewards.judges.captions import CLOSE, NOTICE, OPEN, fill
from visalign.rewards.judges.images import png
from visalign.rewards.judges.inquiry import Inquiry, Reading, scores_of
from visalign.rewards.judges.question import Backend, Question, Verdict
from visalign.rewards.judges.rubric import yes_or_no
from visalign.types import Media, Prompt, Scores

Criteria = Mapping[str, Mapping[str, str]]

_DEFAULT: Criteria = {"consistency": {"overall": "style, logic and identity"}}
_CAPTION = f"Theme: {OPEN}{{prompt}}{CLOSE}\n{NOTICE}\n"
_TOGETHER = (_CAPTION + "Do these two images stay consistent with one another in terms of <criterion>{criterion}</criterion>? Answer Yes "
             "or No first, then give your reasons.")
_FOLLOWED = (f"Editing instruction: {OPEN}{{prompt}}{CLOSE}\n{NOTICE}\nThe first image is the source, the second is its edit. Does the "
             "edit follow the instruction? Answer Yes or No first, then give your reasons.")


class ConsistencyJudge:
    """Consistency within every sample (``grid``) or of every sample with its source image (``edit``), in [0, 1]."""

    spec = RewardSpec(name="consistency_judge", requires=frozenset({"prompt"}), raw_range=(0.0, 1.0))

    def __init__(self, backend: Backend | Mapping[str, Any], mode: Literal["grid", "edit"] = "grid", *, grid: tuple[int, int] = (2, 2),
                 criteria: Criteria | Literal["prompt"] | None = None, wording: str | None = None, top_logprobs: int = 20,
                 max_side: int | None = None, name: str = "consistency_judge") -> None:
        """
        Args:
            backend: {base_urls: ..., model: ...} (see ``judges.server:ChatServer``) or {folder: ...} (``judges.local:LocalModel``);
                it must return log-probabilities.
            mode: "grid" compares the parts of a picture, "edit" a picture with the prompt's first condition image.
            grid: rows and columns of parts.
            criteria: {dimension: {id: text}}; "prompt" reads each prompt's ``metadata["criteria"]``; ``None`` asks for style, logic and
                identity at once.
            wording: other words for the question, with ``{prompt}`` and ``{criterion}``, since a checkpoint judges best by the words it was
                tuned on.
            top_logprobs: alternatives asked for.
            max_side: pictures are reduced to it.
        Raises:
            ValueError: a parameter is wrong.
        """
        if mode not in ("grid", "edit"):
            raise ValueError(f"mode {mode!r} must be 'grid' or 'edit'")
        rows, columns = grid
        if min(rows, columns) < 1 or (mode == "grid" and rows * columns < 2):
            raise ValueError(f"grid {tuple(grid)} must have rows and columns of at least 1 and two parts, e.g. [2, 2]")
        self.wording = _TOGETHER if wording is None else wording
        missing = [slot for slot in ("{prompt}", "{criterion}") if slot not in self.wording]
        if missing:
            raise ValueError(f"the wording lacks {' and '.join(missing)}: answers would not depend on what is asked")
        self.inquiry = Inquiry(backend_from(backend), repairs=0)
        self.mode, self.grid, self.max_side, self.top_logprobs = mode, (rows, columns), max_side, top_logprobs
        self.criteria = _checked(_DEFAULT if criteria is None else criteria, f"reward '{name}'") if criteria != "prompt" else None
        self.spec = replace(self.spec, name=name, model_ids=(self.inquiry.backend.model,), version=f"1-{mode}-{rows}x{columns}",
                            requires=frozenset({"prompt"} | ({"criteria"} if criteria == "prompt" else set())))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, naming the row, for a prompt without its source image or with criteria that cannot be asked."""
        for row, prompt in enumerate(prompts):
            where = f"reward '{self.spec.name}', prompt {row}"
            if self.mode == "edit" and not prompt.images:
                raise ValueError(f'{where}: an edit is compared with its source; add "images": ["SOURCE.png"] to the prompt')
            self._criteria(prompt, where)

    def telemetry(self) -> dict[str, float]:
        """Of the latest ``score``: questions, valid rate, reasons, latency."""
        return dict(self.inquiry.telemetry)

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per sample; a sample is invalid if one of its questions has no answer.

        Raises:
            ValueError: a picture that the grid does not divide, a prompt that ``check_prompts`` refuses, or a wrong back end.
        """
        self.check_prompts(prompts)
        parts = [self._parts(sample, prompt) for sample, prompt in zip(media, prompts, strict=True)]
        asked = [self._questions(shown, prompt) for shown, prompt in zip(parts, prompts, strict=True)]
        answers = iter(self.inquiry.ask([question for questions in asked for question in questions], yes_or_no))
        readings = [self._combined([next(answers) for _ in questions], shown, prompt)
                    for questions, shown, prompt in zip(asked, parts, prompts, strict=True)]
        return scores_of(readings)

    def _criteria(self, prompt: Prompt, where: str) -> Criteria:
        return self.criteria if self.criteria is not None else _checked(prompt.metadata.get("criteria"), where)

    def _parts(self, sample: Media, prompt: Prompt) -> list[Tensor]:
        if self.mode == "edit":
            return [load_media(Path(prompt.images[0])).data, sample.data]
        rows, columns = self.grid
        height, width = sample.data.shape[1:]
        if height % rows or width % columns:
            raise ValueError(f"reward '{self.spec.name}': a grid of {rows} x {columns} does not divide an image of {height} x {width}")
        return [part for row in sample.data.chunk(rows, dim=1) for part in row.chunk(columns, dim=2)]

    def _questions(self, parts: Sequence[Tensor], prompt: Prompt) -> list[Question]:
        files = [png(part, self.max_side) for part in parts]
        texts = [fill(self.wording, prompt.text, text)
                 for dimension in self._criteria(prompt, self.spec.name).values() for text in dimension.values()]
        asked = [(text, pair) for text in texts for pair in combinations(files, 2)]
        asked += [(fill(_FOLLOWED, prompt.text), (files[0], files[1]))] if self.mode == "edit" else []
        return [Question(text=text, images=pair, max_tokens=1, top_logprobs=self.top_logprobs) for text, pair in asked]

    def _combined(self, readings: Sequence[Reading], parts: Sequence[Tensor], prompt: Prompt) -> Reading:
        failed = [reading for reading in readings if isinstance(reading, str)]
        if failed:
            return failed[0]
        values = iter([reading.value for reading in readings if isinstance(reading, Verdict)])
        pairs = list(combinations(parts, 2))
        by_dimension = {name: _mean([_mean([next(values) for _ in pairs]) for _ in dimension])
                        for name, dimension in self._criteria(prompt, self.spec.name).items()}
        together = _mean(list(by_dimension.values()))
        details = {**by_dimension, "copies": _mean([float(_is_copy(a, b)) for a, b in pairs])}
        if self.mode == "grid":
            return Verdict(together, details)
        followed = next(values)
        return Verdict(math.sqrt(together * followed), {**details, "followed": followed})


def _is_copy(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.float() - b.float()).abs().mean() <= 2)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _checked(given: Any, where: str) -> Criteria:
    if not isinstance(given, Mapping) or not given or not all(
            isinstance(one, Mapping) and one and all(isinstance(text, str) and text.strip() for text in one.values())
            for one in given.values()):
        raise ValueError(f"{where}: criteria must be {{dimension: {{id: text}}}} with at least one text each, got {given!r}")
    return given
