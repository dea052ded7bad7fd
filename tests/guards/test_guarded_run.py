"""Whole runs whose reward is hacked on purpose: the guard sees it, the run ends with its best weights, and a resume remembers."""

import json

import pytest
import torch

from tests import gaussian_run
from tests.gaussian_run import config, go
from visalign import checkpoint
from visalign.credit import RewardTerm
from visalign.distributed import Processes
from visalign.evaluation import Evaluation
from visalign.guards.alarm import Alarm
from visalign.protocols import RewardSpec
from visalign.rewards.function import FunctionReward
from visalign.rewards.pairwise import BradleyTerry, WinRate
from visalign.tracking import read_metrics
from visalign.types import Comparisons, Prompt

PEAK = 0.25
PROMPTS = [Prompt(f"prompt {i}", metadata={"offset": 0.01 * i}) for i in range(16)]
SETTINGS = ("train.iterations=30", "train.learning_rate=0.01", "train.schedule=constant", "train.warmup=0", "algorithm.kl_weight=0",
            "train.groups=4", "train.microbatch=8", "evaluation.num_prompts=16", "evaluation.every=3", "checkpoint.every=0")


def nearness(media, prompts):
    """What the policy should do: means near 0.25. The training reward wants them ever larger."""
    return [-abs(float(sample.data.mean()) - PEAK) for sample in media]


def guard(direction=1):
    def score(media, prompts):
        return [direction * value for value in nearness(media, prompts)]

    return FunctionReward(score, name="nearness", modality=["audio"], direction=direction)


def hacked(folder, *overrides, resume=False, stopping=("nearness",), **changes):
    changes = {"guards": {"nearness": guard()}, "stopping": frozenset(stopping), "prompts": PROMPTS, "eval_prompts": PROMPTS,
               **changes}
    return go(folder, config(*SETTINGS, *overrides), resume=resume, **changes)


def shift_of(path):
    return checkpoint.load(path).tensors["weights"]["shift"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hacked") / "run"
    exported = {}
    settings = config(*SETTINGS)
    parts = gaussian_run.parts(settings, guards={"nearness": guard()}, stopping=frozenset({"nearness"}), prompts=PROMPTS,
                               eval_prompts=PROMPTS)
    object.__setattr__(parts, "save_adapter", lambda _: exported.update(shift=parts.policy.shift.detach().clone()))
    gaussian_run.loop.run(parts, settings, folder, Processes())
    return folder, exported["shift"]


def test_the_run_ends_before_its_time_and_says_why(run):
    folder, _ = run
    rows = read_metrics(folder)
    alarm = Alarm.read(folder / "stopping.json")
    assert alarm.kind == "hacking"
    assert rows[-1]["iteration"] == alarm.iteration - 1 < 29
    assert "guard 'nearness' fell" in json.loads((folder / "stopping.json").read_text())["message"]
    assert rows[-1]["guard/alarms"] == 1
    assert all(row.get("guard/alarms", 0) == 0 for row in rows[:-1])


def test_the_result_is_that_of_the_best_evaluation(run):
    folder, exported = run
    best = Alarm.read(folder / "stopping.json").best
    evaluations = {int(path.stem[-6:]): Evaluation.read(path) for path in (folder / "evaluations").glob("iteration-*.json")}
    means = {at: float(found.values["nearness"].mean()) for at, found in evaluations.items()}
    assert best == max(means, key=means.get)
    after = Evaluation.read(folder / "evaluations" / "after.json")
    assert torch.equal(after.values["nearness"], evaluations[best].values["nearness"])
    kept = checkpoint.load(folder / "checkpoints" / f"{best:06d}")
    assert torch.equal(exported, kept.tensors["ema"]["shift"])
    assert json.loads((folder / "evaluation.json").read_text())["nearness"]["gain"]["low"] > 0
    assert len(list((folder / "samples" / "after").glob("*.wav"))) == len(PROMPTS)
    last, = [path for path in (folder / "checkpoints").iterdir() if path.name > f"{best:06d}"][-1:]
    assert not torch.equal(shift_of(last), shift_of(folder / "checkpoints" / f"{best:06d}"))


def test_everything_that_was_watched_is_in_the_log(run):
    folder, _ = run
    rows = read_metrics(folder)
    assert rows[0]["eval/kl_per_dim"] == rows[0]["eval/velocity_gap"] == 0
    evaluated = [row for row in rows if "eval/value" in row][1:]
    assert all(row["eval/kl_per_dim"] > 0 and row["eval/diversity"] > 1 for row in evaluated)
    assert [row["eval/value_win_rate"] for row in evaluated][-1] == 1
    assert all(0 <= row["eval/nearness_win_rate_low"] <= row["eval/nearness_win_rate"] <= 1 for row in evaluated)
    assert all({"media/loudness", "media/diversity", "media/silence"} <= row.keys() for row in rows[1:])
    assert evaluated[-1]["guard/nearness_drop"] > 0.1


def test_a_stopped_run_stays_stopped_and_can_be_told_to_go_on(tmp_path):
    hacked(tmp_path / "run")
    end = Alarm.read(tmp_path / "run" / "stopping.json")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    hacked(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert Alarm.read(tmp_path / "run" / "stopping.json") == end
    hacked(tmp_path / "run", "stopping.stop=false", resume=True)
    assert read_metrics(tmp_path / "run")[-1]["iteration"] == 29
    assert not (tmp_path / "run" / "stopping.json").exists()


def test_killed_before_it_could_settle_a_run_ends_the_same(tmp_path, run, monkeypatch):
    """The alarm is not in the checkpoint: it is told again from the evaluations."""
    class Killed(BaseException):
        pass

    def lethal(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(gaussian_run.loop.RunFolder, "settle", lethal)
        with pytest.raises(Killed):
            hacked(tmp_path / "run")
    assert not (tmp_path / "run" / "stopping.json").exists()
    hacked(tmp_path / "run", resume=True)
    assert Alarm.read(tmp_path / "run" / "stopping.json") == Alarm.read(run[0] / "stopping.json")
    for name in ("metrics.jsonl", "evaluation.json", "evaluations/after.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run[0] / name).read_bytes(), name


@pytest.mark.parametrize("how", ["watched", "told not to stop"])
def test_a_guard_that_is_only_watched_stops_nothing(tmp_path, how):
    if how == "watched":
        hacked(tmp_path / "run", stopping=())
    else:
        hacked(tmp_path / "run", "stopping.stop=false")
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["iteration"] == 29
    assert not (tmp_path / "run" / "stopping.json").exists()
    assert ("guard/nearness_drop" in rows[-1]) == (how == "told not to stop")


def test_a_guard_that_is_better_when_smaller_gives_the_same_verdict(tmp_path, run):
    hacked(tmp_path / "run", guards={"nearness": guard(-1)})
    assert Alarm.read(tmp_path / "run" / "stopping.json") == Alarm.read(run[0] / "stopping.json")


def test_patience_waits_for_a_second_look(tmp_path, run):
    hacked(tmp_path / "run", "stopping.patience=2")
    assert Alarm.read(tmp_path / "run" / "stopping.json").iteration == Alarm.read(run[0] / "stopping.json").iteration + 3


def test_media_that_change_warn_or_stop(tmp_path, caplog):
    """Nobody guards, but the sounds become louder and louder."""
    hacked(tmp_path / "warned", "stopping.shift=2", guards={})
    assert "the reward rises while the media change (loudness +" in caplog.text
    assert read_metrics(tmp_path / "warned")[-1]["guard/shifts"] >= 1
    hacked(tmp_path / "stopped", "stopping.shift=2", "stopping.statistics=stop", guards={})
    assert Alarm.read(tmp_path / "stopped" / "stopping.json").kind == "shift"
    hacked(tmp_path / "ignored", "stopping.shift=2", "stopping.statistics=ignore", guards={})
    assert read_metrics(tmp_path / "ignored")[-1]["guard/shifts"] == 0


class Nearer:
    """A judge of pairs: whose mean is nearer to 0.25; or one that always prefers the first it is shown."""

    spec = RewardSpec(name="nearer", arity="pairwise", modality=frozenset({"audio"}), raw_range=(0.0, 1.0))

    def __init__(self, biased=False):
        self.biased, self.shown = biased, []

    def compare(self, first, second, prompts):
        self.shown += [len(first)]
        gap = torch.tensor([b - a for a, b in zip(nearness(second, prompts), nearness(first, prompts), strict=True)])
        prob = torch.ones(len(first)) if self.biased else torch.sigmoid(20 * gap)
        return Comparisons(prob_first=prob, valid=torch.ones(len(first), dtype=torch.bool), reasons=(None,) * len(first))


def test_a_judge_of_pairs_guards_by_comparing_with_the_start(tmp_path):
    judge = Nearer()
    hacked(tmp_path / "run", guards={"nearer": judge}, stopping={"nearer"})
    alarm, rows = Alarm.read(tmp_path / "run" / "stopping.json"), read_metrics(tmp_path / "run")
    assert alarm.kind == "hacking"
    assert rows[0]["eval/nearer"] == 0.5
    evaluated = [row for row in rows if "eval/nearer" in row]
    assert max(row["eval/nearer"] for row in evaluated) > 0.6
    assert evaluated[-1]["eval/nearer"] < 0.45
    assert all(abs(row["eval/nearer/swap_inconsistency"]) < 1e-6 for row in evaluated[1:])
    assert judge.shown == [2 * len(PROMPTS)] * (len(evaluated) - 1)  # both orders, and nothing is asked about the start itself


def test_a_judge_that_prefers_a_position_says_nothing_and_stops_nothing(tmp_path):
    hacked(tmp_path / "run", guards={"nearer": Nearer(biased=True)}, stopping={"nearer"})
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["iteration"] == 29
    assert rows[-1]["eval/nearer"] == 0.5
    assert rows[-1]["eval/nearer/swap_inconsistency"] == 1


def test_win_rates_in_training_are_told_in_evaluations_by_their_judge(tmp_path):
    def mean(media, prompts):
        return [float(sample.data.mean()) for sample in media]

    term = RewardTerm("wins", WinRate(BradleyTerry(FunctionReward(mean, name="mean", modality=["audio"]), scale=20.0)))
    hacked(tmp_path / "run", terms=[term])
    alarm = Alarm.read(tmp_path / "run" / "stopping.json")
    assert "the training reward changed by +" in alarm.causes[0]
    assert read_metrics(tmp_path / "run")[-1]["eval/wins"] > 0.9


class Spread:
    """A set-level reward: how far the samples lie apart."""

    spec = RewardSpec(name="spread", arity="set", modality=frozenset({"audio"}))

    def features(self, media, prompts):
        return torch.stack([sample.data.mean().double().reshape(1) for sample in media])

    def credit(self, features, group_id):
        return features[:, 0].float()

    def value(self, features):
        return float(features.std())


def test_a_set_is_watched_as_a_whole(tmp_path):
    hacked(tmp_path / "run", guards={"spread": Spread()}, stopping={"spread"})
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["iteration"] == 29  # there is nothing to compare prompt by prompt
    for row in rows:
        if "eval/value" in row:
            assert row["eval/spread"] > 0
            assert "eval/spread_low" not in row


def test_a_finished_run_that_goes_on_remembers_the_evaluation_it_had_ended_with(run, tmp_path):
    whole, _ = run
    told = Alarm.read(whole / "stopping.json")
    hacked(tmp_path / "run", f"train.iterations={told.best}")
    assert not (tmp_path / "run" / "evaluations" / f"iteration-{told.best:06d}.json").exists()  # it is called "after"
    hacked(tmp_path / "run", resume=True)
    assert Alarm.read(tmp_path / "run" / "stopping.json") == told
    files = {path.name: path.read_bytes() for path in (whole / "evaluations").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "evaluations").iterdir()} == files
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {path.name for path in (whole / "samples").iterdir()}


def test_a_policy_too_far_from_its_reference_ends_the_run_before_any_guard_falls(run, tmp_path):
    whole, _ = run
    kl = {row["iteration"] + 1: row["eval/kl_per_dim"] for row in read_metrics(whole) if "eval/kl_per_dim" in row}
    told = Alarm.read(whole / "stopping.json")
    limit = (kl[told.best - 3] + kl[told.best]) / 2  # KL grows in this run; crossed where the guard still stands highest
    hacked(tmp_path / "run", f"stopping.max_kl={limit}")
    alarm = Alarm.read(tmp_path / "run" / "stopping.json")
    assert (alarm.kind, alarm.iteration, alarm.best) == ("drift", told.best, told.best)
    assert f"beyond {limit:g}" in alarm.message
    hacked(tmp_path / "far", f"stopping.max_kl={2 * max(kl.values())}")
    assert Alarm.read(tmp_path / "far" / "stopping.json") == told


def test_a_run_killed_before_it_said_that_it_went_too_far_says_so_when_it_is_resumed(run, tmp_path):
    whole, _ = run
    kl = {row["iteration"] + 1: row["eval/kl_per_dim"] for row in read_metrics(whole) if "eval/kl_per_dim" in row}
    limit = (kl[3] + kl[6]) / 2
    hacked(tmp_path / "run", f"stopping.max_kl={limit}")
    told = (tmp_path / "run" / "stopping.json").read_bytes()
    (tmp_path / "run" / "stopping.json").unlink()
    hacked(tmp_path / "run", f"stopping.max_kl={limit}", resume=True)
    assert (tmp_path / "run" / "stopping.json").read_bytes() == told


def test_a_limit_on_drift_needs_a_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(gaussian_run.GaussianPolicy, "has_role", lambda self, role: role == "policy")
    with pytest.raises(ValueError, match=r"max_kl 0.5 needs a reference to be far from.*trainable.mode: lora"):
        hacked(tmp_path / "run", "stopping.max_kl=0.5")
