"""A reward server of ours inside this process, on loopback; and one that answers as it is told."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from pathlib import Path

import torch
import uvicorn

from tests.rewards.misbehaving_server import MisbehavingServer
from visalign.protocols import RewardSpec
from visalign.serving.app import RewardServer
from visalign.serving.settings import ServerConfig
from visalign.types import Scores
from visalign.wire.answers import pack_answer
from visalign.wire.rows import unpack_rows
from visalign.wire.schema import Catalogue, LimitsPart, RewardPart, SpecPart


class Serving:
    """``with Serving({"jpeg": reward}, token="secret", max_batch=4) as server``: ``server.url``; ``server.server`` is the RewardServer."""

    def __init__(self, rewards, token=None, **settings):
        self.server = RewardServer(rewards, ServerConfig(**settings), token)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.app(), log_level="warning"))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join()
        self.socket.close()


SPEC = SpecPart.of(RewardSpec(name="mean", modality=frozenset({"image", "audio"})))
LIMITS = LimitsPart(max_bytes=2**20, max_samples=64, max_batch=4)


def catalogue(spec=SPEC, name="mean", limits=LIMITS, **changes):
    """What GET /v1/spec says; ``changes`` replace keys of the JSON."""
    page = Catalogue(rewards={name: RewardPart(spec=spec, checks_prompts=False)}, limits=limits, encodings=("raw", "png"))
    return json.dumps({**page.model_dump(mode="json"), **changes}).encode()


def rows_of(body):
    """The rows of a request about samples."""
    with tempfile.TemporaryDirectory() as folder:
        return unpack_rows(body, False, 2**30, Path(folder))


def mean_answer(body, spec=SPEC):
    """The right answer to a request: the mean of every sample."""
    values = torch.tensor([float(row.media.data.float().mean()) for row in rows_of(body)])
    return pack_answer(Scores(values, values.clone(), torch.ones(len(values), dtype=torch.bool), (None,) * len(values)), spec)


def misbehaving(behaviours, page=None):
    """A server whose right behaviour is ``mean_answer``; behaviours as in ``MisbehavingServer``, functions get the request's bytes."""
    return MisbehavingServer(behaviours, read=bytes, page=catalogue() if page is None else page, path="")
