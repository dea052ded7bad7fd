"""One yes-or-no question per criterion, answered by the probability of the first token.

    s_c = P(yes) / (P(yes) + P(no))                      1 - that for a criterion that must not hold
    raw = prod_hard g(s_c) * sum w_c s_c / sum w_c       over principles; 1 for the mean where there is none

with g(s) = 1 if s >= threshold else 0, or s itself. Source: OpenRubrics, arXiv:2510.07743.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from visalign.protocols import RewardSpec
from visalign.rewards.judges.backends import backend_from
from visalign.rewards.judges.captions import CLOSE, NOTICE, OPEN, fill
from visalign.rewards.judges.images import files
from visalign.rewards.judges.inquiry import Inquiry, Reading, scores_of
from visalign.rewards.judges.question import Answer, Backend, Question, Verdict
from visalign.rewards.judges.tokens import share
from visalign.types import Media, MediaKind, Prompt, Scores

_WORDING = (f"The image(s) were generated from a caption.\nCaption: {OPEN}{{prompt}}{CLOSE}\n{NOTICE}\n"
            "Criterion: <criterion>{criterion}</criterion>\nIs the criterion met? Answer Yes or No and nothing else.")


@dataclass(frozen=True)
class Criterion:
    """One line of a rubric.

    Attributes:
        id: name of its detail.
        text: what is to be met.
        kind: "hard" rules gate the score, "principle"s share it by ``weight``.
        polarity: -1 for what must not be met.
    """

    id: str
    text: str
    kind: Literal["hard", "principle"] = "principle"
    weight: float = 1.0
    polarity: Literal[1, -1] = 1


class RubricJudge:
    """Scores samples by a rubric, the run's or the prompt's own (``metadata["rubric"]``). Details: ``s_c`` of every criterion.

    A sample is invalid if one of its criteria has no probability: a mean over the others would be a score on another scale.
    """

    spec = RewardSpec(name="rubric_judge", modality=frozenset({"image", "video"}), requires=frozenset({"prompt"}), raw_range=(0.0, 1.0))

    def __init__(self, backend: Backend | Mapping[str, Any], rubric: Sequence[Mapping[str, Any]] | None = None, *,
                 modality: MediaKind = "image", gate: Literal["step", "soft"] = "step", threshold: float = 0.5, top_logprobs: int = 20,
                 num_frames: int = 8, max_side: int | None = None, rechecks: int = 2, name: str = "rubric_judge") -> None:
        """
        Args:
            backend: {base_urls: ..., model: ...} (see ``judges.server:ChatServer``) or {folder: ...} (``judges.local:LocalModel``);
                it must return log-probabilities and not think before it answers.
            rubric: criteria for all prompts, {text, id, kind, weight, polarity}; ``None`` reads each prompt's own.
            gate: how hard rules count, "step" at ``threshold`` or "soft".
            top_logprobs: alternatives asked for; hosted servers allow 20 at most, some 5.
            num_frames: shown of a video.
            max_side: pictures are reduced to it.
            rechecks: questions of a call that are asked twice, past any cache, to see whether the judge repeats itself.
        Raises:
            ValueError: a parameter or the rubric is wrong.
        """
        if gate not in ("step", "soft") or not 0 <= threshold <= 1:
            raise ValueError(f"gate {gate!r} must be 'step' or 'soft', and threshold {threshold} in [0, 1]")
        if modality not in ("image", "video"):
            raise ValueError(f"modality {modality!r} must be 'image' or 'video'")
        self.rubric = None if rubric is None else criteria(rubric, f"reward '{name}'")
        self.inquiry = Inquiry(backend_from(backend), repairs=0, rechecks=rechecks)
        self.gate, self.threshold, self.top_logprobs = gate, threshold, top_logprobs
        self.num_frames, self.max_side = num_frames, max_side
        self.spec = replace(self.spec, name=name, modality=frozenset({modality}), version=f"1-{gate}-{threshold:g}",
                            requires=frozenset({"prompt"} if rubric is not None else {"prompt", "rubric"}),
                            model_ids=(self.inquiry.backend.model,))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, naming the row, for a rubric that cannot be used."""
        for row, prompt in enumerate(prompts):
            self._criteria(prompt, f"reward '{self.spec.name}', prompt {row}")

    def telemetry(self) -> dict[str, float]:
        """Of the latest ``score``: questions (one per criterion), valid rate, reasons, latency."""
        return dict(self.inquiry.telemetry)

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per sample; all criteria of all samples are asked together.

        Raises:
            ValueError: the back end's set-up is wrong or it gives no log-probabilities, or a rubric cannot be used.
        """
        rubrics = [self._criteria(prompt, f"reward '{self.spec.name}', sample {row}") for row, prompt in enumerate(prompts)]
        shown = [files(sample, self.num_frames, self.max_side) for sample in media]
        questions = [Question(text=fill(_WORDING, prompt.text, one.text), images=images, max_tokens=1, top_logprobs=self.top_logprobs)
                     for images, prompt, rubric in zip(shown, prompts, rubrics, strict=True) for one in rubric]
        answers = iter(self.inquiry.ask(questions, yes_or_no))
        return scores_of([self._aggregate(rubric, [next(answers) for _ in rubric]) for rubric in rubrics])

    def _criteria(self, prompt: Prompt, where: str) -> tuple[Criterion, ...]:
        return self.rubric if self.rubric is not None else criteria(prompt.metadata.get("rubric", ()), where)

    def _aggregate(self, rubric: Sequence[Criterion], readings: Sequence[Reading]) -> Reading:
        failed = [reading for reading in readings if isinstance(reading, str)]
        if failed:
            return failed[0]
        shares = [reading.value for reading in readings if isinstance(reading, Verdict)]
        met = {one.id: value if one.polarity == 1 else 1 - value for one, value in zip(rubric, shares, strict=True)}
        gates = [met[one.id] for one in rubric if one.kind == "hard"]
        if self.gate == "step":
            gates = [float(value >= self.threshold) for value in gates]
        principles = [(one.weight, met[one.id]) for one in rubric if one.kind == "principle"]
        total = sum(weight for weight, _ in principles)
        mean = sum(weight * value for weight, value in principles) / total if principles else 1.0
        return Verdict(math.prod(gates) * mean, met)


def yes_or_no(answer: Answer) -> Reading:
    """``P(yes) / (P(yes) + P(no))`` at the first token, or the reason it cannot be told."""
    value = share(answer.first_token, ("yes",), ("no",))
    return value if isinstance(value, str) else Verdict(value)


def criteria(given: Any, where: str) -> tuple[Criterion, ...]:
    """A rubric from plain data, all its errors at once.

    Raises:
        ValueError: names the place, the line and the field.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"{where}: a rubric is a list of criteria {{text: ..., kind: hard or principle, weight: ..., polarity: 1 or -1}}, "
                         f"got {given!r}")
    problems, found = [], []
    for line, one in enumerate(given):
        if not isinstance(one, Mapping) or not str(one.get("text", "")).strip():
            problems.append(f"criterion {line} has no text")
            continue
        unknown = set(one) - {"id", "text", "kind", "weight", "polarity"}
        weight, kind, polarity = one.get("weight", 1.0), one.get("kind", "principle"), one.get("polarity", 1)
        if unknown:
            problems.append(f"criterion {line}: unknown {', '.join(sorted(map(str, unknown)))}")
        if kind not in ("hard", "principle"):
            problems.append(f"criterion {line}: kind {kind!r} is neither 'hard' nor 'principle'")
        if polarity not in (1, -1):
            problems.append(f"criterion {line}: polarity {polarity!r} is neither 1 nor -1")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            problems.append(f"criterion {line}: weight {weight!r} must be a number above 0")
        found.append(Criterion(str(one.get("id", f"criterion_{line}")), str(one["text"]), kind, weight, polarity))
    if len({one.id for one in found}) < len(found):
        problems.append("two criteria share an id")
    if problems:
        raise ValueError(f"{where}, rubric: {'; '.join(problems)}")
    return tuple(found)
