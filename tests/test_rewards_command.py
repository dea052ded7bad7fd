"""``visalign rewards``: what there is, what each takes, without loading weights; and what adapters say of themselves is true."""

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import visalign.rewards
from visalign import playground
from visalign.cli import app
from visalign.commands.rewards import describe, summary
from visalign.plugins import find_reward, load_reward
from visalign.protocols import RewardSpec
from visalign.rewards import BUILTIN
from visalign.rewards.licences import licence_of

JUDGE = {"base_urls": "http://localhost:1/v1", "model": "m"}
CLIP = str(playground.clip_path())
# What can be made without weights of its own, and parameters that change what it declares.
MADE = {
    "bradley_terry": {"pointwise": {"reward": "jpeg_compressibility"}}, "by_user": {"users": {"ann": {"reward": "captions"}}},
    "captions": {}, "clip": {"model": CLIP, "video_frames": 2}, "consistency": {"model": CLIP},
    "consistency_judge": {"backend": JUDGE, "criteria": "prompt"}, "flow_smoothness": {},
    "framewise": {"image": {"reward": "jpeg_compressibility"}}, "jpeg_compressibility": {}, "jpeg_incompressibility": {"quality": 50},
    "loudness_gate": {}, "pairwise_judge": {"backend": JUDGE, "template": "verdict_token"}, "pointwise_judge": {"backend": JUDGE},
    "rubric_judge": {"backend": JUDGE, "modality": "video"}, "temporal_consistency": {"model": CLIP},
    "win_rate": {"judge": {"reward": "pairwise_judge", "backend": JUDGE}},
}


def run(*words):
    return CliRunner().invoke(app, ["rewards", *words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_table_has_every_name_with_what_it_reads_and_needs():
    result = run()
    assert result.exit_code == 0, result.output
    assert all(re.search(rf"│ {name} ", result.output) for name in BUILTIN)
    assert re.search(r"│ clap +│ audio +│ samples │ Prompt-audio agreement of one CLAP model; needs visalign\[audio\] +│", result.output)
    assert re.search(r"│ pairwise_judge +│ image, video +│ pairs ", result.output)
    assert re.search(r"│ win_rate +│ any +│ groups ", result.output)


def test_a_reward_whose_dependency_is_missing_says_so_and_the_others_are_listed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for module in ("tumble", "stability"):
        monkeypatch.delitem(sys.modules, f"visalign.rewards.{module}", raising=False)
        monkeypatch.delattr(visalign.rewards, module, raising=False)
    text = run().output
    assert re.search(r"simulator_stability +│ \? +│ \? +│ reward 'simulator_stability' needs the module 'mujoco'.*pip install", text)
    assert re.search(r"│ clip ", text)


@pytest.mark.parametrize("name", list(BUILTIN))
def test_every_reward_is_described_with_all_its_parameters(name):
    text = describe(name)
    found = find_reward(name)
    assert all(f"\n  {parameter}" in text for parameter in inspect.signature(found).parameters)
    assert 10 < len(summary(found)) < 120
    assert "reads  " in text
    assert "better  " in text


def test_one_in_full():
    text = run("pickscore").output
    for needle in ("PickScore of images", "reads         image", "prompts need  text", "range         -100 to 100", "licence       MIT",
                   "gradients     to the media", "processor: str = 'laion/CLIP-ViT-H-14", "Source: Pick-a-Pic, arXiv:2305.01569",
                   "batch_size: images per forward pass"):
        assert needle in text, needle
    assert "install       pip install 'visalign[ocr]'" in run("ocr").output
    assert "better        smaller" in run("jpeg_compressibility").output
    assert "unknown reward 'clop', did you mean 'clip'?" in run("clop").stderr


def test_rewards_of_others(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def sharpness(media, prompts, radius: int = 2, *, threshold):\n    'How sharp: by differences.'\n    return []\n")
    text = run(f"{file}:sharpness").output
    assert "How sharp: by differences." in text
    assert "  radius: int = 2\n  threshold (required)" in text
    assert "media" not in text.partition("parameters")[2]


@pytest.mark.parametrize("name", list(BUILTIN))
def test_every_class_says_what_it_is_before_anything_is_loaded(name):
    """A class attribute ``spec: RewardSpec``; the command, and whoever chooses a reward, reads it."""
    spec = find_reward(name).__dict__.get("spec")
    assert isinstance(spec, RewardSpec), f"give {BUILTIN[name]} a class attribute spec = RewardSpec(name='{name}', ...)"
    assert spec.name == name
    assert spec.raw_range[0] < spec.raw_range[1]


@pytest.mark.parametrize("name", list(MADE))
def test_what_a_class_says_holds_for_its_instances(name):
    declared, made = find_reward(name).spec, load_reward(name, **MADE[name]).spec
    assert made.modality <= declared.modality
    assert made.requires >= declared.requires
    assert declared.raw_range[0] <= made.raw_range[0] < made.raw_range[1] <= declared.raw_range[1]
    if name not in ("framewise", "by_user"):  # they are what they wrap
        same = ("arity", "direction", "space", "differentiable")
        assert {key: getattr(made, key) for key in same} == {key: getattr(declared, key) for key in same}
    assert made == replace(made, **{key: getattr(made, key) for key in ("name", "version")})


def test_licences_are_those_of_the_weights_that_are_loaded():
    assert licence_of("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K") == "MIT"
    assert licence_of("openai", "/data/sac+logos+ava1-l14-linearMSE.pth") == "MIT, Apache-2.0"
    assert licence_of("xswu/HPSv2/HPS_v2.1_compressed.pt") == licence_of("HPS_v2.1_compressed.pt") == "Apache-2.0"
    assert licence_of("openai", "/data/my_head.pth") == ""
    assert load_reward("clip", model=CLIP).spec.licence == ""


def test_the_readme_names_every_reward():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Rewards"):text.index("## Results")]
    assert [name for name in BUILTIN if f"`{name}`" not in table] == []
