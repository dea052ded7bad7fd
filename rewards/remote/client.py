"""One reward of one or several equal servers: what it is, what it says about samples, and how that went."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from visalign.rewards.remote.keys import row_key
from visalign.rewards.servers.cache import AnswerCache
from visalign.rewards.servers.calls import Batch, Calls, Outcome, account, bearer, passes, server_message
from visalign.rewards.servers.transport import Response, get
from visalign.types import Prompt, Scores
from visalign.wire.answers import gather_scores, unpack_answer
from visalign.wire.body import CONTENT_TYPE, VersionError, WireError, read_head
from visalign.wire.rows import Row, cut, pack_prompts, pack_rows
from visalign.wire.schema import Catalogue, LimitsPart, RewardPart

logger = logging.getLogger(__name__)

_HINT = {401: "name the environment variable with its token in token_env", 403: "the token in token_env is not this server's",
         404: "compare scorer and the version of visalign with what visalign serve-reward says at its start",
         413: "give visalign serve-reward a larger --max-mb or --max-samples"}
_LOOK_AGAIN = 0.5
_PROMPTS_WITH_PICTURES = 16  # of one request that checks prompts


class RewardClient:
    """What it cannot get has a reason: "timeout", "connection" (refused or closed), "garbage" (no answer of this protocol), "http CODE"."""

    def __init__(self, urls: str | Sequence[str], scorer: str, *, token_env: str | None, timeout: float, batch_timeout: float, retries: int,
                 pause: float, concurrency: int, cache_dir: str | Path | None, compress: bool, startup_timeout: float) -> None:
        """As ``rewards.Remote``; asks every server what it serves."""
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        if not self.urls or not all(url.startswith(("http://", "https://")) for url in self.urls):
            raise ValueError(f"urls {self.urls} must name reward servers as http://HOST:PORT or https://HOST")
        if not startup_timeout >= 0:
            raise ValueError(f"startup_timeout {startup_timeout} must be at least 0 seconds")
        self.scorer = scorer
        headers = {"Content-Type": CONTENT_TYPE, **bearer(token_env, "the reward server's token")}
        self.calls = Calls(self.urls, concurrency=concurrency, timeout=timeout, batch_timeout=batch_timeout, retries=retries, pause=pause,
                           headers=headers, name=f"reward '{scorer}'")
        catalogues = self._catalogues(startup_timeout)
        self.part = self._part(catalogues)
        self.spec = self.part.spec.spec()
        self.limits = LimitsPart(**{limit: min(getattr(one.limits, limit) for one in catalogues.values())
                                    for limit in LimitsPart.model_fields})
        self.encodings = set.intersection(*(set(one.encodings) for one in catalogues.values())) if compress else {"raw"}
        self.cache: AnswerCache[dict[str, Any]] | None = None
        if cache_dir is not None and self.spec.arity != "groupwise":  # a group's answer is about its other members, too
            self.cache = AnswerCache(cache_dir, dump=dict, load=_entry)
        self.telemetry: dict[str, float] = {}

    def ask(self, rows: Sequence[Row], task: str) -> Scores:
        """Scores of all rows in their order, invalid with a reason where there is none; rows that the cache knows are not sent.

        Raises:
            ValueError: the server refuses what it is asked, or serves another reward by now.
        """
        if not rows:
            return Scores.from_values([])
        keys = [row_key(row, self.scorer, self.part.spec) for row in rows] if self.cache is not None else []
        entries = [self.cache.get(key) for key in keys] if self.cache is not None else [None] * len(rows)
        known = {number: entry for number, entry in enumerate(entries) if entry is not None}
        unknown = [number for number in range(len(rows)) if number not in known]
        # Half of what a request may hold: prompts, their pictures and the head want room beside the samples.
        cuts = cut([rows[number] for number in unknown], self.spec.arity == "groupwise",
                   min(self.limits.max_batch, self.limits.max_samples), self.limits.max_bytes / 2)
        numbers = [[unknown[place] for place in places] for places in cuts]

        def one(part: Sequence[int], batch: Batch) -> Outcome[Scores]:
            outcome = self._call([rows[number] for number in part], task, batch)
            if outcome.answer is not None and self.cache is not None:
                self._keep(self.cache, [keys[number] for number in part], outcome.answer)
            return outcome

        outcomes = self.calls.each(numbers, one)
        parts = [outcome.answer or Scores.from_values([None] * len(part), reason=outcome.reason or "no answer")
                 for part, outcome in zip(numbers, outcomes, strict=True)]
        if known:
            parts, numbers = [*parts, _scores_of(list(known.values()))], [*numbers, list(known)]
        scores = gather_scores(parts, numbers)
        self.telemetry = {"samples": float(len(rows)), **account(scores.reasons, outcomes, cached=len(known))}
        failed = [outcome for outcome in outcomes if outcome.answer is None]
        if failed:
            logger.warning("reward '%s': %d of %d requests were not answered, the first: %s, %s", self.scorer, len(failed), len(outcomes),
                           failed[0].reason, failed[0].message)
        return scores

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """What the reward itself says about prompts.

        Raises:
            ValueError: its message; or no server could be asked.
        """
        if not self.part.checks_prompts:
            return
        size = _PROMPTS_WITH_PICTURES if any(prompt.images for prompt in prompts) else self.limits.max_samples
        chunks = [prompts[start:start + size] for start in range(0, len(prompts), size)]

        def one(chunk: Sequence[Prompt], batch: Batch) -> Outcome[bool]:
            return self.calls.call(f"/v1/check/{quote(self.scorer)}", pack_prompts(chunk, self.encodings), lambda response, url: (
                True if response.status == 200 else self._failed(response, url)), batch)

        for outcome in self.calls.each(chunks, one):
            if outcome.answer is None:
                raise ValueError(f"reward server for '{self.scorer}' could not check the prompts: {outcome.reason}, {outcome.message}")

    def _call(self, rows: Sequence[Row], task: str, batch: Batch) -> Outcome[Scores]:

        def read(response: Response, url: str) -> Scores | str:
            if response.status != 200:
                return self._failed(response, url)
            try:
                scores, spec = unpack_answer(response.body, len(rows))
            except VersionError as error:
                raise ValueError(f"reward server {url}: {error}") from error
            except WireError as error:
                logger.debug("reward server %s: %s", url, error)
                return "garbage"
            if spec != self.part.spec:
                raise ValueError(f"reward server {url} serves another '{self.scorer}' than at the start of this run: {spec} instead of "
                                 f"{self.part.spec}; serve the same, or start a new run")
            return scores

        return self.calls.call(f"/v1/{task}/{quote(self.scorer)}", pack_rows(rows, self.encodings), read, batch)

    def _failed(self, response: Response, url: str) -> str:
        """The reason; a refusal that asking again cannot cure ends the run."""
        if 400 <= response.status < 500 and not passes(response.status):
            hint = f"; {_HINT[response.status]}" if response.status in _HINT else ""
            raise ValueError(f"reward server {url} answers {response.status}: {server_message(response.body)}{hint}")
        return f"http {response.status}"

    def _keep(self, cache: AnswerCache[dict[str, Any]], keys: Sequence[str], scores: Scores) -> None:
        """Valid scores, each on its own; float32 survives JSON exactly, and what is not finite becomes ``null``."""
        for row, key in enumerate(keys):
            if bool(scores.valid[row]):
                details = {axis: float(column[row]) for axis, column in scores.details.items()}
                cache.put(key, {"raw": float(scores.raw[row]), "value": float(scores.value[row]),
                                "details": {axis: value if math.isfinite(value) else None for axis, value in details.items()}})

    def _catalogues(self, startup_timeout: float) -> dict[str, Catalogue]:
        """What the servers that answer offer, by URL; waits for the first one.

        Raises:
            ValueError: none answers in time, or one refuses.
        """
        ends = time.monotonic() + startup_timeout
        while True:
            problems, found = [], dict[str, Catalogue]()
            for url in self.urls:
                try:
                    response = get(f"{url}/v1/spec", self.calls.headers, self.calls.timeout)
                except (TimeoutError, ConnectionError) as error:
                    problems.append(str(error))
                    continue
                if response.status == 200:
                    try:
                        found[url] = read_head(response.body, Catalogue)
                    except WireError as error:
                        raise ValueError(f"{url} is no reward server of this version: {error}") from error
                else:
                    problems.append(f"{url} answers {self._failed(response, url)}: {server_message(response.body)}")
            if found:
                for problem in problems:
                    logger.warning("reward '%s': %s; it is tried again with every request", self.scorer, problem)
                return found
            if time.monotonic() + _LOOK_AGAIN > ends:
                raise ValueError(f"no reward server answers: {'; '.join(problems)}. Start visalign serve-reward there, or wait longer for "
                                 f"it (startup_timeout is {startup_timeout:g} s)")
            time.sleep(_LOOK_AGAIN)

    def _part(self, catalogues: dict[str, Catalogue]) -> RewardPart:
        """The reward's declaration, the same at all servers."""
        parts = {}
        for url, catalogue in catalogues.items():
            if self.scorer not in catalogue.rewards:
                raise ValueError(f"{url} serves no '{self.scorer}'; it serves {', '.join(catalogue.rewards)}")
            parts[url] = catalogue.rewards[self.scorer]
        first = next(iter(parts))
        for url, part in parts.items():
            if part != parts[first]:
                raise ValueError(f"{url} and {first} serve different rewards as '{self.scorer}': {part.spec} and {parts[first].spec}; "
                                 "replicas must be equal")
        return parts[first]


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    """A cached score, checked."""
    details = {str(axis): torch.nan if value is None else float(value) for axis, value in row["details"].items()}
    return {"raw": float(row["raw"]), "value": float(row["value"]), "details": details}


def _scores_of(entries: Sequence[dict[str, Any]]) -> Scores:
    axes = dict.fromkeys(axis for entry in entries for axis in entry["details"])
    details = {axis: torch.tensor([entry["details"].get(axis, torch.nan) for entry in entries], dtype=torch.float32) for axis in axes}
    raw, value = (torch.tensor([entry[name] for entry in entries], dtype=torch.float32) for name in ("raw", "value"))
    return Scores(raw=raw, value=value, valid=torch.ones(len(entries), dtype=torch.bool), reasons=(None,) * len(entries), details=details)


