"""Processes that run simulations: a native crash, or a simulation that takes for ever, costs its own sample only.

Each worker is a fresh interpreter that runs one script on pipes. It imports neither torch nor the main program, so it starts
in a second and inherits no device, lock or half-initialised library from the training process.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


class Simulators:
    """Up to ``workers`` processes running ``script``, started when first needed and kept; ended with this object or by ``close``."""

    def __init__(self, script: Path, workers: int, timeout: float) -> None:
        """
        Args:
            script: answers each request on its standard input with one JSON line on its standard output.
            workers: how many requests run at a time.
            timeout: wall-clock seconds one request may take, the start of its process included.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="visalign-simulators-")  # simulators write log files where they run
        self._workers = [_Worker(script, Path(self._folder.name), number, timeout) for number in range(workers)]
        self._finalizer = weakref.finalize(self, _close, self._workers)

    def ask(self, requests: Sequence[bytes]) -> list[dict[str, Any]]:
        """One answer per request, in order; ``{"failed": "crashed"}`` or "timeout", with a "message", where a process gave none."""
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def one(request: bytes) -> dict[str, Any]:
            worker = idle.get()
            try:
                return worker.ask(request)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(max_workers=len(self._workers)) as threads:
            return list(threads.map(one, requests))

    def close(self) -> None:
        """End all processes; ``ask`` starts them again."""
        _close(self._workers)


class _Worker:
    """One process, replaced when it died."""

    def __init__(self, script: Path, folder: Path, number: int, timeout: float) -> None:
        self._command = [sys.executable, "-c", _START, str(script), *sys.path]
        self._folder, self._log, self._timeout = folder, folder / f"worker-{number}.log", timeout
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(self._timeout, expire)
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if line and not expired.is_set():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        if expired.is_set():
            return {"failed": "timeout", "message": f"no answer within {self._timeout:g} s"}
        printed = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"failed": "crashed", "message": f"exit status {process.returncode}" + (f": {printed[-1][:200]}" if printed else "")}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                                 cwd=self._folder, env={**os.environ, "MUJOCO_GL": "disable"})
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes and reaps
            self._process = None


def _close(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.close()
