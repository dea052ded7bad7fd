"""``visalign sample`` with guidance, on the embedded pipeline: weight 0 is the plain sample, rewards rise, negatives change the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from visalign import playground
from visalign.cli import app
from visalign.rewards.clip import ClipScore
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.reward_head import RewardHead, pooled_prompts
from visalign.types import Media, Prompt

CLIP = "{name: clip, params: {model: playground:clip}}"
CALL = ("num_inference_steps=4", "max_sequence_length=12", "height=32", "width=32")
PROMPT = "a green triangle right of a red square"


def sample(out: Path, *options: object) -> Result:
    words = ["sample", "playground:pipeline", *CALL, "-p", PROMPT, "--seeds", "0", "--device", "cpu", "--out", str(out)]
    return CliRunner().invoke(app, [*words, *map(str, options)])


def pixels(result: Result, folder: Path) -> np.ndarray:
    assert result.exit_code == 0, result.output + result.stderr
    return np.asarray(Image.open(folder / "0000.png")).astype(int)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random LoRA weights of the embedded pipeline, as a run leaves them."""
    policy = PipelinePolicy.from_pipeline(playground.load_pipeline(), num_inference_steps=4, max_sequence_length=12, height=32, width=32,
                                          guidance_scale=1.0)
    policy.roles.add_lora(rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.named_trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("run") / "adapter"
    policy.save_adapter(folder)
    return folder


def test_weight_zero_is_the_pipelines_own_sample_and_a_weight_raises_the_reward(tmp_path: Path) -> None:
    plain = pixels(sample(tmp_path / "plain", "guidance_scale=1.0"), tmp_path / "plain")
    zero = pixels(sample(tmp_path / "zero", "guidance_scale=1.0", "--guide", f"{CLIP}=0"), tmp_path / "zero")
    # Our loop and the pipeline's round differently in the last bits, hence at most one step of 8 bits.
    assert np.abs(plain - zero).max() <= 1
    guided = pixels(sample(tmp_path / "guided", "guidance_scale=1.0", "--guide", f"{CLIP}=50", "--guide-max-ratio", 2), tmp_path / "guided")
    clip = ClipScore(str(playground.clip_path()))
    media = [Media("image", torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1).contiguous()) for image in (plain, guided)]
    before, after = clip.score(media, [Prompt(PROMPT)] * 2, [0, 0]).raw.tolist()
    assert after > before + 0.05


def test_a_negative_model_equal_to_the_positive_one_is_plain_guidance(tmp_path: Path, adapter: Path) -> None:
    own = pixels(sample(tmp_path / "own", "guidance_scale=3", "--adapter", adapter), tmp_path / "own")
    same = pixels(sample(tmp_path / "same", "guidance_scale=3", "--positive", adapter, "--negative", adapter, "--merge-beta", 0),
                  tmp_path / "same")
    assert np.abs(own - same).max() <= 1
    other = pixels(sample(tmp_path / "other", "guidance_scale=3", "--adapter", adapter, "--negative", adapter), tmp_path / "other")
    assert np.abs(own - other).max() > 5


def test_a_reward_head_guides_and_must_fit_the_latents(tmp_path: Path) -> None:
    """A random head: weight 0 is the plain sample, weight 5 moves it; with and without the prompt."""
    policy = PipelinePolicy.from_pipeline(playground.load_pipeline(), num_inference_steps=4, max_sequence_length=12, height=32, width=32,
                                          guidance_scale=1.0)
    plain = pixels(sample(tmp_path / "plain", "guidance_scale=1.0"), tmp_path / "plain")
    for length in (0, pooled_prompts(policy)([Prompt(PROMPT)]).shape[1]):
        torch.manual_seed(0)
        file = tmp_path / f"head{length}.safetensors"
        RewardHead(policy.latent_shape, prompt_dim=length, width=8).save(file)
        zero = pixels(sample(tmp_path / f"zero{length}", "guidance_scale=1.0", "--guide", f"{file}=0"), tmp_path / f"zero{length}")
        assert np.abs(plain - zero).max() <= 1
        moved = pixels(sample(tmp_path / f"moved{length}", "guidance_scale=1.0", "--guide", f"{file}=50"), tmp_path / f"moved{length}")
        assert np.abs(plain - moved).max() > 5
    RewardHead((4, 8, 8), width=8).save(tmp_path / "small.safetensors")
    result = sample(tmp_path / "x", "--guide", f"{tmp_path / 'small.safetensors'}=1")
    assert "the head was trained on latents (4, 8, 8)" in " ".join(result.stderr.split())


def test_wrong_guidance_is_answered_with_what_to_do(tmp_path: Path, adapter: Path) -> None:
    cases = [(("--guide", "clip"), "write REWARD=WEIGHT"), (("--guide", "jpeg_compressibility=3"), "no gradient"),
             (("--merge-alpha", 0.5), "give --negative"), (("--guide-skip", 2), "give --guide"),
             (("guidance_scale=1.0", "--negative", adapter), "subtracts nothing"), (("--negative", tmp_path), "nothing in")]
    for options, message in cases:
        result = sample(tmp_path / "x", *options)
        assert result.exit_code == 1, message
        assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "x").exists()
