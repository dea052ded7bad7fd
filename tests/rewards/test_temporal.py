"""Temporal consistency on the embedded CLIP: its formula on the encoder's own embeddings, the still video, cuts and drift; seed 0."""

import pytest
import torch

from visalign import playground
from visalign.protocols import DifferentiableReward, Reward
from visalign.rewards.temporal import TemporalConsistency
from visalign.types import Media, Prompt

MODEL = str(playground.clip_path())


@pytest.fixture(scope="module")
def reward():
    return TemporalConsistency(MODEL)


def frames(num, seed=0):
    coarse = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=(40, 48), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def say(reward, *videos):
    return reward.score([Media("video", one, rate=8.0) for one in videos], [Prompt("a")] * len(videos), [0] * len(videos))


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
def test_the_score_is_the_mean_cosine_with_the_previous_and_the_first_frame(anchor):
    reward = TemporalConsistency(MODEL, anchor=anchor)
    assert isinstance(reward, Reward)
    video = frames(5)
    e = reward.encoder.images(list(video))
    expected = sum((1 - anchor) * e[t] @ e[t - 1] + anchor * e[t] @ e[0] for t in range(1, 5)) / 4
    torch.testing.assert_close(say(reward, video).raw[0], expected, atol=1e-6, rtol=0)


def test_a_still_video_scores_one_whatever_it_shows(reward):
    still = frames(1).expand(4, -1, -1, -1)
    assert (say(reward, still, frames(1, seed=1).expand(9, -1, -1, -1)).raw - 1).abs().max() < 1e-6


def test_a_cut_shows_in_the_worst_step_and_playing_backwards_changes_nothing(reward):
    a, b = frames(2)
    cut, once = torch.stack([a, a, a, b, b]), torch.stack([a, a, a, a, a])
    e = reward.encoder.images([a, b])
    scores = say(reward, cut, once, cut.flip(0))
    torch.testing.assert_close(scores.raw[0], (3 + e[0] @ e[1]) / 4, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.details["worst_step"], torch.stack([e[0] @ e[1], torch.tensor(1.0), e[0] @ e[1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.raw[2], scores.raw[0], atol=1e-6, rtol=0)


def test_the_anchor_sees_a_slow_drift_that_neighbours_do_not():
    a, b = frames(2).float()
    drift = torch.stack([a + (b - a) * k / 8 for k in range(9)]).round().to(torch.uint8)
    near, far = (say(TemporalConsistency(MODEL, anchor=anchor), drift).raw.item() for anchor in (0.0, 1.0))
    assert 1 - far > 5 * (1 - near)


def test_max_frames_takes_evenly_spaced_ones(reward):
    video = frames(9)
    some = TemporalConsistency(MODEL, max_frames=3)
    torch.testing.assert_close(say(some, video).raw, say(reward, video[[0, 4, 8]]).raw)


def test_one_frame_is_invalid_and_disturbs_nobody(reward):
    scores = say(reward, frames(3), frames(1), frames(4))
    assert scores.valid.tolist() == [True, False, True]
    assert scores.reasons[1] == "fewer than 2 frames"
    assert scores.details["worst_step"][1].isnan()
    torch.testing.assert_close(scores.raw[[0, 2]], torch.cat([say(reward, frames(3)).raw, say(reward, frames(4)).raw]))


def test_the_tensor_path_agrees_and_has_gradients(reward):
    assert isinstance(reward, DifferentiableReward)
    video = torch.stack([frames(4), frames(4, seed=1)])
    pixels = (video.float() / 255).requires_grad_()
    value = reward.score_tensor(pixels, [Prompt("a")] * 2)
    torch.testing.assert_close(value.detach(), say(reward, *video).raw, atol=1e-3, rtol=0)
    (gradient,) = torch.autograd.grad(value[0], pixels)
    assert (gradient.flatten(2).abs().amax(dim=2) > 0).tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize(("params", "problem"), [
    ({"anchor": 1.5}, r"anchor 1\.5 must be in \[0, 1\]"), ({"max_frames": 1}, "leaves no two frames to compare")])
def test_bad_settings(params, problem):
    with pytest.raises(ValueError, match=problem):
        TemporalConsistency(MODEL, **params)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 3, 32, 32)])
def test_score_tensor_wants_video(reward, shape):
    with pytest.raises(ValueError, match="expected video"):
        reward.score_tensor(torch.zeros(shape), [Prompt("a")])
