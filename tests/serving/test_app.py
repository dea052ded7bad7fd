"""The server's HTTP: who may ask, how much, and what each refusal says. Real sockets on loopback."""

import http.client
import json
import socket
import threading
from urllib.parse import urlsplit

import pytest
import torch

from tests.rewards.serving import Serving
from visalign.protocols import RewardSpec
from visalign.rewards.captions import CaptionVerifier
from visalign.rewards.distribution import VendiScore
from visalign.rewards.function import FunctionReward
from visalign.rewards.jpeg import JpegCompressibility
from visalign.rewards.pairwise import BradleyTerry
from visalign.serving.app import MAX_UNDER_WAY, RewardServer
from visalign.serving.settings import ServerConfig
from visalign.types import Media, Prompt, Scores
from visalign.wire.answers import unpack_answer
from visalign.wire.rows import PairRow, ScoreRow, pack_prompts, pack_rows

IMAGE = Media("image", torch.zeros(3, 8, 8, dtype=torch.uint8))
SOUND = Media("audio", torch.zeros(1, 8), rate=8.0)
ONE = pack_rows([ScoreRow(IMAGE, Prompt("a red circle"), 0)], ("raw",))


def ask(server, method, path, body=None, **headers):
    """Status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def refusal(server, path, body=ONE, status=None, **headers):
    found, _, answer = ask(server, "POST", path, body, **headers)
    assert found == status, answer
    return json.loads(answer)["error"]["message"]


@pytest.fixture(scope="module")
def server():
    judge = BradleyTerry(JpegCompressibility())
    with Serving({"jpeg": JpegCompressibility(), "captions": CaptionVerifier(), "judge": judge}, max_mb=0.01, max_samples=4) as serving:
        yield serving


def test_health_needs_no_token_and_the_rest_does():
    with Serving({"jpeg": JpegCompressibility()}, token="s3cret") as server:
        assert json.loads(ask(server, "GET", "/v1/health")[2]) == {"status": "ok", "version": 1}
        for headers in ({}, {"Authorization": "Basic s3cret"}, {"Authorization": "Bearer"}):
            status, told, body = ask(server, "GET", "/v1/spec", **headers)
            assert (status, told["WWW-Authenticate"]) == (401, "Bearer")
            assert "token_env" in json.loads(body)["error"]["message"]
            assert "this server wants a token" in refusal(server, "/v1/score/jpeg", status=401, **headers)
        assert "not the server's token" in refusal(server, "/v1/score/jpeg", status=403, Authorization="Bearer s3cre")
        assert ask(server, "GET", "/v1/spec", Authorization="bearer s3cret")[0] == 200


def test_the_right_token_opens():
    with Serving({"jpeg": JpegCompressibility()}, token="s3cret") as server:
        status, headers, body = ask(server, "POST", "/v1/score/jpeg", ONE, Authorization="Bearer s3cret")
    assert (status, headers["Content-Type"]) == (200, "application/vnd.safetensors")
    expected = JpegCompressibility().score([IMAGE], [Prompt("")], [0])
    assert torch.equal(unpack_answer(body, 1)[0].value, expected.value)


def test_the_catalogue(server):
    told = json.loads(ask(server, "GET", "/v1/spec")[2])
    assert list(told["rewards"]) == ["jpeg", "captions", "judge"]
    assert [part["checks_prompts"] for part in told["rewards"].values()] == [False, True, False]
    assert told["rewards"]["jpeg"]["spec"]["direction"] == -1
    assert told["rewards"]["jpeg"]["spec"]["raw_range"] == [0.0, None]
    assert told["limits"] == {"max_bytes": 10485, "max_samples": 4, "max_batch": 32}


@pytest.mark.parametrize(("path", "status", "message"), [
    ("/v1/score/clip", 404, "no reward 'clip' here; there are jpeg, captions, judge"),
    ("/v1/rank/jpeg", 404, "no such task 'rank'"),
    ("/v1/compare/jpeg", 404, "'jpeg' scores samples; ask score"), ("/v1/score/judge", 404, "'judge' compares pairs; ask compare"),
    ("/v2/score/jpeg", 404, "this side speaks version 1 of the reward protocol, the other side 2"), ("/score", 404, "Not Found"),
    ("/v1/health", 405, "Method Not Allowed"),
])
def test_places_that_are_not_there(server, path, status, message):
    assert message in refusal(server, path, status=status)


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"", 400, "no safetensors file"), (b"\x80\x04pickle", 400, "no safetensors file"),
    (pack_rows([], ("raw",)), 422, "a request without samples"),
    (pack_rows([ScoreRow(SOUND, Prompt("a"), 0)], ("raw",)), 422,
     "reward 'jpeg', sample 0: it reads image and video, not audio; use another reward for this model"),
    (pack_rows([ScoreRow(Media("image", torch.zeros(3, 8, 8)), Prompt("a"), 0)], ("raw",)), 422, "expected uint8 (3, H, W) RGB; convert"),
    (pack_rows([ScoreRow(IMAGE, Prompt("a"), 0), ScoreRow(IMAGE, Prompt("b"), 0)], ("raw",)), 422, "a group shares one prompt"),
    (pack_rows([ScoreRow(IMAGE, Prompt("a"), 0)] * 5, ("raw",)), 413, "5 rows in one request; this server takes 4"),
    (pack_rows([ScoreRow(Media("image", torch.zeros(3, 64, 64, dtype=torch.uint8)), Prompt("a"), 0)], ("png",)), 413,
     "12288 bytes once decoded"),
    (bytes(20_000), 413, "20000 bytes in one request; this server takes 10485"),
])
def test_requests_that_are_refused(server, body, status, message):
    assert message in refusal(server, "/v1/score/jpeg", body, status)


def test_a_bodys_length_is_refused_before_it_comes(server):
    """Headers alone: the answer is there although not one byte of the body is."""
    with socket.create_connection(server.socket.getsockname()) as raw:
        raw.sendall(b"POST /v1/score/jpeg HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        answer = raw.makefile("rb").readline()
    assert b" 413 " in answer


def test_a_body_without_length_is_cut_off_at_the_limit(server):
    def endless():
        for _ in range(20):
            yield bytes(1000)

    assert "more than 10485 bytes in one request" in refusal(server, "/v1/score/jpeg", endless(), 413)


def test_prompts_are_checked_by_the_reward_itself(server):
    good, bad = (pack_prompts(list(map(Prompt, texts)), ("raw",)) for texts in (["a red circle"], ["a red circle", "the meaning of life"]))
    assert ask(server, "POST", "/v1/check/captions", good)[0] == 200
    assert "the meaning of life" in refusal(server, "/v1/check/captions", bad, 422)
    body = pack_rows([ScoreRow(IMAGE, Prompt("the meaning of life"), 0)], ("raw",))
    assert "the meaning of life" in refusal(server, "/v1/score/captions", body, 422)
    assert "the text is empty" in refusal(server, "/v1/check/captions", pack_prompts([Prompt("")], ("raw",)), 422)


def test_pairs(server):
    noise = Media("image", torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    status, _, body = ask(server, "POST", "/v1/compare/judge", pack_rows([PairRow(IMAGE, noise, Prompt("a"))], ("raw",)))
    assert status == 200
    expected = BradleyTerry(JpegCompressibility()).compare([IMAGE], [noise], [Prompt("a")])
    assert torch.equal(unpack_answer(body, 1)[0].raw, expected.prob_first)
    wrong = pack_rows([PairRow(IMAGE, SOUND, Prompt("a"))], ("raw",))
    assert "sample 0: it reads image and video, not audio" in refusal(server, "/v1/compare/judge", wrong, 422)


def test_an_error_of_the_server_itself_is_500_and_tells_nothing():
    class Broken(FunctionReward):
        def check_prompts(self, prompts):
            raise KeyError("secret path")

    with Serving({"broken": Broken(lambda media, prompts: [0.0] * len(media))}) as server:
        status, _, body = ask(server, "POST", "/v1/score/broken", ONE)
        assert status == 500
        assert b"secret" not in body
        assert ask(server, "GET", "/v1/health")[0] == 200


class Held:
    """Scores once it is let go."""

    def __init__(self):
        self.spec = RewardSpec(name="held")
        self.entered, self.gate, self.seen = threading.Event(), threading.Event(), []

    def score(self, media, prompts, group_id):
        self.entered.set()
        assert self.gate.wait(60)
        self.seen += [prompt.text for prompt in prompts]
        return Scores.from_values([1.0] * len(media))


def in_background(server, text):
    found = []
    body = pack_rows([ScoreRow(IMAGE, Prompt(text), 0)], ("raw",))
    thread = threading.Thread(target=lambda: found.append(ask(server, "POST", "/v1/score/held", body)))
    thread.start()
    return thread, found


def until(condition):
    """Poll; the test's own time limit is the only one."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.002)


def test_a_busy_server_says_when_to_come_back_and_a_closing_one_finishes_what_waits():
    held = Held()
    server = Serving({"held": held}, max_batch=1, max_waiting=1, max_wait_ms=0)
    with server:
        first, one = in_background(server, "first")
        held.entered.wait()
        second, two = in_background(server, "second")
        until(lambda: server.server.batchers["held"].waiting == 1)
        status, headers, body = ask(server, "POST", "/v1/score/held", ONE)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "1 samples wait for 'held'" in json.loads(body)["error"]["message"]
        server.uvicorn.should_exit = True
        held.gate.set()
        for thread in (first, second):
            thread.join()
    assert [one[0][0], two[0][0]] == [200, 200]
    assert held.seen == ["first", "second"]


def test_who_hangs_up_is_not_worked_for():
    held = Held()
    with Serving({"held": held}, max_batch=1, max_wait_ms=0) as server:
        thread, found = in_background(server, "first")
        held.entered.wait()
        leaving = socket.create_connection(server.socket.getsockname())
        body = pack_rows([ScoreRow(IMAGE, Prompt("leaving"), 0)], ("raw",))
        leaving.sendall(b"POST /v1/score/held HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: server.server.batchers["held"].waiting == 1)
        leaving.close()
        until(lambda: server.server.batchers["held"].waiting == 0)
        held.gate.set()
        thread.join()
    assert found[0][0] == 200
    assert held.seen == ["first"]


def test_bodies_under_way_are_counted_and_given_back():
    server = RewardServer({"jpeg": JpegCompressibility()}, ServerConfig(max_mb=1.0))

    class Announced:
        headers = {"content-length": str(2**20)}  # noqa: RUF012

    from visalign.serving.batching import OverloadedError

    rooms = [server._room_for(Announced()) for _ in range(MAX_UNDER_WAY + 1)]
    for room in rooms[:-1]:
        room.__enter__()
    with pytest.raises(OverloadedError, match="too many large requests"):
        rooms[-1].__enter__()
    rooms[0].__exit__(None, None, None)
    rooms[-1].__enter__()
    assert server.bytes_under_way == MAX_UNDER_WAY * 2**20


def test_set_level_rewards_stay_in_their_run():
    def encode(media):
        return torch.zeros(len(media), 2)

    with pytest.raises(ValueError, match="'vendi' judges whole sets"):
        RewardServer({"vendi": VendiScore(encode)}, ServerConfig())
