"""Smooth motion with a dynamics constraint: known translations, and the order of frozen, trembling, still-with-noise and moving video."""

import pytest
import torch
from torchvision.models.optical_flow import raft_small

from visalign.maths.optical_flow import fastest_motion, lucas_kanade, motion_smoothness
from visalign.media import load_media, save_media
from visalign.protocols import Reward
from visalign.rewards.flow_smoothness import FlowSmoothness
from visalign.types import Media, Prompt

WAVES = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) * 0.18
PHASES = torch.rand(40, generator=torch.Generator().manual_seed(1)) * 6.28


def texture(offsets, height=48, width=64):
    """A fixed band-limited pattern at the given offsets (x, y) in pixels, grey (T, H, W) in [0, 1]: translation is exact."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    return torch.stack([(sum(torch.sin(kx * (x - dx) + ky * (y - dy) + p) for (kx, ky), p in zip(WAVES.tolist(), PHASES, strict=True)) / 18
                         + 0.5).clamp(0, 1) for dx, dy in offsets])


def video(offsets, rate=8.0, noise=0.0):
    grey = texture(offsets)
    grey = (grey + noise * torch.randn(grey.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    return Media("video", (grey[:, None].expand(-1, 3, -1, -1) * 255).round().to(torch.uint8), rate=rate)


STEPS = range(5)
MOVING, FAST = [(2 * t, t) for t in STEPS], [(4 * t, 2 * t) for t in STEPS]
TREMBLING = [(2 * (t % 2), t % 2) for t in STEPS]
FROZEN = [(0, 0) for _ in STEPS]


def say(*videos, **params):
    return FlowSmoothness(device="cpu", **params).score(videos, [Prompt("a")] * len(videos), [0] * len(videos))


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.2, 0.1), (1.5, -0.75), (-4.0, 2.5)])
def test_lucas_kanade_finds_translations(shift):
    first, second = texture([(0, 0), shift])[:, None]
    inner = lucas_kanade(first, second)[0, :, 10:-10, 12:-12]
    error = (inner - torch.tensor(shift)[:, None, None]).norm(dim=0)
    assert error.mean() < 0.15
    assert error.max() < 0.6


def test_where_nothing_can_be_seen_nothing_moves():
    assert torch.equal(lucas_kanade(torch.full((1, 32, 32), 0.5), torch.full((1, 32, 32), 0.6)), torch.zeros(1, 2, 32, 32))
    with pytest.raises(ValueError, match="two of one shape"):
        lucas_kanade(torch.zeros(1, 32, 32), torch.zeros(1, 32, 16))


def test_smoothness_is_one_at_constant_velocity_and_zero_to_and_fro_and_between_otherwise():
    steady = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    assert abs(motion_smoothness(steady) - 1) < 1e-6
    assert abs(motion_smoothness(steady * torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1, 1))) < 1e-6
    assert motion_smoothness(torch.zeros(3, 2, 4, 4)) == 1
    for seed in range(5):
        flows = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0, 3, 6).view(6, 1, 1, 1)
        assert 0 <= motion_smoothness(flows) <= 1
        torch.testing.assert_close(motion_smoothness(7 * flows), motion_smoothness(flows))  # no scale
    # speeds 1, 2, 3 in one direction: 1 - 1 / mean(3, 5)
    growing = torch.ones(3, 2, 4, 4) * torch.tensor([1.0, 2, 3]).view(3, 1, 1, 1)
    torch.testing.assert_close(motion_smoothness(growing), torch.tensor(0.75))


def test_the_fastest_share_is_what_counts_as_motion():
    flows = torch.zeros(1, 2, 10, 10)
    flows[0, 0, 0, :5] = torch.tensor([1.0, 2, 3, 4, 5])
    assert fastest_motion(flows) == 3
    assert fastest_motion(flows, share=0.01) == 5


def test_a_frozen_video_is_perfectly_smooth_and_worth_nothing():
    scores = say(video(FROZEN))
    assert scores.details["smoothness"][0] > 0.999
    assert scores.raw[0] < 1e-4
    assert scores.valid.all()  # a true low score, not a missing one


def test_steady_motion_beats_trembling_noise_and_standing_still():
    scores = say(video(MOVING), video(TREMBLING), video(FROZEN, noise=2 / 255), video(FROZEN))
    moving, trembling, noisy, frozen = scores.raw.tolist()
    assert moving > 0.9
    assert trembling < 0.2
    assert noisy < 0.2
    assert frozen < noisy
    torch.testing.assert_close(scores.raw, scores.details["smoothness"] * scores.details["dynamics"])


def test_dynamics_grow_with_speed_and_rate_up_to_the_threshold():
    slow, moving, fast = say(video([(t, t / 2) for t in STEPS]), video(MOVING), video(FAST)).details["motion"]
    torch.testing.assert_close(moving / slow, torch.tensor(2.0), rtol=0.15, atol=0)
    torch.testing.assert_close(fast / slow, torch.tensor(4.0), rtol=0.15, atol=0)
    halved = say(video(MOVING, rate=4.0), video(MOVING), threshold=0.5)
    torch.testing.assert_close(halved.details["motion"][1], 2 * halved.details["motion"][0])
    torch.testing.assert_close(halved.details["dynamics"][1], 2 * halved.details["dynamics"][0])
    assert say(video(MOVING), video(FAST)).details["dynamics"].tolist() == [1.0, 1.0]


def test_the_order_survives_an_mp4_file(tmp_path):
    pytest.importorskip("av")
    samples = [video(MOVING), video(TREMBLING), video(FROZEN)]
    moving, trembling, frozen = say(*(load_media(save_media(one, tmp_path / str(row))) for row, one in enumerate(samples))).raw.tolist()
    assert moving > 0.9 > 0.2 > trembling > frozen
    assert frozen < 0.01


def test_size_and_batches():
    sample = video(FAST)
    whole, small = say(sample).details["motion"], say(sample, size=32).details["motion"]
    torch.testing.assert_close(small, whole, rtol=0.15, atol=0)  # in shorter sides, so the same at half the pixels
    torch.testing.assert_close(say(sample, batch_size=1).raw, say(sample, batch_size=3).raw)


def test_two_frames_have_no_change_of_motion():
    assert isinstance(FlowSmoothness(device="cpu"), Reward)
    scores = say(video(MOVING), video(MOVING[:2]))
    assert scores.valid.tolist() == [True, False]
    assert scores.reasons[1] == "fewer than 3 frames"
    assert scores.details["dynamics"][1].isnan()


def test_raft_from_a_checkpoint_is_asked_in_its_own_range(tmp_path):
    torch.manual_seed(0)
    network = raft_small(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    reward = FlowSmoothness(str(tmp_path / "raft.pth"), architecture="raft_small", device="cpu")
    frames = reward._shrink(video(MOVING[:3]).data)
    assert frames.shape == (3, 3, 128, 168)
    with torch.no_grad():
        torch.testing.assert_close(reward._flow(frames[:2], frames[1:]), network(2 * frames[:2] - 1, 2 * frames[1:] - 1)[-1])
    with pytest.raises(RuntimeError, match="Missing key"):
        FlowSmoothness(str(tmp_path / "raft.pth"), architecture="raft_large")


@pytest.mark.parametrize(("params", "problem"), [
    ({"threshold": 0.0}, "a frozen video has the smoothest motion"), ({"size": 8}, "too few pixels"),
    ({"weights": "nowhere.pth"}, "no file nowhere.pth")])
def test_bad_settings(params, problem):
    with pytest.raises(ValueError, match=problem):
        FlowSmoothness(**params)


def test_a_video_without_a_rate():
    with pytest.raises(ValueError, match=r"set Media\.rate"):
        say(video(MOVING, rate=None))
