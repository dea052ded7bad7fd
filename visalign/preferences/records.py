"""What one judgement is: a prompt, K candidates and how good each was found; and a data set of them, with what was wrong with the rest.

Rows are counted from 0 in the order of the source, so that a message, a cache and a training run mean the same row.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from visalign.preferences.candidates import Candidate
from visalign.types import Prompt

logger = logging.getLogger(__name__)

Fault = Literal["tie", "missing file", "unreadable", "size", "empty prompt", "judgement", "candidates", "latents", "format"]
Ties = Literal["error", "skip", "keep"]
Broken = Literal["error", "skip"]
Content = Literal["latents", "media"]
_MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One judgement.

    Attributes:
        prompt: of all candidates; ``metadata`` holds ``user`` and ``weight`` where the source gives them, and its other columns.
        candidates: K of them.
        scores: K numbers, larger is better; only their order has a meaning unless the source says more.
        row: in the source.
        user: who judged, where that is known.
        weight: of this judgement in a loss.
    """

    prompt: Prompt
    candidates: tuple[Candidate, ...]
    scores: tuple[float, ...]
    row: int
    user: str | None = None
    weight: float = 1.0

    @property
    def is_tie(self) -> bool:
        """Whether the judgement prefers nothing: all K scores are equal."""
        return min(self.scores) == max(self.scores)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used."""

    row: int
    fault: Fault
    message: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.message}"


class PreferenceError(ValueError):
    """Every row that cannot be used, in ``problems``; the message shows the first 20 and how many there are of each kind."""

    def __init__(self, source: str, problems: Sequence[Problem], remedy: str = "") -> None:
        self.problems = sorted(problems, key=lambda problem: problem.row)
        lines = [f"  - {problem}" for problem in self.problems[:_MAX_SHOWN]]
        lines += [f"  - ... and {len(self.problems) - _MAX_SHOWN} more"] if len(self.problems) > _MAX_SHOWN else []
        noun = "1 row" if len(self.problems) == 1 else f"{len(self.problems)} rows"
        head = f"{noun} of {source} cannot be used ({describe_faults(count_faults(problems))}):"
        super().__init__("\n".join([head, *lines, *([remedy] if remedy else [])]))


class RowError(ValueError):
    """What is wrong with the row being read; ``fault`` says of which kind."""

    def __init__(self, fault: Fault, message: str) -> None:
        self.fault: Fault = fault
        super().__init__(message)


@dataclass(frozen=True)
class PreferenceDataset:
    """Judgements over the same number K of candidates each.

    Attributes:
        source: where they are from, for messages.
        records: at least one; a training run's "rows" are positions here, not ``PreferenceRecord.row``.
        dropped: rows of the source that were left out, counted by what is wrong with them.
    """

    source: str
    records: tuple[PreferenceRecord, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.records:
            left = f" ({describe_faults(self.dropped)} left out)" if self.dropped else ""
            raise ValueError(f"no preferences in {self.source}: not one usable row{left}")
        sizes = {len(record.candidates) for record in self.records}
        if len(sizes) > 1 or min(sizes) < 1 or any(len(record.scores) != len(record.candidates) for record in self.records):
            raise ValueError(f"{self.source}: the records of one data set have one number of candidates, with a score each; got "
                             f"{sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_candidates(self) -> int:
        """K, the ``group_size`` of a run that trains on this."""
        return len(self.records[0].candidates)

    @property
    def prompts(self) -> list[Prompt]:
        """One per record, in their order: the prompts of a run that trains on this."""
        return [record.prompt for record in self.records]

    @property
    def users(self) -> list[str | None]:
        return [record.user for record in self.records]

    def summary(self) -> str:
        """One line: how many judgements of how many candidates, how many were left out and why."""
        left = f"; left out: {describe_faults(self.dropped)}" if self.dropped else ""
        ties = sum(record.is_tie for record in self.records)
        return f"{len(self)} judgements of {self.num_candidates} candidates" + f", {ties} of them ties" * (ties > 0) + left

    def without(self, problems: Sequence[Problem], broken: Broken, remedy: str) -> PreferenceDataset:
        """The data set without these rows (numbered as in the source).

        Raises:
            PreferenceError: there are some, and ``broken`` is "error".
            ValueError: nothing is left.
        """
        if not problems:
            return self
        if broken == "error":
            raise PreferenceError(self.source, problems, remedy)
        rows = {problem.row for problem in problems}
        kept = PreferenceDataset(self.source, tuple(record for record in self.records if record.row not in rows),
                                 dict(Counter(self.dropped) + count_faults(problems)))
        logger.warning("%s: left out %s; the first: %s", self.source, describe_faults(count_faults(problems)), problems[0])
        return kept


def collect(source: str, rows: Iterable[PreferenceRecord | Problem], *, ties: Ties, broken: Broken) -> PreferenceDataset:
    """A data set from rows as a reader gives them.

    The number of candidates is the most frequent one; rows with another are problems.

    Args:
        ties: what to do with judgements whose scores are all equal.
        broken: what to do with rows that cannot be used.
    Raises:
        PreferenceError: there are rows to complain about; all of them are in it.
        ValueError: an unknown policy, or no usable row.
    """
    for name, value, allowed in (("ties", ties, get_args(Ties)), ("broken", broken, get_args(Broken))):
        if value not in allowed:
            raise ValueError(f"{name} '{value}': use {', '.join(allowed)}")
    records: list[PreferenceRecord] = []
    problems: list[Problem] = []
    for found in rows:
        if isinstance(found, PreferenceRecord):
            records.append(found)
        else:
            problems.append(found)
    sizes = Counter(len(record.candidates) for record in records)
    usual = min(sizes, key=lambda size: (-sizes[size], size)) if sizes else 0
    problems += [Problem(record.row, "candidates", f"{len(record.candidates)} candidates where the other rows have {usual}")
                 for record in records if len(record.candidates) != usual]
    records = [record for record in records if len(record.candidates) == usual]
    tied = [Problem(record.row, "tie", f"a tie: {usual} candidates with the score {record.scores[0]:g}")
            for record in records if record.is_tie and usual > 1]
    complaints = (problems if broken == "error" else []) + (tied if ties == "error" else [])
    if complaints:
        ways = ["ties='skip' leaves ties out, ties='keep' keeps them"] * any(p.fault == "tie" for p in complaints)
        ways += ["broken='skip' leaves the other rows out"] * any(p.fault != "tie" for p in complaints)
        raise PreferenceError(source, complaints, "; ".join(ways))
    out = {problem.row for problem in tied} if ties == "skip" else set()
    dropped = count_faults([*problems, *(tied if ties == "skip" else [])])
    if dropped:
        logger.warning("%s: left out %s", source, describe_faults(dropped))
    return PreferenceDataset(source, tuple(record for record in records if record.row not in out), dict(dropped))


def count_faults(problems: Iterable[Problem]) -> Counter[str]:
    return Counter(problem.fault for problem in problems)


def describe_faults(counts: Mapping[str, int]) -> str:
    """``3 tie, 1 unreadable``, the most frequent first."""
    return ", ".join(f"{count} {fault}" for fault, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
