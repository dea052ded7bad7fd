"""``transformers serve`` in a process of its own: a real OpenAI-compatible server on loopback."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE = 900  # seconds; a server is up in 6, and in minutes where the machine is busy


def _healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def serving(folder: str, log: Path) -> Iterator[str]:
    """The base URL of a server of the model in ``folder``, which is asked for by that path."""
    for package in ("fastapi", "uvicorn", "openai"):  # pip install 'visalign[test]' brings them
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--host", "127.0.0.1", "--port", str(port),
               "--device", "cpu"]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not _healthy(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"not healthy after {PATIENCE} s:\n{log.read_text()}"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
