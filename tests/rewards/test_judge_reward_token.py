"""Reward heads at special tokens of tiny language models with random weights: LLaVA, and Qwen2-VL on videos."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoProcessor

from tests.rewards.tiny_judge import make, make_qwen
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


# --- Qwen2-VL, whose processor has a part for videos ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return str(make_qwen(tmp_path_factory.mktemp("qwen"), extra_tokens=tuple(AXES.values())))


def video(num_frames, rate=8.0, seed=0):
    return Media("video", torch.randint(0, 256, (num_frames, 3, 28, 56), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8),
                 rate=rate)


def by_hand(folder, head, sample, rows, caption):
    """The head at the three tokens, from the prompt written out and the processor's own video part."""
    processor, network = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in sample.data[rows]]
    text = "<start>user: <|vision_start|><|video_pad|><|vision_end|>" + WORDING.format(prompt=caption) + "<end>"
    inputs = processor(text=[text], videos=[frames], return_tensors="pt", do_sample_frames=False)
    with torch.no_grad():
        hidden = network(**inputs).last_hidden_state[0]
    places = [int((inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids(token)).nonzero()) for token in AXES.values()]
    return hidden[places] @ load_file(head)["rm_head.weight"].T


@pytest.mark.parametrize(("options", "rows"), [({"num_frames": 6}, [0, 3, 6, 9, 12, 15]), ({"fps": 2.0}, [0, 5, 10, 15]),
                                               ({"fps": 4.0}, [0, 2, 4, 6, 9, 11, 13, 15]), ({"fps": 0.1}, [0, 5, 10, 15])])
def test_a_video_is_shown_as_one_at_the_rate_asked_for(qwen, linear, options, rows):
    """16 frames at 8 per second are two seconds."""
    reward = RewardTokenScore(qwen, linear, AXES, WORDING, readout="diagonal", modality="video", as_video=True, device="cpu", **options)
    sample = video(16)
    scores = reward.score([sample], [Prompt("Yes")], [0])
    expected = by_hand(qwen, linear, sample, rows, "Yes").diagonal()
    torch.testing.assert_close(torch.stack([scores.details[axis][0] for axis in AXES]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.raw[0], expected.sum(), rtol=0, atol=1e-5)


def test_the_first_output_serves_all_axes(qwen, linear):
    reward = RewardTokenScore(qwen, linear, AXES, WORDING, modality="video", as_video=True, num_frames=4, device="cpu")
    sample = video(4)
    expected = by_hand(qwen, linear, sample, [0, 1, 2, 3], "No")[:, 0]
    torch.testing.assert_close(reward.score([sample], [Prompt("No")], [0]).raw[0], expected.sum(), rtol=0, atol=1e-5)


def test_only_the_axis_behind_the_caption_reads_it_and_all_see_the_motion(qwen, linear):
    reward = RewardTokenScore(qwen, linear, AXES, WORDING, readout="diagonal", modality="video", as_video=True, num_frames=4, device="cpu")
    backwards = Media("video", video(4).data.flip(0), rate=8.0)
    one, other, back = (details(reward.score([sample], [Prompt(text)], [0]))
                        for sample, text in ((video(4), "Yes"), (video(4), "No"), (backwards, "Yes")))
    assert [axis for axis in AXES if one[axis] != other[axis]] == ["text"]
    assert [axis for axis in AXES if one[axis] != back[axis]] == list(AXES)


def test_pictures_of_a_video_are_another_question(qwen, linear):
    shown, pictures = (RewardTokenScore(qwen, linear, AXES, WORDING, modality="video", as_video=as_video, num_frames=4, device="cpu")
                       for as_video in (True, False))
    assert shown.score([video(4)], [Prompt("Yes")], [0]).raw != pictures.score([video(4)], [Prompt("Yes")], [0]).raw
    assert shown.spec.version != pictures.spec.version
    still = RewardTokenScore(qwen, linear, {"preference": "<|TA|>"}, "{prompt} <|TA|>", device="cpu")
    assert still.score(IMAGES, [Prompt("Yes")] * 2, [0, 0]).valid.all()  # HPSv3's form


def test_videos_that_cannot_be_shown(qwen, folder, linear):
    with pytest.raises(ValueError, match="has no part for videos; leave as_video out"):
        RewardTokenScore(folder, linear, AXES, WORDING, modality="video", as_video=True, device="cpu")
    with pytest.raises(ValueError, match="set modality: video"):
        RewardTokenScore(qwen, linear, AXES, WORDING, as_video=True, device="cpu")
    reward = RewardTokenScore(qwen, linear, AXES, WORDING, modality="video", as_video=True, fps=2.0, device="cpu")
    with pytest.raises(ValueError, match="a video without a rate"):
        reward.score([video(8, rate=None)], [Prompt("Yes")], [0])


def test_a_chat_template_that_repeats_the_text(qwen, linear, tmp_path):
    shutil.copytree(qwen, tmp_path / "twice")
    template = tmp_path / "twice" / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ part['text'] }}", "{{ part['text'] }}{{ part['text'] }}"))
    reward = RewardTokenScore(str(tmp_path / "twice"), linear, AXES, WORDING, device="cpu")
    with pytest.raises(ValueError, match=r"makes \[2, 2, 2\] of the tokens of quality, motion, text"):
        reward.score(IMAGES[:1], [Prompt("Yes")], [0])
