"""JPEG sizes against numbers measured with PIL at quality 95."""

import io

import pytest
import torch
from PIL import Image

from visalign.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from visalign.types import Media, Prompt


def flat(size=512):
    return torch.full((3, size, size), 128, dtype=torch.uint8)


def gradient(size=512):
    ramp = torch.linspace(0, 255, size).round().to(torch.uint8)
    return torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), flat(size)[0]])


def noise(size=512):
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def score(reward, images, group_id=None):
    return reward.score([Media("image", image) for image in images], [Prompt("x")] * len(images), group_id or [0] * len(images))


def test_known_sizes_in_kilobytes():
    raw = score(JpegIncompressibility(), [flat(), noise()]).raw
    torch.testing.assert_close(raw, torch.tensor([4.7, 308.0]), rtol=0.01, atol=0)


def test_raw_is_the_length_of_the_file_pil_writes():
    buffer = io.BytesIO()
    Image.fromarray(gradient().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=80)
    assert score(JpegIncompressibility(quality=80), [gradient()]).raw.item() == pytest.approx(len(buffer.getvalue()) / 1000)


def test_the_two_directions_are_opposite_values_of_one_raw_score():
    images = [noise(), flat(), gradient()]
    small, large = score(JpegCompressibility(), images), score(JpegIncompressibility(), images)
    assert torch.equal(small.raw, large.raw)
    assert torch.equal(small.value, -large.value)
    assert small.value.argsort(descending=True).tolist() == [1, 2, 0]


def test_per_pixel_makes_resolutions_comparable():
    raw = score(JpegIncompressibility(per_pixel=True), [noise(512), noise(128)]).raw
    assert raw[0] == pytest.approx(308_000 / 512**2, rel=0.01)
    assert raw[0] == pytest.approx(float(raw[1]), rel=0.05)
    with pytest.raises(ValueError, match=r"sample 1 of group 0 is 128x128, its group's first is 512x512.*per_pixel=True"):
        score(JpegIncompressibility(), [noise(512), noise(128)])
    assert score(JpegIncompressibility(), [noise(512), noise(128)], group_id=[0, 1]).valid.all()


def test_video_is_the_mean_over_all_frames():
    video = Media("video", torch.stack([flat(64), noise(64)]), rate=8.0)
    frames = score(JpegIncompressibility(), [flat(64), noise(64)]).raw
    assert JpegIncompressibility().score([video], [Prompt("x")], [0]).raw.item() == pytest.approx(frames.mean().item())


@pytest.mark.parametrize("quality", [0, 96])
def test_quality_range(quality):
    with pytest.raises(ValueError, match=f"quality {quality} is outside"):
        JpegCompressibility(quality=quality)
