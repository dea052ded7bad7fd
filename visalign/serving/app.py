"""The reward server's HTTP: who may ask, how much at once, and which status says what.

    400  not a request of this protocol, or of another version of it        404  no such reward
    401  no token, 403 the wrong one                                        413  too large
    422  the reward cannot read this (the admission check's own message)    503  busy, with Retry-After

A sample that the reward fails about is no error: it comes back invalid, with its reason.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from visalign.protocols import PairwiseReward, Reward
from visalign.scoring import ChecksPrompts, check_inputs, check_prompts
from visalign.serving.batching import Batcher, OverloadedError
from visalign.serving.settings import ServerConfig
from visalign.wire.answers import pack_answer
from visalign.wire.body import CONTENT_TYPE, VERSION, TooLargeError, VersionError, WireError
from visalign.wire.media import encodings
from visalign.wire.rows import PairRow, Row, unpack_prompts, unpack_rows
from visalign.wire.schema import Catalogue, LimitsPart, RewardPart, SpecPart

logger = logging.getLogger(__name__)

MAX_UNDER_WAY = 8  # requests of the largest size whose bodies may be in memory


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


class RewardServer:
    """Rewards by name behind one token.

    Args:
        rewards: loaded; each is called by one thread of its own.
        token: what ``Authorization: Bearer`` must bring; ``None`` asks for none.
    Raises:
        ValueError: a reward that judges whole sets.
    """

    def __init__(self, rewards: Mapping[str, Reward | PairwiseReward], settings: ServerConfig, token: str | None = None) -> None:
        for name, reward in rewards.items():
            if not isinstance(reward, Reward | PairwiseReward):
                raise ValueError(f"'{name}' judges whole sets against exemplars and a memory, which belong to a run and its checkpoints; "
                                 "list it in the run itself")
        self.settings, self.token = settings, token
        self.batchers = {name: Batcher(name, reward, settings) for name, reward in rewards.items()}
        self.bytes_under_way = 0

    def app(self) -> FastAPI:
        """The application; its queues start and end with it."""
        app = FastAPI(title="visalign rewards", version=str(VERSION), lifespan=self._lifespan, docs_url=None, redoc_url=None,
                      openapi_url=None)
        app.add_api_route("/v1/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/v1/spec", self.spec, methods=["GET"], response_model=None)
        app.add_api_route("/v1/{task}/{name:path}", self.ask, methods=["POST"], response_model=None)
        app.add_exception_handler(RefusedError, _refused)
        app.add_exception_handler(HTTPException, _no_such_route)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        workers = [asyncio.create_task(batcher.run()) for batcher in self.batchers.values()]
        yield
        # Every request has been answered by now, so nothing waits.
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def health(self) -> Response:
        return JSONResponse({"status": "ok", "version": VERSION})

    async def spec(self, request: Request) -> Response:
        self._authorise(request)
        limits = LimitsPart(max_bytes=self.settings.max_bytes, max_samples=self.settings.max_samples, max_batch=self.settings.max_batch)
        parts = {name: RewardPart(spec=SpecPart.of(one.reward.spec), checks_prompts=isinstance(one.reward, ChecksPrompts))
                 for name, one in self.batchers.items()}
        return JSONResponse(Catalogue(rewards=parts, limits=limits, encodings=encodings()).model_dump(mode="json"))

    async def ask(self, task: str, name: str, request: Request) -> Response:
        """``score``, ``compare`` or ``check``; whoever hangs up is not worked for any longer."""
        self._authorise(request)
        batcher = self._batcher(task, name)
        try:
            if task != "check":
                batcher.check_room()
            with self._room_for(request) as most:
                body = await _read(request, most)
                work = asyncio.ensure_future(self._answer(task, batcher, body))
                gone = asyncio.ensure_future(_hung_up(request))
                try:
                    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not work.done():
                        raise ClientDisconnect
                    return Response(work.result(), media_type=CONTENT_TYPE)
                finally:
                    gone.cancel()
                    work.cancel()
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except OverloadedError as error:
            raise RefusedError(503, str(error), {"Retry-After": str(error.retry_after)}) from error
        except TooLargeError as error:
            raise RefusedError(413, str(error)) from error
        except WireError as error:
            raise RefusedError(400, str(error)) from error
        except ValueError as error:
            raise RefusedError(422, str(error)) from error

    async def _answer(self, task: str, batcher: Batcher, body: bytes) -> bytes:
        """Bodies are taken apart and put together in threads: pictures would hold up everybody."""
        spec = batcher.reward.spec
        with TemporaryDirectory(prefix="visalign-") as folder:
            if task == "check":
                await run_in_threadpool(self._check_prompts, batcher, body, Path(folder))
                return b""
            rows = await run_in_threadpool(self._rows, task, batcher, body, Path(folder))
            scores = await batcher.ask(rows)
        return await run_in_threadpool(pack_answer, scores, SpecPart.of(spec))

    def _check_prompts(self, batcher: Batcher, body: bytes, folder: Path) -> None:
        prompts = unpack_prompts(body, self.settings.max_bytes, folder)
        check_prompts(batcher.reward.spec, prompts, batcher.name)
        if isinstance(batcher.reward, ChecksPrompts):
            batcher.reward.check_prompts(prompts)

    def _rows(self, task: str, batcher: Batcher, body: bytes, folder: Path) -> list[Row]:
        """What is asked, admitted as a run would admit it."""
        rows = unpack_rows(body, task == "compare", self.settings.max_bytes, folder)
        if len(rows) > self.settings.max_samples:
            raise TooLargeError(f"{len(rows)} rows in one request; this server takes {self.settings.max_samples}")
        prompts = [row.prompt for row in rows]
        check_inputs(batcher.reward.spec, [row.samples[0] for row in rows], prompts, batcher.name)
        check_inputs(batcher.reward.spec, [row.second for row in rows if isinstance(row, PairRow)],
                     [row.prompt for row in rows if isinstance(row, PairRow)], batcher.name)
        if isinstance(batcher.reward, ChecksPrompts):
            batcher.reward.check_prompts(prompts)
        return rows

    def _authorise(self, request: Request) -> None:
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise RefusedError(401, "this server wants a token: send Authorization: Bearer TOKEN (token_env of a remote reward)",
                               {"WWW-Authenticate": "Bearer"})
        if not hmac.compare_digest(given.strip().encode("utf-8"), self.token.encode("utf-8")):
            raise RefusedError(403, "this is not the server's token")

    def _batcher(self, task: str, name: str) -> Batcher:
        if task not in ("score", "compare", "check"):
            raise RefusedError(404, f"no such task '{task}'; there are score, compare and check")
        if name not in self.batchers:
            raise RefusedError(404, f"no reward '{name}' here; there are {', '.join(self.batchers)}")
        pairs = not isinstance(self.batchers[name].reward, Reward)
        if task != "check" and pairs != (task == "compare"):
            raise RefusedError(404, f"'{name}' {'compares pairs' if pairs else 'scores samples'}; ask {'compare' if pairs else 'score'}")
        return self.batchers[name]

    def _room_for(self, request: Request) -> _Room:
        length = request.headers.get("content-length", "")
        return _Room(self, int(length) if length.isdecimal() else self.settings.max_bytes)


class _Room:
    """Memory for one body, given back at the end."""

    def __init__(self, server: RewardServer, size: int) -> None:
        self.server, self.size, self.most = server, size, server.settings.max_bytes

    def __enter__(self) -> int:
        """The most bytes that may come.

        Raises:
            TooLargeError: more are announced; before one of them is read.
            OverloadedError: too many are under way.
        """
        if self.size > self.most:
            raise TooLargeError(f"{self.size} bytes in one request; this server takes {self.most}")
        if self.server.bytes_under_way + self.size > MAX_UNDER_WAY * self.most:
            raise OverloadedError("too many large requests are under way", retry_after=1)
        self.server.bytes_under_way += self.size
        return self.most

    def __exit__(self, *exception: object) -> Literal[False]:
        self.server.bytes_under_way -= self.size
        return False


async def _read(request: Request, most: int) -> bytes:
    """The body, as long as it is not too long."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise TooLargeError(f"more than {most} bytes in one request")
    return bytes(body)


async def _hung_up(request: Request) -> None:
    """Returns when the client is gone; the body has been read."""
    receive: Callable[[], Any] = request.receive
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse({"error": {"message": error.message}}, error.status, error.headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = re.match(r"/v(\d+)/", request.url.path)
    other = asked is not None and int(asked[1]) != VERSION
    message = str(VersionError(int(asked[1]))) if asked is not None and other else f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse({"error": {"message": message}}, error.status_code, dict(error.headers or {}))
