"""Runs whose judge is asked over HTTP and misbehaves: what learns, what stops, and what is never asked twice.

The judge prefers the brighter of two pictures. What goes wrong depends on the question alone, so that runs can be compared: a picture whose
pixels sum to a multiple of five is never judged (its questions fail for good, each in one of many ways), and every fourth question fails
the first time it is asked.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests import judged_run
from tests.judged_run import config, go
from tests.rewards.misbehaving_server import (
    CLOSE,
    GARBAGE,
    HALF,
    HANG,
    HTML,
    REFUSAL,
    TRUNCATED_JSON,
    MisbehavingServer,
    completion,
    pictures,
)
from tests.rewards.tiny_judge import make
from tests.rewards.transformers_server import serving
from visalign import checkpoint
from visalign.credit import RewardFailureError
from visalign.rewards.servers import replicas
from visalign.tracking import read_metrics

FOR_GOOD = (500, GARBAGE, REFUSAL, TRUNCATED_JSON, CLOSE, "I like both.", completion("Image 1 is", finish="length"), (429, 0), 422)
ONCE = (503, CLOSE, HALF, HTML, TRUNCATED_JSON, (429, 0), HANG)


class Storm:
    """The judge; ``answered`` counts by question how often a verdict was sent, ``dead`` makes it close every connection."""

    def __init__(self, for_good=FOR_GOOD):
        self.asked, self.answered = Counter(), Counter()
        self.for_good, self.dead = for_good, False

    def __call__(self, request):
        question = json.dumps(request["messages"], sort_keys=True)
        first, second = (int(picture.sum()) for picture in pictures(request))
        self.asked[question] += 1
        if self.dead:
            return CLOSE
        for level in (first, second):
            if level % 5 == 0:
                return self.for_good[level // 5 % len(self.for_good)]
        if self.asked[question] == 1 and (first + 3 * second) % 4 == 1:
            # A hang costs a timeout, so it is the rarest.
            return ONCE[-1] if first % 40 == 1 else ONCE[first % (len(ONCE) - 1)]
        self.answered[question] += 1
        return "Both images are equally good." if first == second else f"Image {1 if first > second else 2} is better."


@pytest.fixture(scope="module")
def nobody():
    """The address of a server that has died."""
    with MisbehavingServer([500]) as server:
        pass
    return server.url


@pytest.fixture(scope="module")
def whole(tmp_path_factory, nobody):
    """The run that nobody interrupted, through the storm and beside a dead replica; its folder, parts and judge."""
    folder, judge = tmp_path_factory.mktemp("judged"), Storm()
    with MisbehavingServer([judge]) as server:
        parts = go(folder / "run", [nobody, server.url], folder / "answers", config())
    return folder / "run", parts, judge


def levels(parts):
    """Per iteration the sums of the pixels of its 16 pictures."""
    drawn = [parts.policy.decode(experience.trajectory.x_final) for experience in parts.algorithm.seen]
    return [[int(picture.data.long().sum()) for picture in of_iteration] for of_iteration in drawn]


def known(of_iteration):
    """Per group the rows whose pictures are ever judged."""
    return [[k for k in range(start, start + 4) if of_iteration[k] % 5] for start in range(0, 16, 4)]


def assert_same_run(one, two):
    """Equal metrics, pictures, and checkpoints down to the hash of every file."""
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    for picture in sorted((two / "samples").rglob("*.png")):
        assert (one / picture.relative_to(two)).read_bytes() == picture.read_bytes()
    manifest = Path("checkpoints", "000006", "manifest.json")
    assert (one / manifest).read_text() == (two / manifest).read_text()


def test_a_run_learns_from_a_judge_in_a_storm(whole):
    folder, _, judge = whole
    gain = json.loads((folder / "evaluation.json").read_text())["brightness"]["gain"]
    assert gain["low"] > 0.02
    assert len(judge.asked) > len(judge.answered) > 100
    assert set(judge.answered.values()) == {1}


def test_the_update_sees_win_rates_of_what_was_judged_and_nothing_else(whole):
    """Win rates and advantages from the pictures' brightness and the rules of the storm, against what reached the algorithm."""
    _, parts, _ = whole
    invalid = dropped = 0
    for experience, light in zip(parts.algorithm.seen, levels(parts), strict=True):
        expected, valid = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.bool)
        for members in known(light):
            invalid += 4 - len(members)
            if len(members) <= 2:
                dropped += 1
                continue
            wins = [sum(1.0 if light[k] > light[j] else 0.5 if light[k] == light[j] else 0.0 for j in members if j != k) for k in members]
            rates = torch.tensor(wins, dtype=torch.float64) / (len(members) - 1)
            torch.testing.assert_close(experience.reward[members].double(), rates, rtol=0, atol=1e-6)
            expected[members], valid[members] = (rates - rates.mean()) / (rates.std() + 1e-8), True
        torch.testing.assert_close(experience.advantage[:, 0].double(), expected, rtol=0, atol=1e-5)
        assert torch.equal(experience.valid, valid)
    assert invalid > 10  # the storm did blow
    assert dropped > 0


def test_what_failed_and_why_is_in_the_logs(whole):
    folder, _, _ = whole
    timings = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()][1:]
    reasons = {key.rpartition("/")[2] for row in timings for key in row if "/failed/" in key}
    assert {"http_500", "garbage", "refused", "connection", "parse", "truncated"} <= reasons
    assert all(0 < row["judge/judge/valid_rate"] < 1 for row in timings)
    assert all(0 < row["reward/judge/valid_rate"] <= 1 for row in read_metrics(folder)[1:])


def test_a_judge_that_dies_stops_the_run_and_a_revived_one_is_asked_only_what_is_missing(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(replicas, "MAX_REST", 0.005)  # or questions would wait for its return as long as the batch's time allows
    answers = [sum(len(members) * (len(members) - 1) for members in known(light)) for light in levels(whole[1])]
    judge = Storm()

    def mortal(request):
        judge.dead = judge.dead or judge.answered.total() >= sum(answers[:3]) + 5  # the fourth iteration has hardly begun
        return judge(request)

    with MisbehavingServer([mortal]) as server:
        with pytest.raises(RewardFailureError, match=r"'judge' gave no score for any of 16 samples: \d+ x connection.*resume"):
            go(tmp_path / "run", [server.url], tmp_path / "answers", config())
        assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "000003"
    judge.dead = False
    with MisbehavingServer([judge]) as revived:
        go(tmp_path / "run", [revived.url], tmp_path / "answers", config(), resume=True)
    assert_same_run(tmp_path / "run", whole[0])
    assert judge.answered == whole[2].answered


def test_the_window_rule_stops_the_run_at_the_sample_that_is_too_many(tmp_path, whole):
    """Of the last 1000 samples ten may fail; the storm's sooner or later are more."""
    failed = torch.tensor([16 - sum(map(len, known(light))) for light in levels(whole[1])]).cumsum(0)
    last = int((failed > 10).nonzero()[0])
    with MisbehavingServer([Storm()]) as server:
        message = rf"'judge' failed for {failed[last]} of the last {16 * (last + 1)} samples \(tolerated: 1% of 1000\)"
        with pytest.raises(RewardFailureError, match=message):
            go(tmp_path / "run", [server.url], None, config("train.max_failed=0.01"))
    assert int(checkpoint.latest(tmp_path / "run" / "checkpoints").name) == last


def test_killed_in_the_middle_of_judging_and_resumed_equals_uninterrupted(tmp_path, whole):
    judge, processes, kills = Storm(), [], []

    def lethal(request):
        if judge.answered.total() >= 60 and not kills:  # in the second iteration
            kills.append(request)
            processes[0].kill()
            return CLOSE
        return judge(request)

    script = Path(judged_run.__file__)
    with MisbehavingServer([lethal]) as server:
        command = [sys.executable, str(script), str(tmp_path / "run"), str(tmp_path / "answers"), server.url]
        processes.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(script.parents[1])}))
        assert processes[0].wait(900) == -9
        go(tmp_path / "run", [server.url], tmp_path / "answers", config(), resume=True)
    assert_same_run(tmp_path / "run", whole[0])
    assert judge.answered == whole[2].answered


# --- the command, on a pipeline ---------------------------------------------------------------------------------------------------

RECIPE = """
extends: embedded_pref_grpo
rewards:
  - name: win_rate
    params:
      judge:
        reward: pairwise_judge
        rechecks: 0
        backend: {{base_urls: ["{url}"], model: judge, cache_dir: "{answers}", pause: 0.001, timeout: 5, concurrency: 1}}
guards: [{{name: jpeg_incompressibility}}]
model: {{call: {{num_inference_steps: 4}}}}
train: {{iterations: 3, groups: 2, group_size: 4, updates: 1, microbatch: 8, max_failed: 1.0}}
evaluation: {{num_prompts: 2, every: 0}}
checkpoint: {{every: 1}}
"""


@pytest.mark.slow
def test_visalign_train_killed_while_it_asks_and_resumed_is_the_run_that_nobody_killed(tmp_path):
    # What looks like an outage would be waited for.
    judges, processes, kills = {name: Storm(for_good=(500, GARBAGE, REFUSAL)) for name in ("whole", "killed")}, [], []

    def lethal(request):
        judge = judges["killed" if processes else "whole"]
        if processes and judge.answered.total() >= 15 and not kills:
            kills.append(request)
            processes[0].kill()
            return CLOSE
        return judge(request)

    def command(*words):
        return [sys.executable, "-m", "visalign", "train", *map(str, words)]

    with MisbehavingServer([lethal]) as server:
        for name in judges:
            (tmp_path / f"{name}.yaml").write_text(RECIPE.format(url=server.url, answers=tmp_path / f"{name}-answers"))
        subprocess.run(command(tmp_path / "whole.yaml", "--out", tmp_path / "whole"), check=True, timeout=900)
        processes.append(subprocess.Popen(command(tmp_path / "killed.yaml", "--out", tmp_path / "killed")))
        assert processes[0].wait(900) == -9
        subprocess.run(command("--resume", tmp_path / "killed"), check=True, timeout=900)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for picture in sorted((tmp_path / "whole" / "samples").rglob("*.png")):
        assert (tmp_path / "killed" / picture.relative_to(tmp_path / "whole")).read_bytes() == picture.read_bytes()
    assert judges["killed"].answered == judges["whole"].answered
    assert set(judges["killed"].answered.values()) == {1}
    rates = [row["reward/win_rate/valid_rate"] for row in read_metrics(tmp_path / "killed")[1:]]
    assert len(rates) == 3
    assert min(rates) < 1


# --- transformers serve -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_server_whose_judge_only_knows_positions_teaches_nothing(tmp_path):
    """A vision-language model that always prefers the first picture: the swap makes ties of it, and ties move no weight."""
    folder = str(make(tmp_path / "model", verdict="Image 1 is better."))
    with serving(folder, tmp_path / "log") as url:
        parts = go(tmp_path / "run", [url], tmp_path / "answers", config("train.iterations=2", "train.weight_decay=0"), model=folder,
                   timeout=60)
    for row in read_metrics(tmp_path / "run")[1:]:
        assert (row["reward/judge/valid_rate"], row["reward/judge/mean"], row["reward/judge/swap_inconsistency"]) == (1, 0.5, 1)
        assert row["credit/zero_spread_fraction"] == 1
    assert not parts.policy.shift.any()


@pytest.mark.slow
def test_a_real_server_whose_judge_talks_nonsense_stops_the_run(tmp_path):
    folder = str(make(tmp_path / "model"))
    settings = config("train.groups=1", "train.group_size=2", "train.updates=1", "train.microbatch=2")
    with serving(folder, tmp_path / "log") as url, pytest.raises(RewardFailureError, match="no score for any of 2 samples: 2 x truncated"):
        go(tmp_path / "run", [url], tmp_path / "answers", settings, model=folder, timeout=120)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None
