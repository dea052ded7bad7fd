"""What is asked of a judge and what comes back: the nouns that back ends, templates and rewards exchange."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from visalign.rewards.servers.calls import Outcome


@dataclass(frozen=True)
class Question:
    """One call.

    Attributes:
        text: what is asked, after the images.
        images: PNG files, in the order the text counts them.
        max_tokens: length of the answer.
        top_logprobs: how many alternatives of the first token to return with their log-probability; 0 asks for none.
        exchanges: what followed: (the judge's answer, what it was told about it).
    """

    text: str
    images: tuple[bytes, ...]
    max_tokens: int
    top_logprobs: int = 0
    exchanges: tuple[tuple[str, str], ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """Chat messages with the images as data URIs."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(image).decode("ascii")}}
            for image in self.images]
        content.append({"type": "text", "text": self.text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        for answer, remark in self.exchanges:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": remark}]
        return messages


@dataclass(frozen=True)
class Answer:
    """A judge's complete answer.

    Attributes:
        text: what it wrote; its reasoning only where the server leaves that in the text.
        first_token: log-probability of the alternatives for the first token, by text; ``None`` where the server gave none.
        truncated: it ran into ``max_tokens``.
        refused: the server says that it declined.
    """

    text: str
    first_token: Mapping[str, float] | None = None
    truncated: bool = False
    refused: bool = False


Reply = Outcome[Answer]  # what became of a question; no attempts for an answer out of the cache


@dataclass(frozen=True)
class Verdict:
    """What a template reads in an answer: ``value`` in [0, 1], larger is better (for a pair: P(first is better)), and its parts."""

    value: float
    details: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Backend(Protocol):
    """Whoever answers questions."""

    model: str

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One reply per question, in order.

        Raises ValueError where the set-up is wrong, so that no question could be answered."""


@runtime_checkable
class Forgets(Protocol):
    """A back end that can be asked as if it had never been asked before."""

    def ask_afresh(self, questions: Sequence[Question]) -> list[Reply]:
        """As ``ask``, but no answer comes from memory and none is kept."""
