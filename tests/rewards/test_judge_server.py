"""The chat server's client against a server that misbehaves: what went wrong is said, nothing is invented, nothing is asked twice."""

import random
import subprocess
import sys
import time
from email.utils import formatdate
from itertools import pairwise

import pytest

from tests.rewards.misbehaving_server import (
    CLOSE,
    DRIP,
    EMPTY,
    FILTERED,
    GARBAGE,
    HALF,
    HANG,
    HTML,
    REFUSAL,
    TRUNCATED_JSON,
    MisbehavingServer,
    completion,
)
from visalign.rewards.judges.question import Question
from visalign.rewards.judges.server import ChatServer
from visalign.rewards.servers import transport
from visalign.rewards.servers.transport import Response

GOOD = "Image 1 is better."


def question(text="which?", **options):
    return Question(text=text, images=(b"png",), max_tokens=8, **options)


def client(*servers, **options):
    return ChatServer([one if isinstance(one, str) else one.url for one in servers], "judge", **{"pause": 0.01, **options})


@pytest.fixture(scope="module")
def nobody():
    """The address of a server that has died."""
    with MisbehavingServer([GOOD]) as server:
        pass
    return server.url


@pytest.mark.parametrize("trouble", [500, 502, 503, 504, 507, 522, 524, 529, 429, 408, 409, 425, (429, 0), CLOSE, HALF, GARBAGE, HTML,
                                     TRUNCATED_JSON])
def test_what_passes_is_retried(trouble):
    with MisbehavingServer([trouble, GOOD]) as server:
        reply, = client(server).ask([question()])
    assert (reply.answer.text, reply.reason, reply.attempts, len(server.requests)) == (GOOD, None, 2, 2)


@pytest.mark.parametrize("status", [400, 413, 422, 501, 505])
def test_what_does_not_pass_is_asked_once(status):
    with MisbehavingServer([GOOD, status]) as server:
        ask = client(server).ask
        assert ask([question()])[0].answer.text == GOOD
        # After a first answer the set-up is right, so that a batch of refused requests is a batch of invalid samples.
        assert [reply.reason for reply in ask([question("a"), question("b")])] == [f"http {status}"] * 2
    assert len(server.requests) == 3


def test_pauses_double():
    arrivals = []

    def late(request):
        arrivals.append(time.monotonic())
        return 500 if len(arrivals) < 5 else GOOD

    with MisbehavingServer([late]) as server:
        assert client(server, retries=4, pause=0.05).ask([question()])[0].answer.text == GOOD
    for k, (before, after) in enumerate(pairwise(arrivals)):
        assert after - before >= 0.5 * 0.05 * 2**k


@pytest.mark.parametrize(("trouble", "reason"), [(500, "http 500"), ((429, 0), "http 429"), (CLOSE, "connection"), (HALF, "connection"),
                                                 (GARBAGE, "garbage"), (HTML, "garbage"), (TRUNCATED_JSON, "garbage"), (HANG, "timeout"),
                                                 (DRIP, "timeout")])
def test_what_stays_has_a_reason_and_no_answer(trouble, reason):
    with MisbehavingServer([trouble]) as server:
        reply, = client(server, retries=1, timeout=0.5 if reason == "timeout" else 60).ask([question()])
        assert (reply.answer, reply.reason, reply.attempts) == (None, reason, 2)
        assert len(server.requests) == 2


@pytest.mark.parametrize("refusal", [REFUSAL, FILTERED, EMPTY, completion("Image 1", finish="content_filter")])
def test_a_refusal_is_an_answer_and_is_not_argued_with(refusal):
    with MisbehavingServer([refusal]) as server:
        reply, = client(server).ask([question()])
    assert reply.answer.refused
    assert len(server.requests) == 1


def test_a_server_that_asks_for_a_second_gets_it():
    with MisbehavingServer([(429, 0.3), GOOD]) as server:
        started = time.monotonic()
        reply, = client(server).ask([question()])
    assert reply.answer.text == GOOD
    assert time.monotonic() - started >= 0.3


def test_a_server_that_asks_for_more_than_there_is_ends_the_question_at_once():
    with MisbehavingServer([(429, 3600), GOOD]) as server:
        reply, = client(server, batch_timeout=20).ask([question()])
    assert (reply.reason, reply.attempts) == ("http 429", 1)
    assert reply.seconds < 10


def test_a_server_may_name_a_date():
    def asked(value):
        return Response(429, {"retry-after": value}, b"").retry_after()

    assert asked("2") == 2
    assert asked(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=5)
    assert asked(formatdate(time.time() - 100, usegmt=True)) == 0
    assert asked("soon") is None
    assert asked("") is None


def test_an_answer_without_end_is_no_answer(monkeypatch):
    monkeypatch.setattr(transport, "MAX_BYTES", 1000)
    with MisbehavingServer(["x" * 1000]) as server:
        reply, = client(server, retries=0).ask([question()])
    assert (reply.answer, reply.reason) == (None, "connection")
    assert "more than 1000 bytes" in reply.message


def test_content_in_parts_is_read_as_one_text():
    parts = [{"type": "reasoning", "text": "Image 2"}, {"type": "text", "text": "Image 1 "}, {"type": "text", "text": "is better."}]
    with MisbehavingServer([completion(parts), completion(7)]) as server:
        ask = client(server, retries=0).ask
        assert ask([question("a")])[0].answer.text == GOOD
        assert ask([question("b")])[0].reason == "garbage"


def test_waiting_for_a_dead_server_is_said_once(nobody, monkeypatch, caplog):
    monkeypatch.setattr("visalign.rewards.servers.calls._PATIENCE", 0.2)
    replies = client(nobody, concurrency=2, batch_timeout=3, pause=0.1).ask([question(str(i)) for i in range(5)])
    assert not any(reply.answer for reply in replies)
    said = [record.getMessage() for record in caplog.records if "no server answers" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"judge 'judge': no server answers ({nobody}: ")
    assert "requests wait for one that does, at most" in said[0]


def test_the_batch_ends_when_its_time_does():
    with MisbehavingServer([HANG]) as server:
        started = time.monotonic()
        replies = client(server, concurrency=2, batch_timeout=0.4).ask([question(str(i)) for i in range(6)])
    assert {reply.reason for reply in replies} == {"timeout"}
    assert time.monotonic() - started < 10


def test_one_dead_replica_of_two_loses_nothing(nobody):
    with MisbehavingServer([GOOD]) as server:
        replies = client(nobody, server, concurrency=4).ask([question(str(i)) for i in range(12)])
    assert [reply.answer.text for reply in replies] == [GOOD] * 12
    assert len(server.requests) == 12


def test_a_hanging_replica_costs_one_timeout_not_one_per_question():
    with MisbehavingServer([HANG]) as stuck, MisbehavingServer([GOOD]) as server:
        replies = client(stuck, server, concurrency=2, timeout=1, pause=5).ask([question(str(i)) for i in range(12)])
    assert all(reply.answer for reply in replies)
    assert len(stuck.requests) <= 2


@pytest.mark.parametrize("seed", [0, 1])
def test_in_a_storm_every_answer_is_its_questions_own(seed, nobody):
    trouble = random.Random(seed)

    def stormy(request):
        what = trouble.choice([500, CLOSE, HALF, GARBAGE, TRUNCATED_JSON, (429, 0), 503, None, None, None])
        return "echo " + request["messages"][0]["content"][1]["text"] if what is None else what

    with MisbehavingServer([stormy]) as one, MisbehavingServer([stormy]) as other:
        replies = client(one, nobody, other, concurrency=8, retries=4, pause=0.001).ask([question(str(i)) for i in range(60)])
    answered = {i: reply.answer.text for i, reply in enumerate(replies) if reply.answer}
    assert answered == {i: f"echo {i}" for i in answered}
    assert 30 < len(answered) <= 60
    assert all(reply.reason is None or reply.attempts == 5 for reply in replies)


def test_replicas_share_the_work():
    def slowly(request):
        time.sleep(0.02)
        return GOOD

    with MisbehavingServer([slowly]) as one, MisbehavingServer([slowly]) as other:
        client(one, other, concurrency=4).ask([question(str(i)) for i in range(12)])
    assert min(len(one.requests), len(other.requests)) >= 3


def test_no_more_calls_at_once_than_allowed():
    def slowly(request):
        time.sleep(0.02)
        return GOOD

    with MisbehavingServer([slowly]) as server:
        client(server, concurrency=3).ask([question(str(i)) for i in range(9)])
    assert 1 < server.peak <= 3


def test_what_is_sent():
    with MisbehavingServer([completion("1", alternatives={"1": -0.1, "2": -2.3, "never": -9999.0})]) as server:
        reply, = client(server, extra={"chat_template_kwargs": {"enable_thinking": False}}).ask([question(top_logprobs=20)])
    request, = server.requests
    content = request["messages"][0].pop("content")
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[0]["image_url"]["url"] == "data:image/png;base64,cG5n"
    assert request == {"model": "judge", "messages": [{"role": "user"}], "temperature": 0, "max_tokens": 8, "logprobs": True,
                       "top_logprobs": 20, "chat_template_kwargs": {"enable_thinking": False}}
    assert reply.answer.first_token == {"1": -0.1, "2": -2.3}


def test_fields_that_hosted_models_call_otherwise(tmp_path):
    with MisbehavingServer([GOOD]) as server:
        reply, = client(server, temperature=None, max_tokens_field="max_completion_tokens", cache_dir=tmp_path).ask([question()])
        assert client(server, cache_dir=tmp_path).ask([question()])[0].attempts == 1  # another decoding is another question
    assert reply.answer.text == GOOD
    assert {key: server.requests[0].get(key) for key in ("temperature", "max_tokens", "max_completion_tokens")} == {
        "temperature": None, "max_tokens": None, "max_completion_tokens": 8}


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with MisbehavingServer([GOOD]) as server:
        client(server, api_key_env="JUDGE_KEY").ask([question()])
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_servers_elsewhere_are_reached_through_the_environments_proxy(monkeypatch):
    with MisbehavingServer([GOOD]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        reply, = client("http://judge.invalid:8000/v1").ask([question()])
    assert reply.answer.text == GOOD
    assert proxy.headers[0]["Host"] == "judge.invalid:8000"


def test_nothing_is_asked_twice_after_a_crash(tmp_path):
    questions = [question(str(i)) for i in range(4)]
    with MisbehavingServer([GOOD, GOOD, 401]) as server, pytest.raises(ValueError, match="api_key_env"):
        client(server, cache_dir=tmp_path, concurrency=1).ask(questions)
    with MisbehavingServer(["Image 2 is better."]) as server:
        replies = client(server, cache_dir=tmp_path).ask(questions)
        assert len(server.requests) == 2
        assert [reply.attempts for reply in replies] == [0, 0, 1, 1]
        assert [reply.answer.text[6] for reply in replies] == list("1122")
        assert all(reply.attempts == 0 for reply in client(server, cache_dir=tmp_path).ask(questions))


def test_nothing_is_asked_twice_after_a_kill(tmp_path):
    script = """if True:
        import sys
        from visalign.rewards.judges.question import Question
        from visalign.rewards.judges.server import ChatServer
        url, folder = sys.argv[1:]
        asked = [Question(str(i), (b"png",), 8) for i in range(5)]
        ChatServer(url, "judge", cache_dir=folder, concurrency=1, pause=0.01).ask(asked)
    """
    processes = []

    def kill(request):
        processes[0].kill()
        return CLOSE

    with MisbehavingServer([GOOD, GOOD, kill, GOOD]) as server:
        processes.append(subprocess.Popen([sys.executable, "-c", script, server.url, str(tmp_path)]))
        assert processes[0].wait(600) != 0
        replies = client(server, cache_dir=tmp_path, concurrency=1).ask([Question(str(i), (b"png",), 8) for i in range(5)])
    assert [reply.attempts for reply in replies] == [0, 0, 1, 1, 1]
    assert len(server.requests) == 3 + 3


def test_failures_are_not_kept(tmp_path):
    with MisbehavingServer([500, GARBAGE, GOOD]) as server:
        ask = client(server, cache_dir=tmp_path, retries=0).ask
        assert [ask([question()])[0].reason for _ in range(3)] == ["http 500", "garbage", None]
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]


def test_the_cache_knows_what_was_asked_not_where(tmp_path):
    with MisbehavingServer([GOOD]) as one, MisbehavingServer([GOOD]) as other:
        client(one, cache_dir=tmp_path).ask([question()])
        assert client(other, cache_dir=tmp_path).ask([question()])[0].attempts == 0
        differently = [question("else"), question(top_logprobs=5), Question("which?", (b"other",), 8), Question("which?", (b"png",), 9)]
        assert [reply.attempts for reply in client(other, cache_dir=tmp_path).ask(differently)] == [1] * 4
        assert ChatServer(other.url, "another model", cache_dir=tmp_path).ask([question()])[0].attempts == 1


def test_a_spoilt_cache_file_is_asked_again(tmp_path, caplog):
    with MisbehavingServer([GOOD]) as server:
        client(server, cache_dir=tmp_path).ask([question()])
        path, = tmp_path.rglob("*.json")
        path.write_text('{"format": 1, "te')
        assert client(server, cache_dir=tmp_path).ask([question()])[0].attempts == 1
        assert client(server, cache_dir=tmp_path).ask([question()])[0].attempts == 0
    assert "is no answer" in caplog.text


def test_an_answer_in_another_format_is_asked_again(tmp_path):
    with MisbehavingServer([GOOD]) as server:
        client(server, cache_dir=tmp_path).ask([question()])
        path, = tmp_path.rglob("*.json")
        path.write_text(path.read_text().replace('"format": 1', '"format": 0'))
        assert client(server, cache_dir=tmp_path).ask([question()])[0].attempts == 1


@pytest.mark.parametrize(("status", "match"), [(401, "api_key_env"), (403, "access"), (404, "models"), (405, "/v1"),
                                               (422, "turned down every question: http 422, told to")])
def test_a_wrong_set_up_stops_the_run(status, match):
    with MisbehavingServer([status]) as server, pytest.raises(ValueError, match=match):
        client(server).ask([question(), question("second")])
    assert len(server.requests) <= 2


def test_a_wrong_set_up_does_not_wait_for_calls_under_way():
    def behave(request):
        return HANG if "slow" in request["messages"][0]["content"][1]["text"] else 401

    with MisbehavingServer([behave]) as server:
        started = time.monotonic()
        with pytest.raises(ValueError, match="401"):
            client(server, timeout=20, concurrency=2).ask([question("slow"), question("quick")])
        assert time.monotonic() - started < 10


def test_a_question_that_is_turned_down_is_one_invalid_sample(caplog):
    def picky(request):
        return 400 if "long" in request["messages"][0]["content"][1]["text"] else GOOD

    with MisbehavingServer([picky]) as server:
        replies = client(server).ask([question(), question("long")])
    assert [reply.reason for reply in replies] == [None, "http 400"]
    assert "told to" in caplog.text


@pytest.mark.parametrize(("options", "match"), [({"base_urls": []}, "base_urls"), ({"base_urls": "localhost:8000"}, "http://"),
                                                ({"concurrency": 0}, "concurrency 0"), ({"timeout": 0}, "timeout 0"),
                                                ({"retries": -1}, "retries -1"), ({"extra": {"temperature": 1}}, "temperature"),
                                                ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY")])
def test_bad_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        ChatServer(**{"base_urls": "http://localhost:1/v1", "model": "m", **options})
