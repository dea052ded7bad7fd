"""From a data set of files to a trained reward's folder: contents, repeatability, kills, ensembles, adapters, sounds and videos."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.reward_training.worlds import ColourAndWords, colour_pairs
from visalign.media import save_media
from visalign.plugins import load_reward
from visalign.reward_models.stored import FILE, load_reward_file
from visalign.reward_training.config import RewardTrainingConfig, load_reward_config
from visalign.reward_training.fit import Fitting
from visalign.reward_training.parts import build_parts
from visalign.reward_training.splitting import split_prompts
from visalign.reward_training.train import train_reward
from visalign.rewards.feature_encoders import load_encoder
from visalign.settings import ConfigError
from visalign.types import Media, Prompt

ROOT = Path(__file__).parents[2]
ENCODER = "tests.reward_training.worlds:colour"
BOTH = ColourAndWords()  # an object of this module as an encoder by dotted path
CLIP = {"reward": "clip", "model": "playground:clip"}
FILES = {"config.yaml", "metrics.jsonl", "evaluation.json", "reward.safetensors", "report.html"}


def config(path, cache, **changes):
    values = {"kind": "reward", "data": {"path": str(path), "heldout": 0.3, "calibration": 0.2, "gold": "gold"},
              "encoder": "tests.reward_training.test_reward_training:BOTH", "features": {"cache": str(cache)},
              "head": {"name": "mlp", "width": 16, "depth": 1, "dropout": 0.0},
              "optimization": {"epochs": 40, "batch": 32, "learning_rate": 0.01, "weight_decay": 0.0}}
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and isinstance(values.get(key), dict) and key != "head" else value
    return RewardTrainingConfig.model_validate(values)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return colour_pairs(tmp_path_factory.mktemp("data"), num=240, num_prompts=24)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def train(settings, folder, progress=lambda what, done, total: None):
    return train_reward(settings, load_encoder(settings.encoder), folder, progress)


@pytest.fixture(scope="module")
def trained(data, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "reward"
    return folder, train(config(data, cache, ensemble={"members": 2, "fraction": 0.8}), folder)


class TestFolder:
    def test_holds_everything_and_nothing_else(self, trained):
        folder, evaluation = trained
        assert {path.name for path in folder.iterdir()} == FILES
        assert not [path for path in folder.parent.iterdir() if path != folder]
        assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) == evaluation
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(row["member"], row["epoch"]) for row in rows] == [(k, e) for k in range(2) for e in range(1, 41)]
        assert rows[39]["loss"] < rows[0]["loss"]

    def test_its_configuration_trains_the_same_reward_again(self, trained, tmp_path):
        folder, _ = trained
        settings = load_reward_config(folder / "config.yaml")
        train(settings, tmp_path / "again")
        for name in ("reward.safetensors", "metrics.jsonl", "evaluation.json", "config.yaml"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name

    def test_evaluation_has_intervals_and_a_second_opinion(self, trained):
        evaluation = trained[1]
        for side in ("heldout", "gold"):
            found = evaluation[side]
            assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
            assert found["accuracy"]["value"] > 0.9
            assert 0 <= found["ece"]["low"] <= found["ece"]["value"] <= found["ece"]["high"]
            assert sum(row["count"] for row in found["reliability"]) == found["judgements"]
        assert evaluation["data"]["heldout"] == {"judgements": 70, "prompts": 7}
        assert len(evaluation["members"]) == 2
        stored = load_reward_file(trained[0])
        for member, head in zip(evaluation["members"], stored.members, strict=True):
            assert abs(member["temperature"] - 1) > 0.05  # it was fitted, and is in the file
            assert float(head.temperature) == pytest.approx(member["temperature"])
        # The encoder's own score is the amount of the colour that is named, up to its norm: good, not perfect.
        assert 0.6 < evaluation["encoder"]["heldout"]["value"] < 1
        assert evaluation["encoder"]["gain"]["value"] == pytest.approx(
            evaluation["gold"]["accuracy"]["value"] - evaluation["encoder"]["gold"]["value"])

    def test_the_report_is_self_contained_and_shows_reliability(self, trained):
        text = (trained[0] / "report.html").read_text(encoding="utf-8")
        assert "Does it know when it is right?" in text
        assert text.count("<svg") >= 3
        assert "http" not in text.replace("http://www.w3.org", "")

    def test_rows_that_were_left_out_are_counted(self, cache, tmp_path):
        path = colour_pairs(tmp_path / "data", num=120)
        (tmp_path / "data" / "7-0.png").write_bytes(b"")
        (tmp_path / "data" / "8-1.png").unlink()
        with pytest.raises(ValueError, match="row 8"):
            train(config(path, cache), tmp_path / "reward")
        evaluation = train(config(path, cache, data={"broken": "skip"}), tmp_path / "reward")
        assert evaluation["left_out"] == {"missing file": 1, "unreadable": 1}
        assert sum(part["judgements"] for part in evaluation["data"].values()) == 118

    def test_a_used_folder_is_refused(self, trained, data, cache, tmp_path):
        with pytest.raises(ValueError, match="is not empty"):
            train(config(data, cache), trained[0])
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match="is not empty"):
            train(config(data, cache), tmp_path / "file")


class TestKill:
    code = """
import os, signal, sys
from pathlib import Path
from visalign.reward_training.config import load_reward_config
from visalign.reward_training.splitting import split_prompts
from visalign.reward_training.train import train_reward
from visalign.rewards.feature_encoders import load_encoder
settings = load_reward_config(sys.argv[1])
def progress(what, done, total):
    if (what, done) == (sys.argv[3], int(sys.argv[4])):
        os.kill(os.getpid(), signal.SIGKILL)
train_reward(settings, load_encoder(settings.encoder), Path(sys.argv[2]), progress)
"""

    @pytest.mark.parametrize(("what", "done"), [("embeddings", 256), ("members", 2)])
    def test_a_killed_training_leaves_nothing_that_loads_and_the_same_command_finishes_it(self, trained, data, tmp_path, what, done):
        from visalign.settings import dump_yaml

        settings = config(data, tmp_path / "cache", ensemble={"members": 2, "fraction": 0.8})
        (tmp_path / "config.yaml").write_text(dump_yaml(settings), encoding="utf-8")
        out = tmp_path / "reward"
        found = subprocess.run([sys.executable, "-c", self.code, str(tmp_path / "config.yaml"), str(out), what, str(done)], cwd=ROOT,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}, capture_output=True, text=True, check=False)
        assert found.returncode == -signal.SIGKILL, found.stderr
        assert not out.exists()
        for place in (out, *tmp_path.glob(".reward*")):
            with pytest.raises(ValueError, match="no trained reward"):
                load_reward_file(place)
        resumed = []
        train(settings, out, lambda what, done, total: resumed.append((what, done)))
        assert {path.name for path in out.iterdir()} == FILES
        for name in ("reward.safetensors", "metrics.jsonl", "evaluation.json"):
            assert (out / name).read_bytes() == (trained[0] / name).read_bytes(), name
        assert not list(tmp_path.glob(".reward*"))

    def test_members_of_another_configuration_are_not_taken_up(self, data, cache, tmp_path, caplog):
        class StopError(Exception):
            pass

        def stop(what, done, total):
            if (what, done) == ("members", 1):
                raise StopError

        with pytest.raises(StopError):
            train(config(data, cache, ensemble={"members": 2}), tmp_path / "reward", stop)
        assert (tmp_path / ".reward.partial" / "member-0.json").is_file()
        train(config(data, cache, ensemble={"members": 2}, seed=5), tmp_path / "reward")
        train(config(data, cache, ensemble={"members": 2}, seed=5), tmp_path / "alone")
        assert "starting anew" in caplog.text
        assert (tmp_path / "reward" / FILE).read_bytes() == (tmp_path / "alone" / FILE).read_bytes()


class TestObjectives:
    @pytest.mark.parametrize("objective", ["ties", "general_preference", {"name": "ratings", "aspects": ["red", "green", "blue"]}])
    def test_each_learns_the_colours_that_prompts_name(self, data, cache, tmp_path, objective):
        evaluation = train(config(data, cache, objective=objective), tmp_path / "reward")
        assert evaluation["gold"]["accuracy"]["value"] > 0.85
        assert load_reward("trained", path=str(tmp_path / "reward"), encoder=BOTH).spec.arity == (
            "groupwise" if objective == "general_preference" else "pointwise")

    def test_lists_are_learnt_from_whole_and_judged_in_pairs(self, cache, tmp_path):
        path = colour_pairs(tmp_path / "data", num=120, num_prompts=24)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lists = [{**a, "media": a["media"] + b["media"], "scores": a["scores"] + b["scores"],
                  "ratings": {"gold": a["ratings"]["gold"] + b["ratings"]["gold"]}}
                 for a, b in zip(rows[:48], [*rows[24:48], *rows[48:72]], strict=True)]  # rows k and k + 24 share a prompt
        path.write_text("".join(json.dumps(row) + "\n" for row in lists), encoding="utf-8")
        settings = config(path, cache, objective="plackett_luce", optimization={"epochs": 80, "batch": 8})
        evaluation = train(settings, tmp_path / "reward")
        assert evaluation["data"]["train"]["judgements"] == 24
        assert evaluation["data"]["heldout"]["judgements"] == 14 * 6
        assert evaluation["gold"]["accuracy"]["value"] > 0.85

    def test_a_reward_without_prompts_says_so(self, data, cache, tmp_path):
        """It cannot know which colour is asked for."""
        evaluation = train(config(data, cache, encoder=ENCODER), tmp_path / "reward")
        assert evaluation["gold"]["accuracy"]["value"] < 0.85
        assert "encoder" not in evaluation
        assert load_reward("trained", path=str(tmp_path / "reward")).spec.requires == frozenset()

    def test_two_rated_models_can_filter_for_each_other(self, data, cache, tmp_path):
        evaluation = train(config(data, cache, objective={"name": "ratings", "aspects": ["red", "green", "blue"]},
                                  noise={"name": "co_filter", "rate": 0.1}), tmp_path / "reward")
        assert evaluation["gold"]["accuracy"]["value"] > 0.85

    def test_perfect_rankings_have_no_temperature_and_say_why(self, cache, tmp_path):
        """More red is always better: every calibration judgement is right."""
        path = colour_pairs(tmp_path / "data", num=200, num_prompts=20)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        kept = [{**row, "scores": row["ratings"]["red"]} for row in rows if abs(row["ratings"]["red"][0] - row["ratings"]["red"][1]) > 0.2]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        settings = config(path, cache, encoder=ENCODER, head="linear", data={"gold": None}, optimization={"epochs": 60})
        evaluation = train(settings, tmp_path / "reward")
        assert evaluation["members"][0]["temperature"] == 1
        assert "ranked right" in evaluation["members"][0]["note"]
        assert evaluation["heldout"]["accuracy"]["value"] == 1


@pytest.mark.parametrize("which", ["label", "gold"])
def test_too_few_held_out_prompts_are_refused_before_anything_is_trained(which, cache, tmp_path):
    path = colour_pairs(tmp_path / "data", num=24, num_prompts=4 if which == "label" else 12)
    if which == "gold":  # the second opinion prefers something on one held-out prompt alone
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        keys = [f"{('red', 'green', 'blue')[k % 3]} number {k}" for k in range(12)]
        heldout = [key for key, part in zip(keys, split_prompts(keys, 0.3, 0.2, 0).tolist(), strict=True) if part == 2]
        for row in rows:
            if row["prompt"] != heldout[0]:
                row["ratings"]["gold"] = [0.5, 0.5]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = []
    with pytest.raises(ValueError, match=r"of 1 prompts; an interval over prompts needs two of them: raise data\.heldout"):
        train(config(path, cache), tmp_path / "reward", lambda what, done, total: trained.append(what))
    assert set(trained) <= {"embeddings"}
    assert not list(tmp_path.glob(".reward*"))


def test_flipped_labels_are_found_and_the_second_opinion_tells(cache, tmp_path):
    path = colour_pairs(tmp_path / "data", num=600, num_prompts=30, flipped=0.25)
    found = {}
    for noise in ("none", "posterior"):
        found[noise] = train(config(path, cache, noise=noise, ensemble={"members": 1}), tmp_path / noise)
    before, after = (found["posterior"]["noise"][f"noise/labels_right_{when}"] for when in ("before", "after"))
    assert before == pytest.approx(0.75, abs=0.05)
    assert after > 0.88
    assert found["posterior"]["noise"]["noise/flip_rate"] == pytest.approx(0.25, abs=0.06)
    assert found["none"]["noise"]["noise/labels_right_after"] == before
    # The temperature knows of the flips: confidence is judged by the gold labels, not by the flipped ones.
    assert found["posterior"]["gold"]["ece"]["plain"] < found["none"]["gold"]["ece"]["plain"]


def test_labels_are_judged_by_models_that_never_saw_their_prompts(data, cache, tmp_path, monkeypatch):
    learnt, judged = [], []
    fit, log_odds = Fitting.fit, Fitting.log_odds

    def watched_fit(self, examples, *rest, **more):
        learnt.append(set(examples.cluster.tolist()))
        return fit(self, examples, *rest, **more)

    def watched_odds(self, member, examples):
        judged.append(set(examples.cluster.tolist()))
        return log_odds(self, member, examples)

    monkeypatch.setattr(Fitting, "fit", watched_fit)
    monkeypatch.setattr(Fitting, "log_odds", watched_odds)
    train(config(data, cache, noise={"name": "posterior", "folds": 3}, optimization={"epochs": 2}), tmp_path / "reward")
    assert len(learnt) == 4
    for seen, asked in zip(learnt[:3], judged[:3], strict=True):
        assert not seen & asked
    assert set.union(*judged[:3]) == learnt[3]  # every training prompt is judged once


class TestMistakes:
    @pytest.mark.parametrize(("changes", "message"), [
        ({"objective": "bradley_tery"}, "objective.name: there is no 'bradley_tery'; did you mean 'bradley_terry'"),
        ({"noise": "voting2"}, "noise.name: there is no 'voting2'"), ({"head": "transformer"}, "head.name: there is no 'transformer'"),
        ({"objective": {"name": "ties", "kk": 3}}, "objective.kk: unknown key"), ({"objective": "ratings"}, "objective.aspects: required"),
        ({"head": {"name": "linear", "width": 3}}, "head.width: unknown key"),
        ({"objective": "plackett_luce", "noise": "smoothing"}, "plackett_luce takes labels as they are"),
        ({"noise": "co_filter", "lora": {}}, "co_filter trains two models at once"),
        ({"head": {"name": "mlp", "dropout": 1.0}}, "dropout in")])
    def test_parts_that_do_not_exist_or_go_together_are_refused_together(self, data, cache, changes, message):
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
            build_parts(config(data, cache, **changes))

    def test_data_that_teaches_nothing_is_refused(self, cache, tmp_path):
        path = colour_pairs(tmp_path / "one", num=20, num_prompts=1)
        with pytest.raises(ValueError, match="1 distinct prompt cannot be split"):
            train(config(path, cache), tmp_path / "reward")
        path = colour_pairs(tmp_path / "ties", num=20, extra={"scores": [1, 1]})
        with pytest.raises(ValueError, match=r"20 rows.*cannot be used.*tie"):
            train(config(path, cache), tmp_path / "reward")
        with pytest.raises(ValueError, match="none of the training judgements has a winner"):
            train(config(path, cache, data={"ties": "keep"}), tmp_path / "reward")
        with pytest.raises(ValueError, match="no row has a rating 'sharpness'"):
            train(config(colour_pairs(tmp_path / "three"), cache, objective={"name": "ratings", "aspects": ["sharpness"]}),
                  tmp_path / "reward")
        assert not (tmp_path / "reward").exists()

    def test_a_function_cannot_be_adapted(self, data, cache, tmp_path):
        with pytest.raises(ValueError, match="has no network to adapt"):
            train(config(data, cache, lora={"rank": 2}), tmp_path / "reward")

    def test_folds_need_prompts(self, data, cache, tmp_path):
        with pytest.raises(ValueError, match="12 training prompts make no 20 folds"):
            train(config(data, cache, noise={"name": "posterior", "folds": 20}), tmp_path / "reward")


class TestEncoders:
    """The playground's CLIP, adapted and on video, and a tiny CLAP."""

    def pictures(self, folder, num=60):
        """Red or blue discs; bigger ones are better. CLIP's embedding knows size and colour."""
        from visalign.playground import render
        from visalign.playground.world import Scene, Shape

        folder.mkdir()
        generator = torch.Generator().manual_seed(0)
        rows = []
        for k in range(num):
            sizes = (8 + 12 * torch.rand(2, generator=generator)).tolist()
            colour = ("red", "blue")[k % 2]
            frames = [render([Scene((Shape(colour, "circle", 16.0, 16.0, size),))])[0] for size in sizes]
            names = [save_media(Media("image", frame), folder / f"{k}-{side}").name for side, frame in enumerate(frames)]
            rows.append({"prompt": f"a {('small', 'large')[k % 4 // 2]} {colour} circle {k % 10}", "media": names, "scores": sizes})
        (folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder

    def test_an_adapter_in_the_encoder_learns_and_comes_back(self, tmp_path):
        path, settings = self.pictures(tmp_path / "data"), {"epochs": 3, "batch": 16, "learning_rate": 1e-3}
        made = config(path, tmp_path / "cache", encoder=CLIP, data={"gold": None}, optimization=settings, ensemble={"members": 2},
                      lora={"rank": 2, "learning_rate": 3e-3})
        evaluation = train(made, tmp_path / "adapted")
        stored = load_reward_file(tmp_path / "adapted")
        assert len(stored.adapters) == 2
        assert all(float(value.abs().max()) > 0 for name, value in stored.adapters[0].items() if "lora_B" in name)
        assert evaluation["heldout"]["accuracy"]["value"] > 0.6

        from visalign.media import load_media

        media = [load_media(path / f"{k}-0.png") for k in range(6)]
        prompts = [Prompt("a small red circle")] * 6
        both = load_reward("trained", path=str(tmp_path / "adapted"))
        each = [load_reward("trained", path=str(tmp_path / "adapted"), member=k) for k in range(2)]
        values = [one.score(media, prompts, range(6)).raw for one in each]
        assert not torch.allclose(values[0], values[1])
        torch.testing.assert_close(both.score(media, prompts, range(6)).raw, (values[0] + values[1]) / 2)
        pixels = torch.stack([one.data for one in media]).float().div(255).requires_grad_()
        scored = each[1].score_tensor(pixels, prompts)
        torch.testing.assert_close(scored, values[1], atol=1e-4, rtol=1e-4)
        scored.sum().backward()
        assert float(pixels.grad.abs().max()) > 0
        assert not both.spec.differentiable
        with pytest.raises(ValueError, match="name one: member: 0"):
            both.score_tensor(pixels, prompts)

    def test_an_adapted_ensemble_is_the_same_after_a_stop(self, tmp_path):
        made = config(self.pictures(tmp_path / "data", num=40), tmp_path / "cache", encoder=CLIP, data={"gold": None},
                      optimization={"epochs": 1, "batch": 16}, ensemble={"members": 2}, lora={"rank": 2})

        class StopError(Exception):
            pass

        def stop(what, done, total):
            if (what, done) == ("members", 1):
                raise StopError

        with pytest.raises(StopError):
            train(made, tmp_path / "stopped", stop)
        train(made, tmp_path / "stopped")
        train(made, tmp_path / "whole")
        for name in ("reward.safetensors", "evaluation.json", "metrics.jsonl"):
            assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

    def test_videos_go_through_an_image_encoder_frame_by_frame(self, tmp_path):
        pytest.importorskip("av")
        images = self.pictures(tmp_path / "images", num=40)
        from visalign.media import load_media

        rows = [json.loads(line) for line in (images / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
        (tmp_path / "videos").mkdir()
        for row in rows:
            for side, name in enumerate(row["media"]):
                frames = load_media(images / name).data.expand(4, -1, -1, -1).contiguous()
                row["media"][side] = save_media(Media("video", frames, rate=4.0), tmp_path / "videos" / name.removesuffix(".png")).name
        (tmp_path / "videos" / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        encoder = {**CLIP, "video_frames": 2}
        made = config(tmp_path / "videos", tmp_path / "cache", encoder=encoder, data={"gold": None}, optimization={"epochs": 30})
        evaluation = train(made, tmp_path / "reward")
        assert evaluation["heldout"]["accuracy"]["value"] > 0.7
        reward = load_reward("trained", path=str(tmp_path / "reward"))
        assert reward.spec.modality == {"image", "video"}
        video = torch.rand(2, 4, 3, 32, 32, requires_grad=True)
        reward.score_tensor(video, [Prompt("a red circle")] * 2).sum().backward()
        assert float(video.grad[:, [0, 3]].abs().max()) > 0
        with pytest.raises(ValueError, match=r"is of kind video.*video_frames: 8"):
            train(config(tmp_path / "videos", tmp_path / "cache", encoder=CLIP, data={"gold": None}), tmp_path / "refused")

    @pytest.mark.parametrize("lora", [None, {"rank": 2, "target_modules": ["linear1"]}])
    def test_sounds_go_through_clap(self, tmp_path, lora):
        pytest.importorskip("soxr")
        from tests.rewards.test_clap import TEXTS, save_model, sound

        model = save_model(tmp_path / "clap")
        (tmp_path / "data").mkdir()
        rows = []
        for k in range(24):
            names = [save_media(Media("audio", gain * sound(1.0, seed=k).data, rate=8000.0), tmp_path / "data" / f"{k}-{side}").name
                     for side, gain in enumerate((1.0, 0.1))]
            rows.append({"prompt": f"{TEXTS[k % 3]} word{k % 8}", "chosen": names[0], "rejected": names[1]})
        (tmp_path / "data" / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        encoder = {"reward": "clap", "model": model}
        made = config(tmp_path / "data", tmp_path / "cache", encoder=encoder, data={"gold": None}, lora=lora, head="linear",
                      optimization={"epochs": 2 if lora else 30, "batch": 8})
        evaluation = train(made, tmp_path / "reward")
        if lora is None:
            assert evaluation["heldout"]["accuracy"]["value"] > 0.8  # louder is better
        reward = load_reward("trained", path=str(tmp_path / "reward"))
        silence = Media("audio", torch.zeros(1, 8000), rate=8000.0)
        scores = reward.score([sound(1.0), silence], [Prompt(TEXTS[0])] * 2, [0, 0])
        assert scores.valid.tolist() == [True, False]
        assert scores.reasons[1] == "no embedding"
        assert not reward.spec.differentiable
