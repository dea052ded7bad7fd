"""One reward's queue and the one thread that calls it: what waits is scored together, and fails apart.

A request is cut into parts of at most ``max_batch`` rows (groupwise rewards: of whole groups), and parts that wait at the same time share
a call while they fit. A full part therefore always has a call of its own, and the numbers of one client do not depend on another's; only
remainders are scored with strangers, where a model may round the last bits otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from visalign import scoring
from visalign.protocols import PairwiseReward, Reward
from visalign.serving.settings import ServerConfig
from visalign.types import Scores
from visalign.wire.answers import gather_scores, take_scores
from visalign.wire.rows import PairRow, Row, ScoreRow, cut

logger = logging.getLogger(__name__)


class OverloadedError(RuntimeError):
    """Too much waits; come back in ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(eq=False)
class _Part:
    """Rows that are scored in one call, and whoever waits for them."""

    rows: Sequence[Row]
    answer: asyncio.Future[Scores]


@dataclass
class Batcher:
    """``ask`` from the event loop; ``run`` is a task of the same loop.

    Attributes:
        name: of the reward, in messages.
        num_calls, num_rows: what the reward was asked so far.
    """

    name: str
    reward: Reward | PairwiseReward
    settings: ServerConfig
    num_calls: int = 0
    num_rows: int = 0
    _waiting: deque[_Part] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"reward-{self.name}")

    @property
    def waiting(self) -> int:
        """Rows that no call has taken yet."""
        return sum(len(part.rows) for part in self._waiting)

    def check_room(self, rows: int = 1) -> None:
        """Raise OverloadedError where so many more rows may not wait; an empty queue takes any request."""
        if self.waiting and self.waiting + rows > self.settings.max_waiting:
            raise OverloadedError(f"{self.waiting} samples wait for '{self.name}'", retry_after=1)

    async def ask(self, rows: Sequence[Row]) -> Scores:
        """Scores of the rows, in their order.

        Raises:
            OverloadedError: there is no room, or the reward was busy with others for too long.
            ValueError: what the reward says about the whole request.
        """
        if not rows:
            raise ValueError("a request without samples")
        self.check_room(len(rows))
        loop = asyncio.get_running_loop()
        numbers = cut(rows, self.reward.spec.arity == "groupwise", self.settings.max_batch)
        parts = [_Part([rows[number] for number in part], loop.create_future()) for part in numbers]
        self._waiting.extend(parts)
        self._arrived.set()
        timer = loop.call_later(self.settings.queue_timeout, self._give_up, parts)
        try:
            return gather_scores(await asyncio.gather(*(part.answer for part in parts)), numbers)
        finally:  # also when one part failed or whoever asked has gone: the others need not be scored
            timer.cancel()
            self._withdraw(parts)

    def _give_up(self, parts: Sequence[_Part]) -> None:
        for part in self._withdraw(parts):
            part.answer.set_exception(OverloadedError(f"'{self.name}' was busy with others for {self.settings.queue_timeout:g} s",
                                                      retry_after=1))

    def _withdraw(self, parts: Sequence[_Part]) -> list[_Part]:
        still = [part for part in parts if part in self._waiting]
        for part in still:
            self._waiting.remove(part)
        return [part for part in still if not part.answer.done()]

    async def run(self) -> None:
        """Call the reward about whatever waits, for ever; the end of the task is its cancellation."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                parts = await self._next()
                answers = await loop.run_in_executor(self._thread, self._score, [part.rows for part in parts])
                for part, answer in zip(parts, answers, strict=True):
                    if part.answer.done():
                        continue
                    if isinstance(answer, Scores):
                        part.answer.set_result(answer)
                    else:
                        part.answer.set_exception(answer)
        finally:
            self._thread.shutdown(wait=True)

    async def _next(self) -> list[_Part]:
        """Parts of at most ``max_batch`` rows together: all that fit once the batch is full, or nothing came for ``max_wait_ms``."""
        loop = asyncio.get_running_loop()
        parts: list[_Part] = []
        size, ends = 0, float("inf")
        while True:
            while self._waiting and (not parts or size + len(self._waiting[0].rows) <= self.settings.max_batch):
                parts.append(self._waiting.popleft())
                size += len(parts[-1].rows)
                ends = min(ends, loop.time() + self.settings.max_wait_ms / 1000)
            self._arrived.clear()
            if parts and (size >= self.settings.max_batch or self._waiting or loop.time() >= ends):
                if self._waiting:
                    self._arrived.set()
                return parts
            try:
                await asyncio.wait_for(self._arrived.wait(), None if not parts else max(0.0, ends - loop.time()))
            except asyncio.TimeoutError:
                continue

    def _score(self, requests: Sequence[Sequence[Row]]) -> list[Scores | Exception]:
        """One answer per request, in the reward's thread; where the call fails each request is asked about alone."""
        try:
            whole = self._call(requests)
        except Exception as error:
            if len(requests) > 1:
                return [answer for rows in requests for answer in self._score([rows])]
            # By the contract of rewards a ValueError is about how they are asked, and ends the client's run as it would in its process.
            return [error if isinstance(error, ValueError) else self._apart(requests[0], error)]
        ends = torch.tensor([len(rows) for rows in requests]).cumsum(0).tolist()
        return [take_scores(whole, range(end - len(rows), end)) for rows, end in zip(requests, ends, strict=True)]

    def _apart(self, rows: Sequence[Row], error: Exception) -> Scores:
        """Halves, and halves of those that fail again, until what cannot be scored stands alone; it is invalid."""
        halves = cut(rows, self.reward.spec.arity == "groupwise", (len(rows) + 1) // 2)
        if len(halves) == 1:
            logger.error("reward '%s' failed about one %s", self.name, "group" if len(rows) > 1 else "sample", exc_info=error)
            return Scores.from_values([None] * len(rows), reason=f"raised {type(error).__name__}")
        parts = []
        for numbers in halves:
            part = [rows[number] for number in numbers]
            try:
                parts.append(self._call([part]))
            except Exception as again:
                parts.append(self._apart(part, again))
        return gather_scores(parts, halves)

    def _call(self, requests: Sequence[Sequence[Row]]) -> Scores:
        """The reward itself, about all rows; groups of different requests are different groups."""
        self.num_calls += 1
        self.num_rows += sum(map(len, requests))
        rows = [row for request in requests for row in request]
        if isinstance(self.reward, Reward):
            samples = [row.media for row in rows if isinstance(row, ScoreRow)]
            owners = [(number, row.group) for number, request in enumerate(requests) for row in request if isinstance(row, ScoreRow)]
            group_of = {owner: group for group, owner in enumerate(dict.fromkeys(owners))}
            # Media or latents: the reward takes those that it reads.
            return scoring.score({self.name: self.reward}, media=samples, prompts=[row.prompt for row in rows],
                                 group_id=[group_of[owner] for owner in owners], latents=samples)[self.name]
        pairs = [row for row in rows if isinstance(row, PairRow)]
        answer = self.reward.compare([row.first for row in pairs], [row.second for row in pairs], [row.prompt for row in pairs])
        if not len(answer.prob_first) == len(answer.valid) == len(answer.reasons) == len(pairs):
            raise TypeError(f"judge '{self.name}' answered {len(answer.prob_first)} of {len(pairs)} comparisons")
        prob = torch.where(answer.valid, answer.prob_first.float(), torch.nan)
        return Scores(raw=prob, value=prob.clone(), valid=answer.valid, reasons=answer.reasons)
