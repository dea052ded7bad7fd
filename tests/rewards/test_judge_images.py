"""Pictures for a judge: lossless, the same bytes for the same pixels, smaller only with their aspect."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from visalign.rewards.judges.images import files, png
from visalign.types import Media


def noise(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_what_the_judge_sees_is_what_was_drawn():
    pixels = noise(3, 7, 5)
    sent = png(pixels)
    assert np.array_equal(np.asarray(Image.open(BytesIO(sent))), pixels.permute(1, 2, 0).numpy())
    assert png(pixels.clone()) == sent
    assert png(pixels.flip(0)) != sent


@pytest.mark.parametrize(("size", "max_side", "expected"), [((20, 40), 8, (8, 4)), ((40, 20), 8, (4, 8)), ((6, 4), 8, (4, 6)),
                                                            ((6, 4), None, (4, 6))])
def test_large_pictures_are_reduced_small_ones_stay(size, max_side, expected):
    assert Image.open(BytesIO(png(noise(3, *size), max_side))).size == expected


def test_frames_are_spread_from_the_first_to_the_last():
    video = Media("video", noise(10, 3, 4, 4), rate=8.0)
    assert files(video, 4, None) == tuple(png(video.data[row]) for row in (0, 3, 6, 9))
    assert len(files(video, 30, None)) == 10
    assert files(Media("image", video.data[0]), 4, None) == (png(video.data[0]),)
