"""PPD as a user meets it: prompts with users, a reward each, a run that resumes, pictures that differ by who asks."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.tiny_families import by_name
from visalign import checkpoint
from visalign.commands import sample
from visalign.config import make_config
from visalign.loop import train
from visalign.settings import ConfigError, apply_overrides


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, family = tmp_path_factory.mktemp("users"), by_name("Stable Diffusion 3")
    family.build().save_pretrained(folder / "model")
    lines = [{"prompt": text, "user": user} for text in ("a red circle", "two blue squares") for user in ("tidy", "busy")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder, {key: value for key, value in family.call.items() if key != "negative_prompt"}


def config(world, *overrides):
    folder, call = world
    users = {"tidy": {"reward": "jpeg_compressibility"}, "busy": {"reward": "jpeg_incompressibility"}}
    return make_config(apply_overrides({
        "model": {"path": str(folder / "model"), "device": "cpu", "call": {**call, "num_inference_steps": 3}},
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "rewards": [{"name": "by_user", "params": {"users": users}}],
        "sampler": {"dynamics": "ode", "steps": "none"},
        "algorithm": {"name": "preference", "loss": "dpo", "kappa": 50.0, "user_dropout": 0.2},
        "train": {"iterations": 2, "groups": 4, "group_size": 2, "updates": 1, "microbatch": 4, "learning_rate": 1e-2},
        "trainable": {"rank": 2, "users": {"num_tokens": 2, "width": 8}},
        "evaluation": {"num_prompts": 2, "every": 0, "batch": 2}, "checkpoint": {"every": 1, "keep": 3}}, overrides))


def test_a_run_with_users_resumes_bit_for_bit_and_samples_by_user(world, tmp_path):
    whole, half = train(config(world), tmp_path / "whole"), train(config(world), tmp_path / "half")
    shutil.rmtree(checkpoint.latest(half / "checkpoints"))
    train(config(world), half, resume=True)
    first, second = (checkpoint.load(checkpoint.latest(folder / "checkpoints")).tensors["weights"] for folder in (whole, half))
    assert any(name.startswith("users.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {"users.safetensors", "users.json"} <= {path.name for path in (whole / "adapter").iterdir()}

    users = ("tidy", "busy", {"tidy": 0.5, "busy": 0.5}, None)
    asked = [{"prompt": "a red circle", **({} if user is None else {"user": user})} for user in users]
    (tmp_path / "ask.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    sample.run(str(whole), [], adapter=None, texts=[], source=str(tmp_path / "ask.jsonl"), seeds="0", dtype=None, device="cpu",
               out=tmp_path / "out")
    pictures = [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len(pictures) == 4
    assert all(np.abs(pictures[0] - other).sum() > 0 for other in pictures[1:])


def test_users_without_embeddings_are_refused(world):
    with pytest.raises(ConfigError, match="users"):
        config(world, "trainable.mode=users", "trainable.users=null")
