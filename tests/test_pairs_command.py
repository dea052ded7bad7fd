"""`visalign pairs` on the playground: from prompts to a data set that replays the very latents it was drawn as."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from visalign import playground, scoring
from visalign.cli import app
from visalign.commands import pairs as command
from visalign.config import dump_config, load_config
from visalign.media import load_media
from visalign.preferences import cached_latents, load_preferences
from visalign.preferences.groups import GroupFolder
from visalign.samplers.identity import pipeline_identity
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.replay import ReplaySampler
from visalign.samplers.rollout import generate
from visalign.types import Prompt

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 12}
PROMPTS = ["a red circle", "a blue square", "a green triangle"]
SIZE = 4


def visalign(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def pairs(out: Path, *options: str, prompts: list[str] = PROMPTS, size: int = SIZE) -> Result:
    texts = [word for prompt in prompts for word in ("-p", prompt)]
    call = [f"{key}={value}" for key, value in CALL.items()]
    return visalign("pairs", "playground:pipeline", *texts, "-r", "jpeg_compressibility", "--group-size", str(size), "--out", out, *options,
                    *call)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "whole"
    result = pairs(out)
    assert result.exit_code == 0, result.output + result.stderr
    return out


@pytest.fixture(scope="module")
def policy() -> PipelinePolicy:
    return PipelinePolicy(playground.load_pipeline(), CALL, probe=Prompt(PROMPTS[0]))


def rows(out: Path, name: str = "preferences.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def trained_adapter(folder: Path) -> PipelinePolicy:
    """A policy whose adapter is far from nothing, and is written to the folder."""
    trained = PipelinePolicy(playground.load_pipeline(), CALL)
    trained.roles.add_lora(rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.named_trainable().values():
            parameter.normal_(std=0.1, generator=generator)
    trained.save_adapter(folder)
    return trained


def test_one_pair_per_prompt_with_its_files_scores_and_seeds(whole):
    assert [row["prompt"] for row in rows(whole)] == PROMPTS
    for row, group in zip(rows(whole), rows(whole, "groups.jsonl"), strict=True):
        values, pair = group["values"]["jpeg_compressibility"], row["metadata"]["pair"]
        assert row["scores"] == [max(values), min(values)]
        assert pair["margin"] == pytest.approx(max(values) - min(values), rel=1e-6)
        assert pair["seeds"] == [group["seeds"][k] for k in row["rows"]]
        assert pair["rewards"] == {"jpeg_compressibility": row["scores"]}
        assert all((whole / file).is_file() for file in row["media"])


def test_the_stored_scores_are_those_of_the_stored_media(whole):
    from visalign.plugins import load_reward

    row = rows(whole)[0]
    media = [load_media(whole / file) for file in row["media"]]
    found = scoring.score({"r": load_reward("jpeg_compressibility")}, media, [Prompt(row["prompt"])] * 2, [0, 0])
    assert found["r"].value.tolist() == row["scores"]


def test_it_replays_the_generated_latents_bit_for_bit_and_without_an_encoder(whole, policy, tmp_path):
    cached = cached_latents(policy, load_preferences(whole), tmp_path, identity=pipeline_identity(policy))
    assert (cached.encoded, cached.found) == (0, 2 * len(PROMPTS))
    sampler = ReplaySampler(cached.dataset)
    found = sampler.rollout(policy, sampler.dataset.prompts, rows=range(len(PROMPTS)), iteration=0, first_index=0)
    for k, (row, group) in enumerate(zip(rows(whole), rows(whole, "groups.jsonl"), strict=True)):
        drawn = generate(policy, [Prompt(group["prompt"])] * SIZE, group["seeds"])
        assert torch.equal(found.x_final[2 * k:2 * k + 2], drawn[row["rows"]])
        assert torch.equal(policy.decode(drawn)[row["rows"][0]].data, load_media(whole / row["media"][0]).data)
    assert found.scores["preference"].value.reshape(-1, 2).diff(dim=1).lt(0).all()


@pytest.mark.parametrize("moment", ["scoring", "before the line", "within the line"])
def test_a_stopped_call_continues_and_ends_with_the_same_files(whole, tmp_path, monkeypatch, moment):
    out = tmp_path / "stopped"
    owner, name = (scoring, "score") if moment == "scoring" else (GroupFolder, "append")
    original, calls = getattr(owner, name), [0]

    def stop(*given, **options):
        calls[0] += 1
        if calls[0] == 2:
            if moment == "within the line":
                with (out / "groups.jsonl").open("a") as file:
                    file.write('{"group": 1, "prompt": "a bl')
            raise KeyboardInterrupt
        return original(*given, **options)

    monkeypatch.setattr(owner, name, stop)
    stopped = pairs(out)
    assert stopped.exit_code == 130
    assert "1 of 3 groups" in stopped.stderr
    assert not (out / "preferences.jsonl").exists()
    monkeypatch.undo()
    assert pairs(out).exit_code == 0
    for file in ("preferences.jsonl", "groups.jsonl", "pairs.json", "latents/000001.safetensors", "media/000002-03.png"):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file


def test_another_choice_from_the_same_samples_loads_no_model(whole, tmp_path, monkeypatch):
    before = (whole / "preferences.jsonl").read_bytes()
    monkeypatch.setattr(command, "load_pipeline", lambda *given: pytest.fail("the model was loaded"))
    result = pairs(whole, "--rule", "all", "--per-prompt", "3")
    assert result.exit_code == 0, result.output + result.stderr
    assert len(rows(whole)) == 9
    assert pairs(whole, "--rule", "list").exit_code == 0
    assert load_preferences(whole).num_candidates == SIZE
    assert pairs(whole).exit_code == 0
    assert (whole / "preferences.jsonl").read_bytes() == before


def test_more_prompts_may_follow_but_no_other_settings(whole, tmp_path):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    assert pairs(out, prompts=[*PROMPTS, "a yellow star"]).exit_code == 0
    assert rows(out)[:3] == rows(whole)
    assert len(rows(out)) == 4
    for given, message in (({"size": 5}, "group_size: 4 there, 5 now"), ({"prompts": ["a cat"]}, "prompt 0 was 'a red circle' there")):
        refused = pairs(out, **given)
        assert refused.exit_code == 1
        assert message in refused.stderr.replace("\n", " ")


def test_invalid_samples_are_counted_and_in_no_pair(tmp_path, monkeypatch):
    script = tmp_path / "picky.py"
    script.write_text("def picky(media, prompts):\n    return [None if k == 1 else float(k) for k in range(len(media))]\n")
    result = visalign("pairs", "playground:pipeline", "-p", PROMPTS[0], "-r", f"{script}:picky", "--group-size", SIZE, "--rule", "all",
                      "--out", tmp_path / "out", *(f"{key}={value}" for key, value in CALL.items()))
    assert result.exit_code == 0, result.output + result.stderr
    assert [row["rows"] for row in rows(tmp_path / "out")] == [[3, 0], [2, 0], [3, 2]]
    assert "invalid samples: picky" in result.output
    assert rows(tmp_path / "out", "groups.jsonl")[0]["values"]["picky"] == [0.0, None, 2.0, 3.0]


def test_no_pair_at_all_is_an_error_that_keeps_the_samples(whole, tmp_path):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    result = pairs(out, "--margin", "1000")
    assert result.exit_code == 1
    assert "no group gave a pair; lower --margin (now 1000)" in result.stderr
    assert "below the margin" in result.output
    assert len(rows(out, "groups.jsonl")) == 3


def test_an_adapter_is_sampled_with_and_its_content_counts(policy, whole, tmp_path):
    trained = trained_adapter(tmp_path / "adapter")
    result = pairs(tmp_path / "out", "--adapter", str(tmp_path / "adapter"), prompts=PROMPTS[:1])
    assert result.exit_code == 0, result.output + result.stderr
    dataset = load_preferences(tmp_path / "out")
    (row,), (group,) = rows(tmp_path / "out"), rows(tmp_path / "out", "groups.jsonl")
    drawn = generate(trained, [Prompt(PROMPTS[0])] * SIZE, group["seeds"])
    found = ReplaySampler(dataset).rollout(policy, dataset.prompts, rows=[0], iteration=0, first_index=0)
    assert torch.allclose(found.x_final, drawn[row["rows"]], atol=1e-4)
    assert group["seeds"] == rows(whole, "groups.jsonl")[0]["seeds"]
    assert group["values"] != rows(whole, "groups.jsonl")[0]["values"]
    with torch.no_grad():
        next(iter(trained.named_trainable().values())).add_(1)
    trained.save_adapter(tmp_path / "adapter")
    assert "adapter" in pairs(tmp_path / "out", "--adapter", str(tmp_path / "adapter"), prompts=PROMPTS[:1]).stderr


def test_a_runs_folder_stands_for_its_model_call_and_adapter(tmp_path):
    run = tmp_path / "run"
    trained_adapter(run / "adapter")
    call = "{" + ", ".join(f"{key}: {value}" for key, value in CALL.items()) + "}"
    config = load_config("quickstart", [f"model.call={call}", "model.eval_call={num_inference_steps: 3}"])
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    result = visalign("pairs", run, "-p", PROMPTS[0], "-r", "jpeg_compressibility", "--group-size", SIZE, "--out", tmp_path / "of-run")
    assert result.exit_code == 0, result.output + result.stderr
    words = [f"{key}={value}" for key, value in {**CALL, "num_inference_steps": 3}.items()]
    same = visalign("pairs", "playground:pipeline", "-p", PROMPTS[0], "-r", "jpeg_compressibility", "--group-size", SIZE, "--adapter",
                    run / "adapter", "--out", tmp_path / "of-adapter", *words)
    assert same.exit_code == 0, same.output + same.stderr
    assert rows(tmp_path / "of-run") == rows(tmp_path / "of-adapter")


@pytest.mark.parametrize(("words", "message"), [
    (["-r", "captions"], "nothing to draw"),
    (["-p", "a red circle"], "which rewards?"),
    (["-p", "a red circle", "-r", "captions", "--group-size", "1"], "--group-size must be at least 2"),
    (["-p", "a red circle", "-r", "captions", "--rule", "worst"], "rule 'worst': use best_worst, random, all, rso, list"),
    (["-p", "a red circle", "-r", "captions", "--agree", "some"], "agreement 'some': use combined, majority, unanimous"),
    (["-p", "a red circle", "-r", "captions", "--margin", "-1"], "margin must be at least 0"),
    (["-p", "a red circle", "-r", "captions", "--per-prompt", "0"], "per_prompt must be at least 1"),
    (["-p", "a red circle", "-r", "captions", "--adapter", "gone"], "adapter 'gone': no such folder"),
    (["-p", "a red circle", "-r", "nothing_like_it"], "nothing_like_it"),
    (["-p", "a red circle", "-r", "{name: vendi, params: {encoder: {reward: clip, model: playground:clip}}}"],
     "vendi judges a set of samples as a whole"),
])
def test_wrong_calls_are_explained_before_anything_is_loaded(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(command, "load_pipeline", lambda *given: pytest.fail("the model was loaded"))
    result = visalign("pairs", "playground:pipeline", *words, "--out", tmp_path / "out")
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
