"""Requests to several equal servers: retried where that may cure, elsewhere if one is busy or dead, over when the time is."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from visalign.rewards.servers.replicas import Replica, Replicas
from visalign.rewards.servers.transport import Response, post
from visalign.secret import read_secret

logger = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds of waiting that are worth a warning

T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of a request: the ``answer``, or the ``reason`` there is none ("timeout", "connection", "garbage", "http 500").

    Attributes:
        attempts: calls made.
        seconds: from the first call to the end of the last.
        message: what a server said beside a failure.
    """

    answer: T | None = None
    reason: str | None = None
    attempts: int = 0
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Batch:
    """What the requests given together share: until when, whether to stop, and whether it was said that they wait."""

    deadline: float
    stop: threading.Event = field(default_factory=threading.Event)
    told: threading.Event = field(default_factory=threading.Event)


class Calls:
    """Calls to replicas of one service. While no server answers, requests wait for one that does, as long as the batch's time allows.

    Args:
        urls: of the replicas, without a trailing slash.
        concurrency: calls under way at once.
        timeout: seconds for one call.
        batch_timeout: seconds for all requests given together, retries included.
        retries: further calls for a request after the first.
        pause: seconds before the first retry, doubled for each further one, with jitter; a server's Retry-After goes first.
        headers: of every request.
        name: of the service, in log messages.
    Raises:
        ValueError: names the argument that is out of range.
    """

    def __init__(self, urls: Sequence[str], *, concurrency: int, timeout: float, batch_timeout: float, retries: int, pause: float,
                 headers: Mapping[str, str] | None = None, name: str = "servers") -> None:
        for argument, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"{argument} {value} must be at least {least}")
        for argument, seconds in (("timeout", timeout), ("batch_timeout", batch_timeout), ("pause", pause)):
            if not seconds > 0:
                raise ValueError(f"{argument} {seconds} must be above 0 seconds")
        self.concurrency, self.timeout, self.batch_timeout = concurrency, timeout, batch_timeout
        self.retries, self.pause = retries, pause
        self.headers, self.name = dict(headers or {}), name
        self._replicas = Replicas([url.rstrip("/") for url in urls])
        self._jitter = random.Random()

    def each(self, items: Sequence[Item], ask: Callable[[Item, Batch], T]) -> list[T]:
        """``ask(item, batch)`` for every item, concurrently, in their order.

        The first exception ends the batch: its ``stop`` is set, and nobody waits for calls under way, which end by their deadline.
        """
        batch = Batch(deadline=time.monotonic() + self.batch_timeout)
        pool = ThreadPoolExecutor(max_workers=min(self.concurrency, max(1, len(items))), thread_name_prefix="calls")
        try:
            calls = [pool.submit(ask, item, batch) for item in items]
            for ended in wait(calls, return_when=FIRST_EXCEPTION).done:
                ended.result()
            return [call.result() for call in calls]
        finally:
            batch.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def call(self, path: str, body: bytes, read: Callable[[Response, str], T | str], batch: Batch) -> Outcome[T]:
        """POST ``body`` to ``path`` of one replica after the other until there is an answer, or no attempt or no time is left.

        Args:
            read: the answer in a response from a URL, or the reason why it is none; a reason with another status than 200 is final
                unless retrying may cure it. What it raises ends the call.
        """
        started: float | None = None
        attempts, reason, message = 0, "timeout", ""
        not_before: dict[str, float] = {}
        while attempts <= self.retries and not batch.stop.is_set():
            now = time.monotonic()
            if now >= batch.deadline:
                break
            replica, seconds = self._replicas.take(now, not_before)
            if seconds > 0:
                if now + seconds >= batch.deadline:
                    break
                self._say_it_waits(replica, seconds, batch.deadline - now, batch)
                batch.stop.wait(min(seconds, 1.0))
                continue
            started = started or now
            attempts += 1
            pause = self.pause * (0.5 + self._jitter.random())
            response: Response | None = None
            try:
                response = post(f"{replica.url}{path}", body, self.headers, min(self.timeout, batch.deadline - now))
            except TimeoutError as error:
                reason, message = "timeout", str(error)
            except ConnectionError as error:
                reason, message = "connection", str(error)
            ended = time.monotonic()
            not_before[replica.url] = ended + pause * 2 ** (attempts - 1)
            if response is None:
                self._replicas.failed(replica, ended, pause, message)
            elif response.status in (429, 503):
                self._replicas.failed(replica, ended, pause, f"{response.status} {server_message(response.body)}", response.retry_after())
            else:
                self._replicas.worked(replica)
            if response is not None:
                answer = read(response, replica.url)
                if not isinstance(answer, str):
                    return Outcome(answer=answer, attempts=attempts, seconds=ended - started)
                reason, message = answer, server_message(response.body)
                if response.status != 200 and not passes(response.status):
                    break
        return Outcome(reason=reason, attempts=attempts, seconds=0.0 if started is None else time.monotonic() - started, message=message)

    def _say_it_waits(self, replica: Replica, seconds: float, left: float, batch: Batch) -> None:
        """Once per batch: nobody should wonder for half an hour why nothing happens."""
        if seconds >= _PATIENCE and not batch.told.is_set():
            batch.told.set()
            logger.warning("%s: no server answers (%s: %s); requests wait for one that does, at most %.0f s more", self.name, replica.url,
                           replica.trouble or "busy", left)


def passes(status: int) -> bool:
    """Whether the same request may succeed later: timeouts, conflicts, limits, and every failure of a server but what it cannot do."""
    return status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 505))


def server_message(body: bytes) -> str:
    """What an error's body says, in one line of at most 300 characters."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        text = str(error.get("message") or error.get("detail") or error) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        text = body.decode("utf-8", errors="replace")
    return " ".join(text.split())[:300]


def bearer(token_env: str | None, what: str) -> dict[str, str]:
    """The header with the token (``what``) that an environment variable holds; none for ``None``.

    Raises:
        ValueError: see ``read_secret``.
    """
    return {"Authorization": f"Bearer {read_secret(token_env, what)}"} if token_env else {}


def account(reasons: Sequence[str | None], outcomes: Sequence[Outcome[Any]], cached: int) -> dict[str, float]:
    """How it went: answers out of the cache, calls made, share of questions with an answer and of each reason, latency of what was asked.

    Args:
        reasons: per question why it has no answer, or ``None``.
        outcomes: of the requests that were made.
    """
    counts = Counter(reason for reason in reasons if reason is not None)
    told = {"cached": float(cached), "calls": float(sum(outcome.attempts for outcome in outcomes)),
            "valid_rate": 1 - counts.total() / len(reasons)}
    told |= {f"failed/{reason.replace(' ', '_')}": count / len(reasons) for reason, count in sorted(counts.items())}
    seconds = [outcome.seconds for outcome in outcomes if outcome.attempts]
    if seconds:
        p50, p95 = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        told |= {"latency_p50": p50, "latency_p95": p95}
    return told
