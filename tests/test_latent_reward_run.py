"""A learned reward of latents trains the embedded pipeline, from the command line to the report; files of media are not for it."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from visalign import playground
from visalign.cli import app
from visalign.nn.reward_head import RewardHead
from visalign.samplers.latent_source import PipelineLatents
from visalign.samplers.policy import PipelinePolicy
from visalign.tracking import read_metrics
from visalign.types import Prompt

CALL = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 12, "height": 32, "width": 32}
SETTINGS = ["train.iterations=1", "train.groups=2", "train.group_size=4", "train.updates=1", "train.microbatch=8", "guards=[]",
            "evaluation.num_prompts=2", "evaluation.every=0", "model.eval_call={}", f"model.call={CALL}"]


def visalign(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head that reads the embedded pipeline's latents and prompts."""
    source = PipelineLatents(policy := PipelinePolicy.from_pipeline(playground.load_pipeline(), **CALL))
    torch.manual_seed(0)
    made = RewardHead(policy.latent_shape, prompt_dim=source.embed([Prompt("a red circle")]).shape[1], width=8)
    made.convention = source.convention
    made.save(file := tmp_path_factory.mktemp("head") / "head.safetensors")
    return file


def test_latents_and_pictures_are_scored_in_one_run(head: Path, tmp_path: Path) -> None:
    rewards = f"rewards=[{{name: latent_head, params: {{head: '{head}'}}}}, {{name: captions, weight: 0.5}}]"
    result = visalign("train", "quickstart", *SETTINGS, rewards, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output + result.stderr
    before, first = read_metrics(tmp_path / "run")
    assert first["reward/latent_head/valid_rate"] == first["reward/captions/valid_rate"] == 1.0
    assert first["reward/latent_head/group_std"] > 0
    assert before["eval/latent_head"] != 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "latent_head, training" in page


def test_a_head_of_other_latents_is_refused_before_sampling(head: Path, tmp_path: Path) -> None:
    other = RewardHead.load(head)
    other.convention = "another autoencoder"
    other.save(tmp_path / "other.safetensors")
    rewards = f"rewards=[{{name: latent_head, params: {{head: '{tmp_path / 'other.safetensors'}'}}}}]"
    result = visalign("train", "quickstart", *SETTINGS, rewards, "--out", tmp_path / "run")
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "reads latents 'another autoencoder', this run's are" in said
    assert RewardHead.load(head).convention in said
    assert not (tmp_path / "run" / "samples").exists()


def test_score_and_pairs(head: Path, tmp_path: Path) -> None:
    option = f"{{name: latent_head, params: {{head: '{head}'}}}}"
    call = [f"{key}={value}" for key, value in CALL.items()]
    made = visalign("pairs", "playground:pipeline", *call, "-p", "a red circle", "-r", option, "--group-size", 2,
                    "--out", tmp_path / "pairs")
    assert made.exit_code == 0, made.output + made.stderr
    refused = visalign("score", tmp_path / "pairs" / "media", "-r", option)
    assert refused.exit_code == 1
    assert "reads latents, which only a run has" in " ".join(refused.stderr.split())
