"""Whole runs whose reward is behind HTTP: killed and resumed nothing is asked twice and nothing is lost; a dead server stops the run by
the window rule, and the run goes on where it was.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import gaussian_run
from tests.gaussian_run import config, go, mean_value
from tests.rewards.misbehaving_server import CLOSE, GARBAGE
from tests.rewards.serving import LIMITS, SPEC, Serving, catalogue, mean_answer, misbehaving
from visalign.checkpoint import latest
from visalign.credit import RewardTerm
from visalign.rewards.function import FunctionReward
from visalign.rewards.remote.rewards import Remote
from visalign.tracking import read_metrics

VALUE = SPEC.model_copy(update={"name": "value", "modality": ("audio",)})


class Counted:
    """``mean_value`` that remembers every sample it was asked about, and kills a process when it is asked the ``lethal``-th time."""

    def __init__(self) -> None:
        self.seen: Counter[bytes] = Counter()
        self.calls, self.lethal, self.victim = 0, 0, None

    def __call__(self, media, prompts):
        self.calls += 1
        if self.calls == self.lethal:
            self.victim.kill()
        self.seen.update(one.data.numpy().tobytes() for one in media)
        return mean_value(media, prompts)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The same run in one piece, its reward in its own process."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    go(folder, config())
    return folder


def start(run, url, cache, *words):
    script = Path(gaussian_run.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, str(script), str(run), "--remote", url, "--cache", str(cache), *words], env=environment)


@pytest.mark.parametrize(("moment", "lethal"), [(None, 12), ("backward:9", 0)])
def test_a_run_that_is_killed_and_resumed_is_the_run_in_one_piece_and_asks_nothing_twice(tmp_path, straight, moment, lethal):
    """SIGKILL while samples are being scored (the second request of an iteration of four), or in the middle of an update."""
    reward = Counted()
    served = FunctionReward(reward, name="value", modality=["audio"])
    with Serving({"value": served}, max_batch=2, max_wait_ms=0) as server:
        reward.lethal = lethal
        reward.victim = start(tmp_path / "run", server.url, tmp_path / "cache", *(["--kill", moment] if moment else []))
        assert reward.victim.wait(900) == -9
        kept = int(latest(tmp_path / "run" / "checkpoints").name)
        assert 0 < kept < 6
        asked = sum(reward.seen.values())
        assert start(tmp_path / "run", server.url, tmp_path / "cache", "--resume").wait(900) == 0
    # Only what was under way when the process died had to be asked again: nobody had received the answer.
    assert max(reward.seen.values()) <= (2 if lethal else 1)
    assert sum(count > 1 for count in reward.seen.values()) <= 2
    assert sum(reward.seen.values()) > asked
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert latest(tmp_path / "run" / "checkpoints").name == "000006"


def remote_run(folder, server, resume=False, **options):
    remote = Remote(server.url, "value", **{"pause": 0.001, "startup_timeout": 0, "concurrency": 1, **options})
    return go(folder, config(), resume=resume, terms=[RewardTerm("value", remote)])


def test_a_server_that_dies_stops_the_run_and_the_run_goes_on_when_it_is_back(tmp_path, straight):
    alive = [True]

    def mortal(body):
        mortal.calls += 1
        if mortal.calls > 1 + 2 * 2 + 1:  # an evaluation, two iterations of two requests, an evaluation
            alive[0] = False
        return mean_answer(body, VALUE) if alive[0] else CLOSE

    mortal.calls = 0
    with misbehaving([mortal], page=catalogue(VALUE, "value")) as server:
        with pytest.raises(RuntimeError, match=r"'value' gave no score for any of 8 samples: 8 x connection\. Check its server.*resume"):
            remote_run(tmp_path / "run", server, retries=1)
        assert read_metrics(tmp_path / "run")[-1]["iteration"] == 1
        mortal.calls, alive[0] = -1000, True
        remote_run(tmp_path / "run", server, resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_single_failures_are_left_out_of_every_statistic_and_the_run_goes_on(tmp_path, straight):
    """One request of one sample is answered with garbage; the other seven of the iteration have the scores of the whole run."""
    def flaky(body):
        flaky.calls += 1
        return GARBAGE if flaky.calls == 4 + 3 else mean_answer(body, VALUE)  # four evaluation prompts, then the third sample

    flaky.calls = 0
    page = catalogue(VALUE, "value", limits=LIMITS.model_copy(update={"max_batch": 1}))
    with misbehaving([flaky], page=page) as server:
        remote_run(tmp_path / "run", server, retries=0)
    before, first, *_ = read_metrics(tmp_path / "run")
    assert before["eval/value"] == read_metrics(straight)[0]["eval/value"]
    assert first["reward/value/valid_rate"] == first["credit/valid_rate"] == 7 / 8
    assert first["credit/dropped_group_fraction"] == 0
    assert first["reward/value/mean"] != read_metrics(straight)[1]["reward/value/mean"]
    told = read_metrics(tmp_path / "run", "timings.jsonl")[1]
    assert (told["judge/value/valid_rate"], told["judge/value/failed/garbage"], told["judge/value/calls"]) == (7 / 8, 1 / 8, 8)
    assert 0 < told["judge/value/latency_p50"] <= told["judge/value/latency_p95"] < told["reward/value/seconds"]
