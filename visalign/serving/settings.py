"""The schema of ``visalign serve-reward CONFIG``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from visalign.config import NonNegative, Positive, PositiveFloat, RewardConfig, Section, read_data
from visalign.settings import validate


class ServerConfig(Section):
    """Where a server listens and how much it takes.

    Attributes:
        host, port: port 0 takes a free one. Other machines reach the server only under another host than 127.0.0.1, which wants a token.
        token_env: environment variable with the token that every request must bring; ``null`` asks for none.
        max_mb: mebibytes of one request, as it comes and decoded. Eight such requests may be under way at once.
        max_samples: samples or pairs of one request.
        max_batch: samples or pairs that a reward gets in one call.
        max_wait_ms: how long a call waits for more of them.
        max_waiting: samples or pairs that may wait for one reward; more are turned away with status 503 and a time to come back.
        queue_timeout: seconds after which what still waits is turned away likewise.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    token_env: str | None = None
    max_mb: PositiveFloat = 256.0
    max_samples: Positive = 256
    max_batch: Positive = 32
    max_wait_ms: NonNegative = 5.0
    max_waiting: Positive = 1024
    queue_timeout: PositiveFloat = 60.0

    @property
    def max_bytes(self) -> int:
        return int(self.max_mb * 2**20)


class ServeConfig(Section):
    """Rewards, listed as in a run, and the server."""

    rewards: tuple[RewardConfig, ...] = ()
    server: ServerConfig = ServerConfig()


def load_serve_config(name_or_path: str) -> ServeConfig:
    """A server's YAML.

    Raises:
        ConfigError: no such file, or values that are wrong.
    """
    data, source = read_data(name_or_path)
    return validate(ServeConfig, data, source)
