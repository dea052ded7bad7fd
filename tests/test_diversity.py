"""Diversity of pictures and of features, within prompts and across them, for two sides."""

import pytest
import torch

from visalign.diversity import DIFFERENCE, VENDI, across_prompts, pairwise_difference, pixel_rows, within_prompts
from visalign.maths.diversity import cosine_vendi
from visalign.types import Media


def picture(value, side=4):
    return Media("image", torch.full((3, side, side), value, dtype=torch.uint8))


def test_0_for_equal_pictures_and_1_for_opposite_ones():
    pictures = [picture(value) for value in (0, 255, 7, 7)]
    assert pairwise_difference(pictures, 2).tolist() == [1.0, 0.0]


def test_large_pictures_are_reduced_and_small_ones_are_not():
    assert pixel_rows([picture(3, 64)]).shape == (1, 3 * 64 * 64)
    large = Media("image", torch.zeros(3, 128, 256, dtype=torch.uint8))
    large.data[:, :, 128:] = 255
    rows = pixel_rows([large]).view(3, 32, 64)
    assert torch.equal(rows[:, :, :32], torch.zeros(3, 32, 32, dtype=torch.float64))
    assert torch.equal(rows[:, :, 32:], torch.ones(3, 32, 32, dtype=torch.float64))


def test_pixels_of_other_media_or_sizes_are_refused():
    with pytest.raises(ValueError, match="give an encoder"):
        pixel_rows([picture(1), picture(1, 8)])
    with pytest.raises(ValueError, match="audio"):
        pixel_rows([Media("audio", torch.zeros(1, 10), rate=8000)])


def features(seed, n=12, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CLUSTERS = torch.arange(6).repeat_interleave(2)


def test_within_is_the_mean_over_prompts():
    base, model = features(0), features(1)
    found = within_prompts(VENDI, base, model, CLUSTERS)
    assert found.base.mean == pytest.approx(sum(cosine_vendi(base[2 * k:2 * k + 2]) for k in range(6)) / 6)
    assert found.model.mean == pytest.approx(sum(cosine_vendi(model[2 * k:2 * k + 2]) for k in range(6)) / 6)
    assert found.gain.prompts == 6
    assert within_prompts(VENDI, base[::2], model[::2], torch.arange(6)) is None  # one seed each


def test_across_takes_one_sample_per_prompt_seed_by_seed():
    base, model = features(0), features(1)
    found = across_prompts(VENDI, base, model, CLUSTERS)
    assert found.contrast.base.mean == pytest.approx((cosine_vendi(base[::2]) + cosine_vendi(base[1::2])) / 2)
    assert found.contrast.gain.mean == pytest.approx(found.contrast.model.mean - found.contrast.base.mean)
    assert found.bias_base < 0  # a Vendi score grows with the set
    assert across_prompts(VENDI, base[:2], model[:2], CLUSTERS[:2]) is None  # one prompt


def test_a_mean_difference_of_pairs_has_no_bias_and_equal_sides_no_gain():
    base = features(0, n=60)
    found = across_prompts(DIFFERENCE, base, base, torch.arange(60))
    assert abs(found.bias_base) < 0.1 * found.contrast.base.mean
    assert (found.contrast.gain.mean, found.contrast.gain.low, found.contrast.gain.high) == (0.0, 0.0, 0.0)


def test_a_collapsed_side_is_seen():
    base, model = features(0, n=80), features(1, n=80)
    model[:, 0] += 20  # all in one direction
    clusters = torch.arange(40).repeat_interleave(2)
    assert within_prompts(VENDI, base, model, clusters).gain.high < 0
    assert across_prompts(VENDI, base, model, clusters).contrast.gain.high < 0
