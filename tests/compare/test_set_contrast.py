"""Distances of two sets from exemplars: values, errors and biases on Gaussians whose distance is known."""

import pytest
import torch

from visalign.compare.set_contrast import compare_sets
from visalign.maths.frechet import Gaussian, Moments, frechet_distance

DIMS = 4
REFERENCE = Gaussian(torch.zeros(DIMS, dtype=torch.float64), torch.eye(DIMS, dtype=torch.float64))


def value(features):
    return -frechet_distance(Moments.of(features).gaussian(), REFERENCE)


def normal(seed, n, shift=0.0):
    return torch.randn(n, DIMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_a_shifted_set_is_farther_and_the_interval_says_so():
    """Base at distance 0, model at DIMS * 0.5^2 = 1; the same noise on both sides, so that the difference is sharp."""
    base = normal(0, 200)
    found = compare_sets(value, base, base + 0.5, torch.arange(200))
    assert found.contrast.base.mean == pytest.approx(value(base))
    assert found.contrast.gain.low < -1.0 < found.contrast.gain.high
    assert found.contrast.gain.high < 0
    assert (found.contrast.gain.samples, found.contrast.gain.prompts, found.dims) == (200, 200, DIMS)


def test_the_bias_of_few_samples_is_downwards_and_shrinks_with_their_number():
    few, many = (compare_sets(value, normal(0, n), normal(1, n), torch.arange(n)) for n in (24, 240))
    assert few.bias_base < 10 * many.bias_base * 0.5 < 0
    assert abs(many.contrast.base.mean - many.bias_base) < abs(many.contrast.base.mean)


def test_halves_keep_the_samples_of_a_prompt_together():
    """Eight copies per prompt: the error is that of 40 prompts, three times (sqrt 8) what 320 independent samples would have."""
    base, model = normal(0, 40), normal(1, 40)
    copies, clusters = (base.repeat_interleave(8, 0), model.repeat_interleave(8, 0)), torch.arange(40).repeat_interleave(8)

    def mean(features):
        return float(features[:, 0].mean())

    one, eight = compare_sets(mean, base, model, torch.arange(40)), compare_sets(mean, *copies, clusters)
    assert eight.contrast.gain.low == pytest.approx(one.contrast.gain.low)
    naive = compare_sets(mean, *copies, torch.arange(320))
    width = eight.contrast.gain.high - eight.contrast.gain.low
    assert width > 2.2 * (naive.contrast.gain.high - naive.contrast.gain.low)


def test_three_prompts_have_a_value_and_no_interval():
    found = compare_sets(lambda features: float(features.mean()), normal(0, 3), normal(1, 3), torch.arange(3))
    assert found.contrast.base.low is None
    assert found.bias_base is None
