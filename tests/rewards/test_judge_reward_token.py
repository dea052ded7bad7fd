"""Reward heads at special tokens of a tiny language model with random weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.rewards.tiny_judge import make
from visalign.rewards.judges.reward_token import RewardTokenScore
from visalign.types import Media, Prompt

AXES = {"quality": "<|VQ|>", "motion": "<|MQ|>", "text": "<|TA|>"}
WORDING = "is better <|VQ|> . <|MQ|> : {prompt} <|TA|>"
IMAGES = [Media("image", torch.full((3, 20, 30), level, dtype=torch.uint8)) for level in (0, 200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make(tmp_path_factory.mktemp("model"), extra_tokens=tuple(AXES.values())))


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "linear.safetensors"
    save_file({"rm_head.weight": torch.randn(3, 16, generator=torch.Generator().manual_seed(0))}, path)
    return str(path)


def details(scores):
    return {name: column.tolist() for name, column in scores.details.items()}


def test_axes_before_the_caption_do_not_read_it(folder, linear):
    reward = RewardTokenScore(folder, linear, AXES, WORDING, readout="diagonal", device="cpu")
    one, other = (details(reward.score(IMAGES[:1], [Prompt(text)], [0])) for text in ("Yes", "No"))
    assert one["quality"] == other["quality"]
    assert one["motion"] == other["motion"]
    assert one["text"] != other["text"]
    lit = reward.score(IMAGES, [Prompt("Yes")] * 2, [0, 0])
    assert lit.raw[0] != lit.raw[1]
    torch.testing.assert_close(lit.raw, sum(lit.details.values()))


def test_z_scores_per_axis(folder, linear):
    plain = RewardTokenScore(folder, linear, AXES, WORDING, readout="diagonal", device="cpu").score(IMAGES, [Prompt("1")] * 2, [0, 0])
    scaled = RewardTokenScore(folder, linear, AXES, WORDING, readout="diagonal", mean=[1, 2, 3], std=[1, 2, 4],
                              device="cpu").score(IMAGES, [Prompt("1")] * 2, [0, 0])
    for axis, mean, std in zip(AXES, (1, 2, 3), (1, 2, 4), strict=True):
        torch.testing.assert_close(scaled.details[axis], (plain.details[axis] - mean) / std)


def test_a_deep_head_is_its_layers(folder, tmp_path):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.05), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    path = str(tmp_path / "head.safetensors")
    save_file({f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}, path)
    reward = RewardTokenScore(folder, path, {"preference": "<|TA|>"}, "{prompt} <|TA|>", device="cpu")
    hidden = torch.randn(5, 16)
    torch.testing.assert_close(reward._head(hidden), head(hidden))
    scores = reward.score(IMAGES, [Prompt("Yes")] * 2, [0, 0])
    assert scores.valid.all()
    assert list(scores.details) == ["preference"]


def test_a_caption_cannot_add_a_reward_token(folder, linear):
    reward = RewardTokenScore(folder, linear, AXES, WORDING, readout="diagonal", device="cpu")
    assert reward.score(IMAGES[:1], [Prompt("Yes <|VQ|> <|TA|> <image>")], [0]).valid.all()


@pytest.mark.parametrize(("change", "match"), [
    ({"tokens": {"a": "<|none|>"}}, "no token"), ({"wording": "<|VQ|> <|VQ|> <|MQ|> <|TA|> {prompt}"}, "2 times"),
    ({"wording": WORDING.replace("{prompt}", "")}, "no {prompt}"), ({"std": [1, 1, 0]}, "std above 0"), ({"mean": [1]}, "one number"),
    ({"head": "nowhere.safetensors"}, "no file")])
def test_bad_parameters(folder, linear, change, match):
    with pytest.raises(ValueError, match=match):
        RewardTokenScore(**{"folder": folder, "head": linear, "tokens": AXES, "wording": WORDING, "device": "cpu", **change})


def test_a_head_with_too_few_columns(folder, tmp_path):
    path = str(tmp_path / "head.safetensors")
    save_file({"rm_head.weight": torch.zeros(2, 16)}, path)
    with pytest.raises(ValueError, match="2 outputs, 3 tokens"):
        RewardTokenScore(folder, path, AXES, WORDING, readout="diagonal", device="cpu")
