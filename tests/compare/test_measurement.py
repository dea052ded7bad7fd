"""Asking everybody some prompts at a time gives what asking about everything at once would."""

import json
from dataclasses import replace

import pytest
import torch

from visalign.compare import measurement
from visalign.compare.comparison_file import Side, headline, read_pairs, read_result, write_result
from visalign.compare.measurement import Panel, Spread, ask
from visalign.compare.summary import summarise
from visalign.diversity import DIFFERENCE, pixel_rows
from visalign.media import read_index, save_samples
from visalign.protocols import RewardSpec
from visalign.rewards.function import FunctionReward
from visalign.rewards.pairwise import BradleyTerry
from visalign.types import Measurement, Media, Prompt, Scores

NUM_PROMPTS, NUM_SEEDS = 9, 3


class Pointed:
    """Scores brightness, and test points of which a prompt has only some: "even" or "odd"."""

    def __init__(self):
        self.spec, self.calls = RewardSpec(name="pointed"), []

    def points(self, prompt):
        return {prompt.metadata["tag"]: 2}

    def score(self, media, prompts, group_id):
        self.calls.append(list(group_id))
        level = torch.stack([one.data.float().mean() / 255 for one in media])
        names = {prompt.metadata["tag"] for prompt in prompts}  # as judges do: columns for what was asked in this call
        details = {name: torch.tensor([float(value) if prompt.metadata["tag"] == name else torch.nan
                                       for value, prompt in zip(level, prompts, strict=True)]) for name in names}
        return Scores.from_values(level.tolist(), details=details)


class Corner:
    """A set-level reward: minus the mean brightness; features are four numbers."""

    spec = RewardSpec(name="corner", arity="set")

    def features(self, media, prompts):
        return torch.stack([one.data[:, 0, :2].double().flatten()[:4] for one in media])

    def credit(self, features, group_id):
        return features.mean(dim=1).float()

    def value(self, features):
        return -float(features.mean())

    def measure(self, features):
        return (Measurement("Brightness", float(features.mean()), -1, len(features), std=0.5),)


@pytest.fixture
def sides(tmp_path):
    """Base dark, model brighter; seeds of a prompt are not neighbours, and the model's folder has another order."""
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(f"p{k}", metadata={"tag": "even" if k % 2 == 0 else "odd"}) for k in range(NUM_PROMPTS)]
    jobs = [(prompt, seed) for seed in range(NUM_SEEDS) for prompt in prompts]
    for name, brighter in (("base", 0), ("model", 40)):
        media = [Media("image", (torch.randint(0, 200, (3, 4, 4), generator=generator) + brighter).to(torch.uint8)) for _ in jobs]
        save_samples(tmp_path / name, media, [prompt for prompt, _ in jobs], [seed for _, seed in jobs])
    return read_index(tmp_path / "base"), read_index(tmp_path / "model")


def panel():
    level = FunctionReward(lambda media, prompts: [float(one.data.float().mean()) for one in media], name="level")
    return Panel({"pointed": Pointed(), "corner": Corner(), "level": level}, {"judge": BradleyTerry(level)},
                 Spread(DIFFERENCE, pixel_rows, "pixels"))


def everything(panel, answers):
    return summarise(panel, answers, Side("m", "samples", "/m"), Side("b", "samples", "/b"), by=["tag"] if panel.rewards else [])


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunks_change_nothing_and_never_cut_a_prompt(sides, chunk, monkeypatch):
    whole_panel, whole = panel(), None
    whole = everything(whole_panel, ask(whole_panel, *sides))
    monkeypatch.setattr(measurement, "CHUNK", chunk)
    chunked, seen = panel(), []
    answers = ask(chunked, *sides, progress=lambda done, total: seen.append((done, total)))
    assert everything(chunked, answers) == whole
    assert answers.clusters.tolist() == [k for k in range(NUM_PROMPTS) for _ in range(NUM_SEEDS)]
    calls = chunked.rewards["pointed"].calls
    assert len(calls) == 2 * {1: 9, 4: 9, 7: 5}[chunk]  # both sides
    for group in calls:
        assert all(group.count(one) == NUM_SEEDS for one in group)
        assert len(group) <= max(chunk, NUM_SEEDS)
    assert seen[-1] == (NUM_PROMPTS * NUM_SEEDS, NUM_PROMPTS * NUM_SEEDS)


def test_what_is_found_is_what_was_put_in(sides):
    one = panel()
    result = everything(one, ask(one, *sides))
    assert 30 < result.rewards["level"].whole.gain.mean < 50
    assert result.wins["level"].rate == result.wins["judge"].rate
    assert result.wins["level"].rate.mean > 0.9
    assert result.sets["corner"].contrast.gain.mean < -20
    assert "corner" not in result.rewards
    (base,), (model,) = result.sets["corner"].measured_base, result.sets["corner"].measured_model
    assert base.value == -result.sets["corner"].contrast.base.mean
    assert model.value - base.value == -result.sets["corner"].contrast.gain.mean
    assert (model.name, model.count, model.std) == ("Brightness", NUM_PROMPTS * NUM_SEEDS, 0.5)
    assert result.rewards["pointed"].axes == {}                        # its points have their own table
    assert list(result.by["tag"]) == ["pointed", "level"]
    assert list(result.dimensions["pointed"].primary.rows) == ["even", "odd"]
    assert result.dimensions["pointed"].primary.micro.base.samples == 2 * NUM_PROMPTS * NUM_SEEDS
    assert (result.prompts, result.pairs, result.seeds) == (NUM_PROMPTS, NUM_PROMPTS * NUM_SEEDS, (NUM_SEEDS, NUM_SEEDS))
    assert result.diversity.within.base.prompts == NUM_PROMPTS
    assert (result.diversity.across.contrast.base.samples, result.diversity.across.dims) == (NUM_PROMPTS * NUM_SEEDS, 48)


def test_a_result_survives_its_file(sides, tmp_path):
    one = panel()
    answers = ask(one, *sides)
    result = everything(one, answers)
    result = replace(result, model=Side("m", "samples", str(tmp_path / "model")), notes=("be careful",))
    folder = tmp_path / "deep" / "result"
    write_result(folder, result, list(answers.rows()))
    assert json.loads((folder / "evaluation.json").read_text())["model"]["samples"] == "../../model"
    again = read_result(folder)
    assert again.rewards == result.rewards
    assert (again.by, again.dimensions, again.sets, again.wins, again.diversity) == (
        result.by, result.dimensions, result.sets, result.wins, result.diversity)
    assert (folder / again.model.samples).resolve() == tmp_path / "model"
    assert again.notes == ("be careful",)
    rows = read_pairs(folder, 4)
    assert [row["group"] for row in rows] == [0, 1, 2, 3]
    assert set(rows[0]["base"]["scores"]) == {"pointed", "pointed/even", "level"}
    assert rows[0]["judges"]["judge"]["outcome"] in (0.0, 0.5, 1.0)


def test_files_of_another_format_or_damaged_are_refused(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"captions": {"before": {}}}')
    with pytest.raises(ValueError, match="is of format None, expected 'visalign evaluation 1'"):
        read_result(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"format": "visalign evaluation 1", "model": 3}')
    with pytest.raises(ValueError, match="cannot be read"):
        read_result(tmp_path)


def test_benchmarks_quote_rewards_and_their_all_or_nothing_axes():
    assert headline(["objects", "objects/count", "objects/strict", "objects/correct", "clip"]) == [
        "objects", "objects/strict", "objects/correct", "clip"]


def test_a_set_reward_without_a_value_is_refused(sides):
    class NoValue:
        spec, features, credit = Corner.spec, Corner.features, Corner.credit

    one = Panel({"corner": NoValue()})
    with pytest.raises(ValueError, match="'corner' gives credit to samples but no value of a set"):
        everything(one, ask(one, *sides))


def test_features_that_are_not_finite_leave_their_pair_out(sides):
    class Picky(Corner):
        def features(self, media, prompts):
            found = super().features(media, prompts)
            return torch.where(found[:, :1] > 180, torch.nan, found)

    one = Panel({"corner": Picky()})
    found = everything(one, ask(one, *sides)).sets["corner"]
    assert 0 < found.contrast.base.samples < NUM_PROMPTS * NUM_SEEDS
    assert found.contrast.base.samples == found.contrast.model.samples


def test_what_a_judge_tells_of_itself_is_the_mean_over_its_calls(sides, monkeypatch):
    """Chunks of 6, 6, 6, 6 and 3 pairs."""
    class Telling(BradleyTerry):
        calls = 0

        def telemetry(self):
            return {"valid_rate": 1.0, "self_agreement": 1.0 if self.calls < 5 else 0.0}

        def compare(self, first, second, prompts):
            self.calls += 1
            return super().compare(first, second, prompts)

    monkeypatch.setattr(measurement, "CHUNK", 7)
    one = panel()
    one = Panel({}, {"telling": Telling(one.rewards["level"]), "silent": one.judges["judge"]})
    wins = everything(one, ask(one, *sides)).wins
    assert wins["telling"].self_agreement == pytest.approx(24 / 27)
    assert wins["silent"].self_agreement is None


def test_judges_see_only_what_they_read(sides):
    class Listener(BradleyTerry):
        def __init__(self):
            self.spec = RewardSpec(name="ear", arity="pairwise", modality=frozenset({"audio"}))

    with pytest.raises(ValueError, match="reward 'ear', sample 0: it reads audio, not image"):
        ask(Panel({}, {"ear": Listener()}), *sides)
