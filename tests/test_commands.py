"""From `visalign train` to an adapter that plain diffusers loads, in real processes, on a tiny random pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from scripts.tiny_families import by_name
from visalign.cli import app

PROMPTS = ["a red circle", "two blue squares", "A red circle", "a green triangle"]
SETTINGS = ["model.eval_call={}", "guards=[{name: jpeg_incompressibility}]", "rewards=[{name: jpeg_compressibility}]", "train.iterations=2",
            "train.groups=2", "train.group_size=4", "train.updates=1", "train.microbatch=4", "evaluation.num_prompts=4",
            "evaluation.every=0", "train.learning_rate=1e-2"]
PLAIN = """
import sys, torch
from diffusers import DiffusionPipeline
model, adapter, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model)
pipe.load_lora_weights(adapter)
assert "visalign" not in sys.modules
generator = torch.Generator("cpu").manual_seed(5)
pipe("a red circle", num_inference_steps=4, guidance_scale=1.0, height=32, width=32, generator=generator).images[0].save(out)
"""


def visalign(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sd3"
    by_name("Stable Diffusion 3").build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(model: Path) -> Path:
    prompts, folder = model.parent / "prompts.txt", model.parent / "run"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    call = "model.call={num_inference_steps: 4, guidance_scale: 1.0, height: 32, width: 32}"
    result = visalign("train", "quickstart", f"model.path={model}", call, f"data.prompts={prompts}", f"data.eval_prompts={prompts}",
                      *SETTINGS, "--out", folder)
    assert result.exit_code == 0, result.output + result.stderr
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_run_leaves_its_result_in_the_folder(run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "report.html", "adapter/README.md", "samples/before/samples.jsonl"):
        assert (run / name).is_file(), name
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3    # before, and two iterations


def test_sample_is_what_plain_diffusers_draws_with_the_adapter(run: Path, model: Path, tmp_path: Path) -> None:
    result = visalign("sample", run, "-p", "a red circle", "--seeds", "5", "--device", "cpu", "--out", tmp_path / "ours")
    assert result.exit_code == 0, result.output + result.stderr
    script = tmp_path / "plain.py"
    script.write_text(PLAIN, encoding="utf-8")
    subprocess.run([sys.executable, str(script), str(model), str(run / "adapter"), str(tmp_path / "plain.png")], cwd=tmp_path, check=True,
                   capture_output=True)
    ours = pixels(tmp_path / "ours" / "0000.png")
    assert np.array_equal(ours, pixels(tmp_path / "plain.png"))
    base = visalign("sample", model, "-p", "a red circle", "--seeds", "5", "num_inference_steps=4", "guidance_scale=1.0", "height=32",
                    "width=32", "--device", "cpu", "--out", tmp_path / "base")
    assert base.exit_code == 0
    assert not np.array_equal(ours, pixels(tmp_path / "base" / "0000.png"))


def test_evaluation_pictures_are_what_sample_draws_for_their_seed(run: Path, tmp_path: Path) -> None:
    row = json.loads((run / "samples" / "after" / "samples.jsonl").read_text().splitlines()[1])
    result = visalign("sample", run, "-p", row["prompt"], "--seeds", row["seed"], "--device", "cpu", "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output + result.stderr
    # Our loop and the pipeline's round differently in the last bits, hence at most one step of 8 bits.
    assert np.abs(pixels(tmp_path / "again" / "0000.png") - pixels(run / "samples" / "after" / row["file"])).max() <= 1


def test_resume_continues_a_finished_run_with_more_iterations(run: Path) -> None:
    result = visalign("train", "--resume", run, "train.iterations=3")
    assert result.exit_code == 0, result.output + result.stderr
    rows = [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [-1, 0, 1, 2]


def test_inspect_shows_what_was_found(model: Path) -> None:
    result = visalign("inspect", model, "num_inference_steps=3", "height=32", "width=32")
    assert result.exit_code == 0, result.output + result.stderr
    assert "verified" in result.output
    assert "hidden_states" in result.output


def test_inspect_refuses_what_it_cannot_run(model: Path) -> None:
    result = visalign("inspect", model, "num_inference_stepz=3")
    assert result.exit_code == 2  # a usage error: the call has no such argument
    assert "num_inference_stepz" in result.stderr
