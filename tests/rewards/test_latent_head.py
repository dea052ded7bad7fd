"""A head asked about clean latents: the affine formula at its noise level, one noise for all, and latents it does not know."""

from pathlib import Path

import pytest
import torch

from visalign.nn.reward_head import RewardHead
from visalign.plugins import load_reward
from visalign.rewards.latent_head import LatentHead
from visalign.scoring import check_inputs
from visalign.types import Media, Prompt

SHAPE = (4, 6, 6)


def head_file(folder: Path, convention: str = "tiny vae", prompt_dim: int = 0) -> Path:
    torch.manual_seed(0)
    head = RewardHead(SHAPE, width=8, prompt_dim=prompt_dim)
    head.convention = convention
    head.save(folder / "head.safetensors")
    return folder / "head.safetensors"


def samples(count=5, seed=1, embeds=0):
    generator = torch.Generator().manual_seed(seed)
    return [Media("latent", torch.randn(SHAPE, generator=generator), convention="tiny vae",
                  prompt_embeds=torch.randn(embeds, generator=generator) if embeds else None) for _ in range(count)]


def values(reward, media):
    return reward.score(media, [Prompt("a")] * len(media), [0] * len(media)).value


@pytest.mark.parametrize("prompt_dim", [0, 3])
def test_the_score_is_the_heads_answer_at_its_level_with_one_noise(tmp_path, prompt_dim):
    """scale head((1 - u) x0 + u noise, 1 - u, u, prompt) + bias, noise of seed 7 for every sample; u = 0.3."""
    file, media = head_file(tmp_path, prompt_dim=prompt_dim), samples(embeds=prompt_dim)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    x0 = torch.stack([one.data for one in media])
    prompt = torch.stack([one.prompt_embeds for one in media]) if prompt_dim else None
    expected = 2 * RewardHead.load(file)(0.7 * x0 + 0.3 * noise, torch.full((5,), 0.7), torch.full((5,), 0.3), prompt) - 1
    reward = LatentHead(file, level=0.3, seed=7, scale=2.0, bias=-1.0)
    torch.testing.assert_close(values(reward, media), expected)
    assert reward.spec.requires == ({"prompt_embeds"} if prompt_dim else set())
    assert (reward.spec.space, reward.spec.convention, reward.spec.differentiable) == ("latent", "tiny vae", False)


def test_batch_order_and_repetition_change_nothing_and_the_seed_does(tmp_path):
    file, media = head_file(tmp_path), samples()
    whole = values(LatentHead(file), media)
    torch.testing.assert_close(values(LatentHead(file, batch_size=2), media[::-1]).flip(0), whole, rtol=1e-5, atol=1e-6)
    assert not torch.equal(values(LatentHead(file, seed=1), media), whole)
    clean = LatentHead(file, level=0.0)
    assert torch.equal(values(clean, media), values(LatentHead(file, level=0.0, seed=1), media))
    assert len({LatentHead(file, **options).spec.version for options in ({}, {"seed": 1}, {"level": 0.1}, {"scale": 2.0})}) == 4


def test_a_head_without_an_answer_is_invalid(tmp_path):
    file = head_file(tmp_path)
    scores = LatentHead(file, scale=float("inf")).score(samples(2), [Prompt("a")] * 2, [0, 0])
    assert not scores.valid.any()
    assert scores.reasons == ("nonfinite", "nonfinite")


def test_latents_of_another_kind_are_refused(tmp_path):
    reward = load_reward("latent_head", head=str(head_file(tmp_path)))
    check_inputs(reward.spec, samples(1), [Prompt("a")])
    with pytest.raises(ValueError, match="it reads latents 'tiny vae', not 'sdxl'"):
        check_inputs(reward.spec, [Media("latent", torch.zeros(SHAPE), convention="sdxl")], [Prompt("a")])
    with pytest.raises(ValueError, match=r"this head takes latents \(4, 6, 6\), got \[\(4, 8, 8\)\]"):
        values(reward, [Media("latent", torch.zeros(4, 8, 8))])


def test_a_head_of_unknown_latents_asks_whose_they_are(tmp_path):
    file = head_file(tmp_path, convention="")
    with pytest.raises(ValueError, match="does not say which latents it was trained on"):
        LatentHead(file)
    assert LatentHead(file, convention="sdxl").spec.convention == "sdxl"
    assert LatentHead(file, convention="any").spec.convention == ""
    known = head_file(tmp_path)
    assert LatentHead(known, convention="any").spec.convention == ""
    with pytest.raises(ValueError, match="was trained on latents 'tiny vae', not 'sdxl'"):
        LatentHead(known, convention="sdxl")


@pytest.mark.parametrize(("options", "match"), [({"level": 1.0}, r"level 1.0 must lie in \[0, 1\)"), ({"level": -0.1}, "level -0.1"),
                                                ({"batch_size": 0}, "batch_size 0")])
def test_bad_parameters(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        LatentHead(head_file(tmp_path), **options)
