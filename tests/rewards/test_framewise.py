"""Image rewards on video: which frames, their mean or worst in the reward's own direction, invalid frames; exact arithmetic."""

import pytest
import torch

from visalign import playground
from visalign.plugins import load_reward
from visalign.protocols import DifferentiableReward, Reward, RewardSpec
from visalign.rewards.clip import ClipScore
from visalign.rewards.framewise import FrameWise
from visalign.rewards.function import FunctionReward
from visalign.rewards.pairwise import BradleyTerry, WinRate
from visalign.scoring import admit, score
from visalign.types import Media, Prompt, Scores


def brightness(media, prompts):
    return [sample.data.float().mean().item() for sample in media]


def video(*levels):
    return Media("video", torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous(), rate=8.0)


def say(videos, **params):
    reward = FrameWise(FunctionReward(params.pop("function", brightness), direction=params.pop("direction", 1)), **params)
    return score({"r": reward}, videos, [Prompt("a")] * len(videos), [0] * len(videos))["r"]


def test_evenly_spaced_frames_the_ends_among_them():
    looked_at = []

    def look(media, prompts):
        looked_at.extend(brightness(media, prompts))
        return [0.0] * len(media)

    say([video(*range(9)), video(7, 9)], function=look, num_frames=3)
    assert looked_at == [0, 4, 8, 7, 9]


@pytest.mark.parametrize(("reduce", "direction", "raw", "value"), [
    ("mean", 1, 20.0, 20.0), ("min", 1, 10.0, 10.0), ("mean", -1, 20.0, -20.0), ("min", -1, 30.0, -30.0)])
def test_mean_and_worst_in_the_rewards_own_direction(reduce, direction, raw, value):
    scores = say([video(10, 20, 30)], reduce=reduce, direction=direction)
    assert scores.raw.tolist() == [raw]
    assert scores.value.tolist() == [value]
    assert scores.details["worst_frame"].tolist() == [0.0 if direction == 1 else 2.0]


def test_an_image_is_one_frame_and_order_does_not_matter():
    image = Media("image", video(40).data[0])
    assert say([image, video(40)]).raw.tolist() == [40.0, 40.0]
    assert say([video(1, 2, 6)], num_frames=3).raw.tolist() == say([video(6, 1, 2)], num_frames=3).raw.tolist() == [3.0]


def test_a_video_with_an_invalid_frame_is_invalid_for_that_reason():
    scores = say([video(10, 20), video(10, 99), video(30)],
                 function=lambda media, prompts: [None if level == 99 else level for level in brightness(media, prompts)])
    assert scores.valid.tolist() == [True, False, True]
    assert scores.reasons == (None, "no score", None)
    assert scores.raw[[0, 2]].tolist() == [15.0, 30.0]
    assert scores.raw[1].isnan()
    assert scores.value[1].isnan()


def test_details_are_means_over_frames():
    class Detailed:
        spec = RewardSpec(name="detailed")

        def score(self, media, prompts, group_id):
            return Scores.from_values([0.0] * len(media), details={"level": torch.tensor(brightness(media, prompts))})

    assert FrameWise(Detailed()).score([video(1, 3), video(5)], [Prompt("a")] * 2, [0, 0]).details["level"].tolist() == [2.0, 5.0]


@pytest.fixture(scope="module")
def clip():
    return ClipScore(str(playground.clip_path()))


def test_a_real_reward_agrees_with_its_own_frame_mean(clip):
    pixels = torch.randint(0, 256, (2, 5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    videos, prompts = [Media("video", one, rate=8.0) for one in pixels], [Prompt("a red circle"), Prompt("two blue squares")]
    wrapped = FrameWise(clip, num_frames=3)
    assert isinstance(wrapped, Reward)
    assert isinstance(wrapped, DifferentiableReward)
    assert wrapped.spec.name == "clip"
    raw = wrapped.score(videos, prompts, [0, 1]).raw
    torch.testing.assert_close(raw, ClipScore(str(playground.clip_path()), video_frames=3).score(videos, prompts, [0, 1]).raw)
    torch.testing.assert_close(wrapped.score_tensor(pixels.float() / 255, prompts), raw, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("reduce", "num_touched"), [("mean", 3), ("min", 1)])
def test_gradients_reach_the_frames_that_count(clip, reduce, num_touched):
    pixels = torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = FrameWise(clip, num_frames=3, reduce=reduce).score_tensor(pixels, [Prompt("a red circle")])
    (gradient,) = torch.autograd.grad(value.sum(), pixels)
    touched = (gradient.flatten(2).abs().amax(dim=2) > 0)[0].tolist()
    assert sum(touched) == num_touched
    assert not any(touched[1::2])


def test_it_wraps_a_reward_named_in_a_configuration():
    reward = load_reward("visalign.rewards.framewise:FrameWise", image={"reward": "jpeg_compressibility"}, reduce="min")
    inner = load_reward("jpeg_compressibility")
    noisy = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noisy[0] //= 8
    sizes = inner.score([Media("image", frame) for frame in noisy], [Prompt("a")] * 2, [0, 0]).value
    assert reward.score([Media("video", noisy, rate=8.0)], [Prompt("a")], [0]).value.item() == sizes.min().item() < sizes.max().item()


def test_prompts_are_checked_by_the_image_reward_before_anything_runs():
    class Picky(FunctionReward):
        def check_prompts(self, prompts):
            raise ValueError("row 0 has no text to write")

    with pytest.raises(ValueError, match="row 0 has no text to write"):
        admit({"r": FrameWise(Picky(brightness))}, [Prompt("a")])


@pytest.mark.parametrize("inner", [WinRate(BradleyTerry(FunctionReward(brightness))), BradleyTerry(FunctionReward(brightness)),
                                   FunctionReward(brightness, modality=["audio"])])
def test_only_pointwise_image_rewards_are_wrapped(inner):
    with pytest.raises(ValueError, match="needs a pointwise reward of images"):
        FrameWise(inner)


def test_bad_settings_and_a_gradient_that_is_not_there():
    reward = FunctionReward(brightness)
    with pytest.raises(ValueError, match="num_frames 0 must be at least 1"):
        FrameWise(reward, num_frames=0)
    with pytest.raises(ValueError, match="neither 'mean' nor 'min'"):
        FrameWise(reward, reduce="max")
    with pytest.raises(ValueError, match="has no gradient: FunctionReward"):
        FrameWise(reward).score_tensor(torch.zeros(1, 2, 3, 4, 4), [Prompt("a")])
