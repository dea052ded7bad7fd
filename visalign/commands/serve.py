"""``visalign serve-reward``: rewards over HTTP, in an environment that needs no more than they do."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from visalign.protocols import PairwiseReward, Reward
from visalign.reward_entries import load_any, parse_reward, unique_names
from visalign.secret import read_secret
from visalign.serving.settings import ServeConfig, ServerConfig, load_serve_config
from visalign.settings import validate

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run(config: str | None, rewards: list[str], options: Mapping[str, Any]) -> None:
    try:
        import uvicorn

        from visalign.serving.app import RewardServer
    except ModuleNotFoundError as error:
        raise ValueError(f"serve-reward needs {error.name}: pip install 'visalign[serve]', or fastapi and uvicorn") from None
    given = ServeConfig() if config is None else load_serve_config(config)
    settings = validate(ServerConfig, {**given.server.model_dump(), **options}, "the options of serve-reward")
    entries = unique_names([*given.rewards, *map(parse_reward, rewards)])
    if not entries:
        raise ValueError("which rewards? -r clip, -r '{name: clip, params: {model: ...}}', -r my_file.py:function, or a CONFIG that lists "
                         "rewards")
    token = read_token(settings)
    loaded: dict[str, Any] = {name: load_any(entry) for name, entry in entries.items()}
    server = RewardServer(loaded, settings, token)
    with listen(settings) as listener:
        port = listener.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        Console().print(f"serving {describe(loaded)} on http://{host}:{port}{' with a token' if token else ''}", highlight=False,
                        soft_wrap=True)
        uvicorn.Server(uvicorn.Config(server.app(), log_level="warning")).run(sockets=[listener])


def read_token(settings: ServerConfig) -> str | None:
    """The token that the environment holds.

    Raises:
        ValueError: the variable is empty, or other machines could ask without a token.
    """
    token = read_secret(settings.token_env, "the token that requests must bring") if settings.token_env else None
    if token is None and settings.host not in LOOPBACK:
        raise ValueError(f"host {settings.host} is reached by other machines; give --token-env NAME, with a token in that environment "
                         "variable, or serve on 127.0.0.1 alone")
    return token


def listen(settings: ServerConfig) -> socket.socket:
    """The open socket.

    Raises:
        ValueError: the address cannot be had.
    """
    try:
        return socket.create_server((settings.host, settings.port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another --port, or 0 for a free one"
                         ) from error


def describe(rewards: Mapping[str, Reward | PairwiseReward]) -> str:
    return ", ".join(f"{name} ({' and '.join(sorted(reward.spec.modality))})" for name, reward in rewards.items())
