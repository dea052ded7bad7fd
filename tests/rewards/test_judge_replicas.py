"""Which server is asked next: arithmetic on a clock that the test holds."""

import pytest

from visalign.rewards.servers import replicas
from visalign.rewards.servers.replicas import Replicas


def ask(some, now, not_before=None):
    """URL of the replica that is free now, or the seconds until one is."""
    replica, seconds = some.take(now, not_before or {})
    return replica.url if seconds <= 0 else pytest.approx(seconds)


def fail(some, url, now, pause=1.0, **options):
    some.failed(next(one for one in some.all if one.url == url), now, pause, **options)


def test_the_least_busy_is_next():
    some = Replicas(["a", "b", "c"])
    assert [ask(some, 0.0) for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]
    some.worked(some.all[1])
    assert ask(some, 0.0) == "b"


def test_rests_double_with_every_failure_in_a_row_up_to_half_a_minute():
    some, now, rests = Replicas(["a"]), 0.0, []
    for _ in range(8):
        assert ask(some, now) == "a"
        fail(some, "a", now)
        rests.append(ask(some, now))
        now += 1000.0
    assert rests == [1, 2, 4, 8, 16, replicas.MAX_REST, replicas.MAX_REST, replicas.MAX_REST]
    assert ask(some, now) == "a"
    some.worked(some.all[0])
    assert ask(some, now) == "a"
    fail(some, "a", now)
    assert ask(some, now) == 1  # a success ended the row


def test_what_the_server_asks_for_goes_before_our_own_rest_and_is_not_cut_short():
    some = Replicas(["a"])
    ask(some, 0.0)
    fail(some, "a", 0.0, asked_to_wait=100.0)
    assert ask(some, 40.0) == 60
    assert ask(some, 100.0) == "a"


def test_one_that_failed_is_tried_with_one_call_at_a_time_until_it_works():
    some = Replicas(["a"])
    ask(some, 0.0)
    fail(some, "a", 0.0)
    assert ask(some, 5.0) == "a"
    assert ask(some, 5.0) == 0.1
    some.worked(some.all[0])
    assert [ask(some, 5.0) for _ in range(3)] == ["a"] * 3


def test_a_question_does_not_return_to_where_it_just_failed_while_there_is_another():
    some = Replicas(["a", "b"])
    assert ask(some, 0.0, {"a": 3.0}) == "b"
    assert ask(some, 0.0, {"a": 3.0, "b": 2.0}) == 2
    assert ask(some, 2.5, {"a": 3.0, "b": 2.0}) == "b"
