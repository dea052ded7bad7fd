"""A real HTTP server on loopback that answers chat completions, and misbehaves as it is told: one behaviour per request, in turn.

A behaviour is a string for the judge's words, bytes for a body as it is, a function of what ``read`` makes of the request (its JSON) that
returns such a string, bytes or a completion, or a name:
HANG, DRIP (headers at once, then a byte now and then), CLOSE, HALF (closes in the middle of the body), GARBAGE (status 200, no JSON),
HTML (a proxy's error page with status 200), TRUNCATED_JSON, EMPTY, REFUSAL, FILTERED (status 400, content filter), and any status as
an integer, or (status, seconds for Retry-After).
"""

from __future__ import annotations

import base64
import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
from PIL import Image

HANG, DRIP, CLOSE, HALF, GARBAGE, HTML, TRUNCATED_JSON, EMPTY, REFUSAL, FILTERED = (
    "<hang>", "<drip>", "<close>", "<half>", "<garbage>", "<html>", "<truncated json>", "<empty>", "<refusal>", "<filtered>")


def completion(text, finish="stop", alternatives=None, **message):
    """A chat completion; ``alternatives``: log-probability by text for the first token."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    if alternatives is not None:
        best = max(alternatives, key=alternatives.get)
        listed = [{"token": token, "logprob": value, "bytes": None} for token, value in alternatives.items()]
        choice["logprobs"] = {"content": [{"token": best, "logprob": alternatives[best], "bytes": None, "top_logprobs": listed}]}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def pictures(request):
    """The pictures of a request as the judge sees them, uint8 (H, W, 3) each."""
    urls = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    return [np.asarray(Image.open(BytesIO(base64.b64decode(url.split(",")[1])))) for url in urls]


class MisbehavingServer:
    """``with MisbehavingServer([500, "Image 1 is better."]) as server``: ``server.url``; ``server.requests`` holds what came.

    The last behaviour repeats. ``server.peak`` is how many requests were under way at once. GET answers ``page``, or behaves like POST
    if that is a list.
    """

    def __init__(self, behaviours, read=json.loads, page=b"", path="/v1"):
        self.behaviours, self.read, self.page = list(behaviours), read, page
        self.pages_asked = 0
        self.requests, self.headers = [], []
        self.peak = self.busy = 0
        self.lock, self.over = threading.Lock(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}{path}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def next(self, request, headers):
        with self.lock:
            self.requests.append(request)
            self.headers.append(headers)
            return self.behaviours[min(len(self.requests), len(self.behaviours)) - 1]

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.pages_asked += 1
                pages = server.page if isinstance(server.page, list) else [server.page]
                with suppress(OSError):  # the client left
                    self.behave(pages[min(server.pages_asked, len(pages)) - 1], None)

            def do_POST(self):
                request = server.read(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.busy += 1
                    server.peak = max(server.peak, server.busy)
                try:
                    self.behave(server.next(request, dict(self.headers)), request)
                except OSError:
                    pass  # the client left
                finally:
                    with server.lock:
                        server.busy -= 1

            def behave(self, what, request):
                if callable(what):
                    what = what(request)
                if what == HANG:
                    server.over.wait(30)
                elif isinstance(what, bytes):
                    self.send(200, what)
                elif what == DRIP:
                    self.start(200, 1000)
                    while not server.over.wait(0.02):
                        self.wfile.write(b" ")
                elif what == CLOSE:
                    self.connection.close()
                elif what == HALF:
                    self.start(200, 1000)
                    self.wfile.write(b'{"choices"')
                elif what == TRUNCATED_JSON:
                    self.send(200, json.dumps(completion("Image 1 is better."))[:-20].encode())
                elif what == FILTERED:
                    self.send(400, b'{"error": {"code": "content_filter", "message": "no"}}')
                elif isinstance(what, tuple):
                    self.send(what[0], b'{"error": {"message": "busy"}}', {"Retry-After": str(what[1])})
                elif isinstance(what, int):
                    self.send(what, b'{"error": {"message": "told to"}}')
                else:
                    bodies = {GARBAGE: b"\x00\xff not json", HTML: b"<html>Bad gateway: Image 1 is better.</html>",
                              EMPTY: json.dumps(completion("")).encode(),
                              REFUSAL: json.dumps(completion(None, refusal="I will not judge this.")).encode()}
                    body = what if isinstance(what, dict) else completion(what)
                    self.send(200, bodies.get(what) if isinstance(what, str) and what in bodies else json.dumps(body).encode())

            def start(self, status, length, headers=()):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(length))
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.end_headers()

            def send(self, status, body, headers=()):
                self.start(status, len(body), headers)
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        return Handler
