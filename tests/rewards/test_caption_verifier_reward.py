"""The embedded world's verifier through the reward interface, on its own renders; seed 0."""

import random

import pytest
import torch

from visalign.credit import reward_metrics
from visalign.playground import world
from visalign.protocols import Reward
from visalign.rewards.captions import CaptionVerifier
from visalign.scoring import admit, score
from visalign.types import Media, Prompt

TEXTS = ["a red circle", "two blue squares", "a green circle above a white square"]


def renders(texts, seed=0):
    rng = random.Random(seed)
    return [Media("image", image) for image in world.render([world.sample_scene(world.parse(text), rng) for text in texts])]


def run(metric, media, texts):
    reward = CaptionVerifier(metric)
    assert isinstance(reward, Reward)
    return score({"captions": reward}, media, [Prompt(text) for text in texts], list(range(len(texts))))["captions"]


@pytest.mark.parametrize("metric", ["mean", "strict"])
def test_true_captions_score_one(metric):
    scores = run(metric, renders(TEXTS), TEXTS)
    assert scores.raw.tolist() == [1, 1, 1]
    assert scores.valid.all()


def test_partly_wrong_pictures_have_a_mean_but_fail_strictly():
    media = renders(["a red square", "two blue squares", "a green circle below a white square"])
    mean, strict = run("mean", media, TEXTS), run("strict", media, TEXTS)
    torch.testing.assert_close(mean.raw, torch.tensor([2 / 3, 1.0, 3 / 4]))
    assert strict.raw.tolist() == [0, 1, 0]
    assert torch.equal(mean.details["strict"], strict.raw)
    assert torch.equal(strict.details["mean"], mean.raw)


def test_each_skill_is_a_detail_and_untested_ones_are_left_out_of_its_mean():
    media = renders(["a red square", "two blue squares", "a green circle below a white square"])
    scores = run("mean", media, TEXTS)
    assert scores.details["shape"].tolist() == [0, 1, 1]
    assert scores.details["relation"].isnan().tolist() == [True, True, False]
    metrics = reward_metrics("captions", scores, torch.arange(3))
    assert metrics["reward/captions/relation"] == 0
    assert metrics["reward/captions/shape"] == pytest.approx(2 / 3)


def test_captions_outside_the_grammar_are_refused_before_anything_is_drawn():
    prompts = [Prompt("a red circle"), Prompt("a cat on a mat")]
    with pytest.raises(ValueError, match=r"reward 'captions', prompt 1: caption 'a cat on a mat' is not in .*such as clip"):
        admit({"captions": CaptionVerifier()}, prompts)
    with pytest.raises(ValueError, match="prompt 1: caption 'a cat on a mat'"):
        run("mean", renders(["a red circle"] * 2), [prompt.text for prompt in prompts])
    admit({"captions": CaptionVerifier()}, prompts[:1])


def test_bad_metric_and_mixed_sizes():
    with pytest.raises(ValueError, match="'strictly' is neither"):
        CaptionVerifier("strictly")
    small, large = renders(["a red circle"])[0], Media("image", torch.zeros(3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="one size per call"):
        run("mean", [small, large], ["a red circle"] * 2)
