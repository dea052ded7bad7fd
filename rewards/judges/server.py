"""A model behind one or several OpenAI-compatible servers (vLLM, SGLang, transformers serve, hosted ones)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from visalign.rewards.judges.completion import is_content_filter, read_completion
from visalign.rewards.judges.question import Answer, Question, Reply
from visalign.rewards.servers.cache import AnswerCache, key_of
from visalign.rewards.servers.calls import Batch, Calls, bearer, passes, server_message
from visalign.rewards.servers.transport import Response

logger = logging.getLogger(__name__)

_WRONG_SETUP = {401: "set the key's environment variable and name it in api_key_env", 403: "the key lacks access to this model",
                404: "compare base_urls (they usually end in /v1) and model with what GET /v1/models lists",
                405: "base_urls must be the address of an OpenAI-compatible API, usually ending in /v1"}


class ChatServer:
    """Asks ``POST {base_url}/chat/completions``.

    A question that gets no answer has a reason: "timeout" (the call's or the batch's time was over), "connection" (refused or closed),
    "garbage" (no completion came), "http CODE", "refused". What retrying may cure is retried, on another replica if there is one. While no
    server answers, questions wait for one that does, as long as the batch's time allows: a judge may restart.
    """

    def __init__(self, base_urls: str | Sequence[str], model: str, *, api_key_env: str | None = None, concurrency: int = 16,
                 timeout: float = 120.0, batch_timeout: float = 1800.0, retries: int = 3, pause: float = 0.5,
                 cache_dir: str | Path | None = None, temperature: float | None = 0.0,
                 max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
                 extra: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            base_urls: of servers with the same model, each up to and including ``/v1``.
            model: the name under which they serve it.
            api_key_env: environment variable that holds the key, if they want one.
            concurrency: calls under way at once.
            timeout: seconds for one call; judges that think want 180 and more.
            batch_timeout: seconds for all questions asked together, retries included.
            retries: further calls for a question after the first.
            pause: seconds before the first retry, doubled for each further one, with jitter; a server's Retry-After goes first.
            cache_dir: keeps every answer; a question with an answer there is not asked again. ``None`` keeps none.
            temperature: of the answers; ``None`` leaves it to the server, for models that take no other than their own.
            max_tokens_field: what the server calls the length of an answer; newer hosted models know "max_completion_tokens" alone.
            extra: further fields of the request, e.g. {"chat_template_kwargs": {"enable_thinking": False}}.
        Raises:
            ValueError: names the argument that is out of range, or the environment variable that is missing.
        """
        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ValueError(f"base_urls {urls} must name servers as http://HOST:PORT/v1 or https://HOST/v1")
        reserved = sorted({"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
                           "stream"} & set(extra or {}))
        if reserved:
            raise ValueError(f"extra sets {', '.join(reserved)}, which the judge sets itself; remove it")
        self.model = model
        self.extra = dict(extra or {})
        self.temperature, self.max_tokens_field = temperature, max_tokens_field
        self.cache = AnswerCache(cache_dir, asdict, lambda row: Answer(**row)) if cache_dir is not None else None
        self.calls = Calls(urls, concurrency=concurrency, timeout=timeout, batch_timeout=batch_timeout, retries=retries, pause=pause,
                           headers=bearer(api_key_env, "the judge's API key"), name=f"judge '{model}'")
        self._has_answered = False

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One reply per question; concurrent within this call, over when the batch's time is.

        Raises:
            ValueError: the servers say that the key, address or model is wrong, or turned down everything they were ever asked.
        """
        replies = self.calls.each(questions, self._reply)
        self._check_turned_down(replies)
        return replies

    def ask_afresh(self, questions: Sequence[Question]) -> list[Reply]:
        """As ``ask``, past the cache: what the judge says when asked the same again."""
        return self.calls.each(questions, self._called)

    def _request(self, question: Question) -> dict[str, Any]:
        request = {"model": self.model, "messages": question.messages(), self.max_tokens_field: question.max_tokens, **self.extra}
        request |= {} if self.temperature is None else {"temperature": self.temperature}
        return request | ({"logprobs": True, "top_logprobs": question.top_logprobs} if question.top_logprobs else {})

    def _reply(self, question: Question, batch: Batch) -> Reply:
        key = key_of(self._request(question))
        known = self.cache.get(key) if self.cache else None
        if known is not None:
            return Reply(answer=known)
        reply = self._called(question, batch)
        if reply.answer is not None and self.cache:
            self.cache.put(key, reply.answer)
        return reply

    def _called(self, question: Question, batch: Batch) -> Reply:
        reply = self.calls.call("/chat/completions", json.dumps(self._request(question)).encode("utf-8"), self._outcome, batch)
        self._has_answered = self._has_answered or reply.answer is not None
        return reply

    def _outcome(self, response: Response, url: str) -> Answer | str:
        """An answer, or the reason there is none."""
        if response.status == 200:
            return read_completion(response.body) or "garbage"
        if response.status in _WRONG_SETUP:
            raise ValueError(f"judge {url} answers {response.status} for model '{self.model}': {server_message(response.body)}; "
                             f"{_WRONG_SETUP[response.status]}")
        if is_content_filter(response.body):
            return Answer(text="", refused=True)
        return f"http {response.status}"

    def _check_turned_down(self, replies: Sequence[Reply]) -> None:
        """A request that a server cannot take (an unknown field, too many images) fails alike for every sample."""
        asked = [reply for reply in replies if reply.attempts]
        turned_down = [reply for reply in asked if reply.reason and reply.reason.startswith("http ")
                       and not passes(int(reply.reason.split()[1]))]
        for reply in turned_down[:1]:
            logger.warning("judge '%s': %d of %d questions were turned down: %s, %s", self.model, len(turned_down), len(replies),
                           reply.reason, reply.message)
        if turned_down and len(turned_down) == len(replies) and not self._has_answered:
            raise ValueError(f"judge '{self.model}' turned down every question: {turned_down[0].reason}, {turned_down[0].message}; "
                             "compare the template's needs (number of images, log-probabilities, tokens) with what the server offers")

