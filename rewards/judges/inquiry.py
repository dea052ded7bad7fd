"""Ask a judge many questions, once each, and account for what came back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from visalign.rewards.judges.parsers import is_refusal
from visalign.rewards.judges.question import Answer, Backend, Forgets, Question, Reply, Verdict
from visalign.rewards.servers.calls import account
from visalign.types import Scores

logger = logging.getLogger(__name__)

Reading = Verdict | str
Read = Callable[[Answer], Reading]


class Inquiry:
    """Questions to one back end with one reading of its answers; ``telemetry`` tells of the latest call.

    An answer that cannot be read is put to the judge once more with a reminder of the form; what is still unreadable is "parse".

    Args:
        repairs: how often that is done.
        rechecks: how many questions of a call are asked once more, past any cache, to see whether the judge repeats itself:
            ``self_agreement`` is 1 minus the mean change of those verdicts. Only questions that were really asked are; 0 for none.
    """

    def __init__(self, backend: Backend, repairs: int = 1, rechecks: int = 0) -> None:
        if repairs < 0 or rechecks < 0:
            raise ValueError(f"repairs {repairs} and rechecks {rechecks} must be at least 0")
        self.backend = backend
        self.repairs, self.rechecks = repairs, rechecks
        self.telemetry: dict[str, float] = {}

    def ask(self, questions: Sequence[Question], read: Read | Sequence[Read], reminder: str = "") -> list[Reading]:
        """A verdict or a reason per question; equal questions are asked once.

        Args:
            read: an answer to its meaning, the same for all questions or one each.
        Raises:
            ValueError: the set-up is wrong, or the template reads log-probabilities and the server gives none at all.
        """
        reader = dict(zip(questions, read, strict=True)) if isinstance(read, Sequence) else dict.fromkeys(questions, read)
        distinct, readers = list(reader), list(reader.values())
        replies = self.backend.ask(distinct)
        readings = [_reading(*asked) for asked in zip(distinct, replies, readers, strict=True)]
        for _ in range(self.repairs if reminder else 0):
            unread = [row for row, reading in enumerate(readings) if reading == "parse"]
            if not unread:
                break
            again = [_reminded(distinct[row], replies[row], reminder) for row in unread]
            more = self.backend.ask(again)
            for row, question, reply in zip(unread, again, more, strict=True):
                distinct[row] = question
                replies[row] = replace(reply, attempts=reply.attempts + replies[row].attempts, seconds=reply.seconds + replies[row].seconds)
                readings[row] = _reading(question, reply, readers[row])
        answered = [reading for reading, reply in zip(readings, replies, strict=True) if reply.answer and not reply.answer.refused]
        if answered and all(reading == "no logprobs" for reading in answered):
            raise ValueError(f"model '{self.backend.model}' was asked for the log-probabilities of its answers and gave none; serve it "
                             "with them (vLLM does) or use a template that reads text")
        self.telemetry = {**_account(readings, replies), **self._recheck(distinct, replies, readings, readers)}
        self._warn(readings, replies)
        row_of = {question: row for row, question in enumerate(reader)}
        return [readings[row_of[question]] for question in questions]

    def _recheck(self, questions: Sequence[Question], replies: Sequence[Reply], readings: Sequence[Reading],
                 readers: Sequence[Read]) -> dict[str, float]:
        """``self_agreement`` over the first questions that were asked in this call and have a verdict; empty where none was asked again."""
        if not isinstance(self.backend, Forgets):
            return {}
        rows = [row for row, (reading, reply) in enumerate(zip(readings, replies, strict=True))
                if isinstance(reading, Verdict) and reply.attempts][:self.rechecks]
        again = self.backend.ask_afresh([questions[row] for row in rows]) if rows else []
        later = [_reading(questions[row], reply, readers[row]) for row, reply in zip(rows, again, strict=True)]
        changes = [abs(then.value - now.value) for row, now in zip(rows, later, strict=True)
                   if isinstance(now, Verdict) and isinstance(then := readings[row], Verdict)]
        return {"self_agreement": 1 - sum(changes) / len(changes), "rechecked": float(len(changes))} if changes else {}

    def _warn(self, readings: Sequence[Reading], replies: Sequence[Reply]) -> None:
        """Say how many questions have no verdict, with one example of each kind."""
        unread = [reply.answer.text for reading, reply in zip(readings, replies, strict=True) if reading == "parse" and reply.answer]
        if unread:
            logger.warning("judge '%s': %d of %d answers could not be read, the first is %.200r", self.backend.model, len(unread),
                           len(readings), unread[0])
        unanswered = [reply for reply in replies if reply.answer is None]
        if unanswered:
            causes = ", ".join(f"{count} x {reason}" for reason, count in Counter(reply.reason for reply in unanswered).most_common())
            example = next((reply.message for reply in unanswered if reply.message), "")
            logger.warning("judge '%s': %d of %d questions got no answer: %s%s", self.backend.model, len(unanswered), len(readings), causes,
                           f"; for example {example:.200}" if example else "")


def scores_of(readings: Sequence[Reading], details: bool = True) -> Scores:
    """Scores of verdicts and reasons, one per sample; details that a sample's verdict lacks are NaN."""
    verdicts = [None if isinstance(reading, str) else reading for reading in readings]
    raw = torch.tensor([torch.nan if verdict is None else verdict.value for verdict in verdicts], dtype=torch.float32)
    names = dict.fromkeys(name for verdict in verdicts if verdict for name in verdict.details) if details else {}
    columns = {name: torch.tensor([verdict.details.get(name, torch.nan) if verdict else torch.nan for verdict in verdicts],
                                  dtype=torch.float32) for name in names}
    return Scores(raw=raw, value=raw.clone(), valid=raw.isfinite(), details=columns,
                  reasons=tuple(reading if isinstance(reading, str) else None for reading in readings))


def _reading(question: Question, reply: Reply, read: Read) -> Reading:
    answer = reply.answer
    if answer is None:
        return reply.reason or "no answer"
    if answer.refused:
        return "refused"
    if question.top_logprobs:
        return read(answer)
    if answer.truncated:
        return "truncated"
    reading = read(answer)
    return "refused" if reading == "parse" and is_refusal(answer.text) else reading


def _reminded(question: Question, reply: Reply, reminder: str) -> Question:
    assert reply.answer is not None
    return replace(question, exchanges=(*question.exchanges, (reply.answer.text, reminder)))


def _account(readings: Sequence[Reading], replies: Sequence[Reply]) -> dict[str, float]:
    """Share of questions with a verdict, of each reason, and the time of those that were not in the cache."""
    if not readings:
        return {}
    cached = sum(reply.attempts == 0 and reply.answer is not None for reply in replies)
    return {"questions": float(len(readings)),
            **account([reading if isinstance(reading, str) else None for reading in readings], replies, cached)}
