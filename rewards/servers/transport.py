"""One HTTP request that is over when its time is: connecting, waiting and a body that drips in all count."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

MAX_BYTES = 32 * 2**20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Response:
    """Status, headers (names in lower case) and the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def retry_after(self) -> float | None:
        """Seconds the server asks to wait, from ``Retry-After`` as a number or a date; ``None`` where it does not say."""
        value = self.headers.get("retry-after", "").strip()
        try:
            return max(0.0, float(value))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (TypeError, ValueError):
            return None


def post(url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> Response:
    """POST ``body`` (JSON, unless a header says otherwise) and read the answer; as ``request``."""
    return request("POST", url, body, {"Content-Type": "application/json", **headers}, seconds)


def get(url: str, headers: Mapping[str, str], seconds: float) -> Response:
    """GET; as ``request``."""
    return request("GET", url, None, headers, seconds)


def request(method: str, url: str, body: bytes | None, headers: Mapping[str, str], seconds: float) -> Response:
    """Send a request and read the answer within ``seconds``, through the environment's proxy if there is one.

    Raises:
        TimeoutError: the time is over.
        ConnectionError: no connection, or one that ended before the answer did, or what came is not HTTP.
    """
    parts = urlsplit(url)
    connection, target = _connection(parts.scheme, parts.hostname or "", parts.port, parts.path or "/", seconds)
    ends = time.monotonic() + seconds
    expired = threading.Event()
    watchdog: threading.Timer | None = None
    try:
        connection.connect()
        watchdog = threading.Timer(max(0.0, ends - time.monotonic()), _end, (connection.sock, expired))
        watchdog.daemon = True
        watchdog.start()
        with suppress(BrokenPipeError):  # the server answered before it had read everything, and its answer says why
            connection.request(method, target, body=body, headers=dict(headers))
        answer = connection.getresponse()
        content = answer.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConnectionError(f"{url} sent more than {MAX_BYTES} bytes")
        if answer.length:
            raise ConnectionError(f"{url} ended {answer.length} bytes early")
        if expired.is_set():
            raise TimeoutError(f"{url} took longer than {seconds:.3g} s")
        return Response(answer.status, {name.lower(): value for name, value in answer.getheaders()}, content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if expired.is_set() or isinstance(error, TimeoutError):
            raise TimeoutError(f"{url} took longer than {seconds:.3g} s") from error
        raise ConnectionError(f"{url}: {error or type(error).__name__}") from error
    finally:
        if watchdog is not None:
            watchdog.cancel()
        connection.close()


def _end(sock: socket.socket, expired: threading.Event) -> None:
    """Wake whoever reads from or writes to the socket."""
    expired.set()
    with suppress(OSError):  # the other side was first
        sock.shutdown(socket.SHUT_RDWR)


def _connection(scheme: str, host: str, port: int | None, path: str, seconds: float) -> tuple[http.client.HTTPConnection, str]:
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    proxy = None if host in _LOOPBACK or proxy_bypass(host) else getproxies().get(scheme)
    if proxy is None:
        return kind(host, port, timeout=seconds), path
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if scheme == "https":
        tunnel = http.client.HTTPSConnection(through.hostname or "", through.port, timeout=seconds)
        tunnel.set_tunnel(host, port)
        return tunnel, path
    return http.client.HTTPConnection(through.hostname or "", through.port, timeout=seconds), f"{scheme}://{host}:{port or 80}{path}"
