"""An OpenAI-compatible server's chat completion, read strictly: an answer, or the reason why it is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from visalign.rewards.judges.question import Answer


def read_completion(body: bytes) -> Answer | None:
    """The first choice of a completion; ``None`` for anything else (no JSON, cut off, another schema)."""
    try:
        choice = json.loads(body)["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if content is not None and not isinstance(content, str):
            return None
        text = (content or "").strip()
        declined = bool(message.get("refusal")) or finish == "content_filter"
        return Answer(text=text, first_token=_first_token(choice.get("logprobs")), truncated=finish == "length",
                      refused=declined or (not text and finish != "length"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def is_content_filter(body: bytes) -> bool:
    """Whether an error says that the content was declined (some servers answer a refusal with status 400)."""
    try:
        error = json.loads(body)["error"]
        return "content_filter" in (error.get("code"), error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _first_token(logprobs: Any) -> Mapping[str, float] | None:
    """Alternatives of the first token, the largest where a text occurs twice; -9999 is how servers write minus infinity."""
    if not logprobs or not logprobs.get("content"):
        return None
    found: dict[str, float] = {}
    for one in logprobs["content"][0].get("top_logprobs") or ():
        value = float(one["logprob"])
        if value > -9000:
            found[one["token"]] = max(value, found.get(one["token"], value))
    return found or None
