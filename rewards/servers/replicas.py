"""Which of several equal servers to ask next."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_REST = 30.0
_LOOK_AGAIN = 0.1


@dataclass
class Replica:
    """One base URL: how many calls it is busy with, how often it failed in a row, how, and until when it is left alone."""

    url: str
    in_flight: int = 0
    failures: int = 0
    trouble: str = ""
    resting_until: float = 0.0


class Replicas:
    """Replicas of one model. The least busy of those that are not resting is next.

    One that failed rests, longer for each failure in a row, and is then tried with one call at a time until it works.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.all = tuple(Replica(url) for url in urls)
        self._lock = threading.Lock()

    def take(self, now: float, not_before: Mapping[str, float]) -> tuple[Replica, float]:
        """The replica that is free first and the seconds until it is.

        It counts as busy if that is now; otherwise ask again then, since another one may have recovered.

        Args:
            not_before: by URL, when the question at hand may go there again.
        """
        with self._lock:
            ready = {one.url: max(now + _LOOK_AGAIN * bool(one.failures and one.in_flight), one.resting_until,
                                  not_before.get(one.url, 0.0)) for one in self.all}
            chosen = min(self.all, key=lambda one: (ready[one.url], one.in_flight))
            wait = ready[chosen.url] - now
            if wait <= 0:
                chosen.in_flight += 1
            return chosen, wait

    def worked(self, replica: Replica) -> None:
        """A call ended with an answer of any kind."""
        with self._lock:
            replica.in_flight -= 1
            replica.failures = 0

    def failed(self, replica: Replica, now: float, pause: float, trouble: str = "", asked_to_wait: float | None = None) -> None:
        """A call ended without one; the replica rests ``pause``, doubled for each failure in a row, or what it asked for."""
        with self._lock:
            replica.in_flight -= 1
            rest = min(MAX_REST, pause * 2**replica.failures) if asked_to_wait is None else asked_to_wait
            replica.failures += 1
            replica.trouble = trouble
            replica.resting_until = max(replica.resting_until, now + rest)
