"""Admission and dispatch: what reaches a reward, and what happens to what it returns."""

from dataclasses import replace

import pytest
import torch

from visalign.plugins import load_reward
from visalign.protocols import RewardSpec
from visalign.rewards.function import FunctionReward
from visalign.rewards.jpeg import JpegCompressibility
from visalign.scoring import admit_latents, check_inputs, check_prompts, latent_media, score, spaces, telemetry
from visalign.types import Media, Prompt, Scores

IMAGE = Media("image", torch.zeros(3, 4, 4, dtype=torch.uint8))
ANY = RewardSpec(name="any", modality=frozenset({"image", "video", "audio", "mesh"}))


def test_every_reward_sees_all_samples_in_order_and_answers_under_its_given_name():
    media = [Media("image", torch.full((3, 4, 4), level, dtype=torch.uint8)) for level in (3, 1, 2)]
    level = FunctionReward(lambda media, prompts: [float(sample.data[0, 0, 0]) for sample in media], name="level")
    scores = score({"mine": level, "size": JpegCompressibility()}, media, [Prompt("a"), Prompt("b"), Prompt("a")], [7, 9, 7])
    assert list(scores) == ["mine", "size"]
    assert scores["mine"].raw.tolist() == [3, 1, 2]


def test_an_exception_aborts_with_the_rewards_name():
    def broken(media, prompts):
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError) as caught:
        score({"judge": FunctionReward(broken)}, [IMAGE] * 2, [Prompt("a")] * 2, [0, 0])
    assert caught.value.__notes__ == ["while reward 'judge' scored 2 samples"]


class OneShort:
    spec = RewardSpec(name="one_short")

    def score(self, media, prompts, group_id):
        return Scores.from_values([1.0] * (len(media) - 1))


class ReturnsAList(OneShort):
    def score(self, media, prompts, group_id):
        return [1.0] * len(media)


@pytest.mark.parametrize(("reward", "got"), [(OneShort(), "1 scores for 2"), (ReturnsAList(), "list for 2")])
def test_answers_must_be_one_score_per_sample(reward, got):
    with pytest.raises(ValueError, match=f"reward 'x' returned {got} samples"):
        score({"x": reward}, [IMAGE] * 2, [Prompt("a")] * 2, [0, 0])


def test_a_bare_pairwise_judge_is_told_about_win_rates():
    judge = load_reward("bradley_terry", pointwise={"reward": "jpeg_compressibility"})
    with pytest.raises(ValueError, match=r"'judge' is a BradleyTerry without score\(\).*win_rate"):
        score({"judge": judge}, [IMAGE], [Prompt("a")], [0])


def test_groups_share_a_prompt_but_equal_prompts_need_not_share_a_group():
    reward = {"size": JpegCompressibility()}
    with pytest.raises(ValueError, match="sample 1 of group 0 has the prompt 'b', the group's first has 'a'"):
        score(reward, [IMAGE] * 2, [Prompt("a"), Prompt("b")], [0, 0])
    assert score(reward, [IMAGE] * 2, [Prompt("a")] * 2, [0, 1])["size"].valid.all()
    with pytest.raises(ValueError, match="2 media, 1 prompts and 2 group ids"):
        score(reward, [IMAGE] * 2, [Prompt("a")], [0, 0])


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("sample", [
    IMAGE,
    Media("video", zeros(2, 3, 4, 4, dtype=torch.uint8), rate=8.0),
    Media("audio", torch.tensor([[1.0, -1.0]]), rate=16000.0),
    Media("mesh", zeros(5, 3), faces=zeros(2, 3, dtype=torch.int64)),
])
def test_canonical_media_pass(sample):
    check_inputs(ANY, [sample], [Prompt("a")])


@pytest.mark.parametrize(("sample", "message"), [
    (Media("image", zeros(3, 4, 4)), r"sample 1: got float32 \(3, 4, 4\), expected uint8 \(3, H, W\) RGB; convert with"),
    (Media("image", zeros(4, 4, 3, dtype=torch.uint8)), r"got uint8 \(4, 4, 3\), expected uint8 \(3, H, W\)"),
    (Media("image", zeros(3, 0, 4, dtype=torch.uint8)), r"got uint8 \(3, 0, 4\)"),
    (Media("video", zeros(3, 2, 4, 4, dtype=torch.uint8), rate=8.0), r"expected uint8 \(frames, 3, H, W\)"),
    (Media("video", zeros(2, 3, 4, 4, dtype=torch.uint8)), "video without a rate; set Media.rate to its frames per second"),
    (Media("audio", torch.tensor([[1.5]]), rate=16000.0), r"values reach 1.5, expected \[-1, 1\]"),
    (Media("audio", torch.tensor([[float("nan")]]), rate=16000.0), r"values reach nan"),
    (Media("mesh", zeros(5, 3)), "a mesh without faces"),
])
def test_other_media_are_refused_with_the_row_and_the_fix(sample, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(ANY, [IMAGE, sample], [Prompt("a")] * 2)


def test_wrong_kind():
    video = Media("video", zeros(2, 3, 4, 4, dtype=torch.uint8), rate=8.0)
    with pytest.raises(ValueError, match="reward 'art', sample 0: it reads image, not video"):
        check_inputs(RewardSpec(name="any"), [video], [Prompt("a")], name="art")


def test_missing_metadata_names_reward_row_key_and_fix():
    spec = RewardSpec(name="ocr", requires=frozenset({"prompt", "target_text"}))
    prompts = [Prompt("a sign", metadata={"target_text": "SALE"}), Prompt("a shop", metadata={"lang": "en"})]
    with pytest.raises(ValueError, match=r"'ocr', prompt 1 \('a shop'\): metadata lacks 'target_text' \(it has: lang\); add it"):
        check_prompts(spec, prompts)
    with pytest.raises(ValueError, match="prompt 0: the text is empty"):
        check_prompts(spec, [Prompt(" ", metadata={"target_text": "SALE"})])
    check_prompts(spec, prompts[:1])


class Source:
    convention = "tiny vae"
    asked = 0

    def embed(self, prompts):
        self.asked += 1
        return torch.tensor([[float(len(prompt.text))] for prompt in prompts], dtype=torch.float64)


def reads_latents(name="raw", convention="", requires=()):
    reward = FunctionReward(lambda media, prompts: [float(one.data.sum()) for one in media], name=name, modality=["latent"])
    reward.spec = replace(reward.spec, convention=convention, requires=frozenset(requires))
    return reward


def test_each_reward_gets_the_samples_in_its_own_space():
    prompts, rewards = [Prompt("a"), Prompt("bb")], {"size": JpegCompressibility(), "raw": reads_latents()}
    latents = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], dtype=torch.float64)
    kept = latent_media(latents, prompts, Source(), rewards.values())
    seconds = {}
    scores = score(rewards, [IMAGE] * 2, prompts, [0, 1], kept, seconds)
    assert list(scores) == ["size", "raw"]
    assert scores["raw"].raw.tolist() == [3.0, 7.0]
    assert list(seconds) == ["size", "raw"]
    assert all(value > 0 for value in seconds.values())
    assert spaces(rewards.values()) == {"media", "latent"}
    assert score({"raw": rewards["raw"]}, [], prompts, [0, 1], kept)["raw"].raw.tolist() == [3.0, 7.0]


def test_prompts_are_embedded_only_for_rewards_that_ask():
    source, prompts, latents = Source(), [Prompt("a"), Prompt("bb")], torch.zeros(2, 1, 2)
    plain = latent_media(latents, prompts, source, [reads_latents()])
    assert (source.asked, plain[0].prompt_embeds, plain[0].convention) == (0, None, "tiny vae")
    embedded = latent_media(latents, prompts, source, [reads_latents(), reads_latents(requires=["prompt_embeds"])])
    assert [one.prompt_embeds.tolist() for one in embedded] == [[1.0], [2.0]]
    assert embedded[0].prompt_embeds.dtype == torch.float32
    check_prompts(reads_latents(requires=["prompt_embeds"]).spec, prompts)


@pytest.mark.parametrize(("sample", "message"), [
    (Media("latent", torch.tensor([1.0, float("inf")]), convention="tiny vae"), "expected float32 without infinity or NaN"),
    (Media("latent", torch.zeros(2, dtype=torch.float16), convention="tiny vae"), r"got a latent float16 \(2,\)"),
    (Media("latent", torch.zeros(2), convention="other"), "it reads latents 'tiny vae', not 'other'"),
    (Media("latent", torch.zeros(2), convention="tiny vae"), "finite prompt_embeds"),
    (Media("latent", torch.zeros(2), convention="tiny vae", prompt_embeds=torch.tensor([float("nan")])), "finite prompt_embeds"),
    (IMAGE, "it reads latent, not image"),
])
def test_latents_that_mean_something_else_are_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(reads_latents(convention="tiny vae", requires=["prompt_embeds"]).spec, [sample], [Prompt("a")])


def test_files_of_media_hold_no_latents():
    with pytest.raises(ValueError, match=r"'raw' reads latents, which only a run has"):
        score({"raw": reads_latents()}, [IMAGE], [Prompt("a")], [0])


def test_a_reward_of_other_latents_is_refused_before_anything_is_generated():
    admit_latents({"raw": reads_latents(), "own": reads_latents(convention="tiny vae"), "size": JpegCompressibility()}, Source())
    admit_latents({"size": JpegCompressibility()}, None)
    with pytest.raises(ValueError, match="'old' reads latents 'sd15', this run's are 'tiny vae'"):
        admit_latents({"old": reads_latents(convention="sd15")}, Source())
    with pytest.raises(ValueError, match="'raw' reads latents, and this policy does not say"):
        admit_latents({"raw": reads_latents()}, None)


def test_a_reward_reads_latents_or_decoded_media():
    assert ANY.space == "media"
    assert reads_latents().spec.space == "latent"
    with pytest.raises(ValueError, match="reads image, latent; a reward reads latents or decoded media, not both"):
        RewardSpec(name="both", modality=frozenset({"image", "latent"}))


def test_telemetry_is_that_of_the_rewards_that_tell():
    class Telling:
        spec = RewardSpec(name="telling")

        def score(self, media, prompts, group_id):
            return Scores.from_values([1.0] * len(media))

        def telemetry(self):
            return {"valid_rate": 0.5}

    silent = FunctionReward(lambda media, prompts: [1.0] * len(media), name="silent")
    assert telemetry({"a": Telling(), "b": silent}) == {"judge/a/valid_rate": 0.5}
