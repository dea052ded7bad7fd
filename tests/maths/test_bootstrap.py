"""Intervals against Student's, coverage under clusters, pairing against its purpose, half samples against closed forms."""

import math

import numpy as np
import pytest
import torch

from visalign.maths.bootstrap import bootstrap_gain, bootstrap_mean, half_samples
from visalign.maths.confidence import student_quantile
from visalign.maths.frechet import Gaussian, Moments, frechet_distance


def test_the_interval_is_that_of_the_normal_approximation():
    """n = 2000: half width 1.96 s / sqrt(n), within 8 % for 2000 resamples."""
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bootstrap_mean(values)
    half = 1.96 * float(values.std()) / math.sqrt(2000)
    assert found.mean == pytest.approx(float(values.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)
    assert found.low < found.mean < found.high
    assert found == bootstrap_mean(values)


@pytest.mark.parametrize("n", [6, 12, 40])
def test_small_samples_have_students_interval(n):
    """Averaged over 200 Gaussian samples; plain percentiles would be 1.44, 1.17 and 1.05 times too narrow."""
    generator = torch.Generator().manual_seed(n)
    widths, wanted = 0.0, 0.0
    for _ in range(200):
        values = torch.randn(n, generator=generator, dtype=torch.float64)
        found = bootstrap_mean(values)
        widths += found.high - found.low
        wanted += 2 * student_quantile(0.975, n - 1) * float(values.std()) / math.sqrt(n)
    assert 0.92 < widths / wanted < 1.03


def test_invalid_samples_are_left_out():
    values = torch.tensor([1.0, float("nan"), 3.0])
    assert bootstrap_mean(values).count == 2
    assert bootstrap_mean(values).mean == 2.0
    assert bootstrap_mean(values, clusters=torch.tensor([0, 0, 1])).count == 2
    with pytest.raises(ValueError, match="at least one valid"):
        bootstrap_mean(torch.tensor([float("nan")]))


def test_pairing_removes_the_variance_between_prompts():
    generator = torch.Generator().manual_seed(0)
    before = 10 * torch.randn(200, generator=generator)
    after = before + 0.5 + 0.1 * torch.randn(200, generator=generator)
    gain = bootstrap_gain(before, after)
    assert 0.45 < gain.low < gain.high < 0.55
    assert bootstrap_mean(after).low < bootstrap_mean(before).high  # unpaired, nothing could be said
    with pytest.raises(ValueError, match="same samples"):
        bootstrap_gain(before, after[:-1])


def test_copies_of_a_cluster_add_nothing():
    """Eight equal samples per prompt: the interval is that of one sample per prompt; unclustered it is sqrt(8) times narrower."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, copies = bootstrap_mean(values), values.repeat_interleave(8)
    clustered = bootstrap_mean(copies, clusters=torch.arange(50).repeat_interleave(8))
    assert (clustered.low, clustered.high) == pytest.approx((one.low, one.high), abs=1e-12)
    naive = bootstrap_mean(copies)
    assert (one.high - one.low) / (naive.high - naive.low) == pytest.approx(math.sqrt(8), rel=0.1)


def test_clusters_of_one_are_independent_samples_whatever_their_numbers():
    values = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert bootstrap_mean(values, clusters=torch.arange(30) * 7 - 5) == bootstrap_mean(values)


def test_a_mean_weighs_samples_not_clusters():
    values, clusters = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1])
    assert bootstrap_mean(values, clusters=clusters).mean == 0.75


def win_coverage(clustered, num_prompts=40, num_seeds=8, repeats=400):
    """How often the interval of a win rate holds the truth, 1/2, where each prompt has a win probability of its own, uniform on [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(num_prompts).repeat_interleave(num_seeds)
    held = 0
    for _ in range(repeats):
        chance = torch.rand(num_prompts, generator=generator)[clusters]
        wins = (torch.rand(len(clusters), generator=generator) < chance).double()
        found = bootstrap_mean(wins, clusters=clusters if clustered else None)
        held += found.low <= 0.5 <= found.high
    return held / repeats


def test_the_interval_of_a_win_rate_covers_the_truth_and_one_that_ignores_prompts_does_not():
    """400 repetitions, standard error 1.1 points at 95 %."""
    assert 0.92 <= win_coverage(clustered=True) <= 0.98
    assert win_coverage(clustered=False) < 0.8


def test_half_samples_of_a_mean_give_its_standard_error_and_no_bias():
    values = np.random.default_rng(0).normal(size=101)
    (found,) = half_samples(lambda rows: [values[rows].mean()], 101)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(101), rel=0.2)  # of 100 halves, themselves known to 7 %
    assert abs(found.bias) < 3 * found.error / math.sqrt(100)


def test_half_samples_find_the_bias_of_a_biased_variance():
    """E of the variance with divisor n is (1 - 1/n) sigma^2: bias -sigma^2 / n."""
    values = np.random.default_rng(0).normal(size=40)
    (found,) = half_samples(lambda rows: [values[rows].var()], 40)
    assert found.bias == pytest.approx(-values.var(ddof=1) / 40, rel=0.35)


def test_half_samples_find_the_bias_of_a_frechet_distance():
    """256 samples of N(0, I) in 16 dimensions against N(0, I): the distance is bias alone, and extrapolation removes nine tenths of it."""
    features = torch.randn(256, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = Gaussian(torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64))
    (found,) = half_samples(lambda rows: [frechet_distance(Moments.of(features[torch.from_numpy(rows)]).gaussian(), reference)], 256)
    assert found.value > 0.1
    assert abs(found.value - found.bias) < 0.1 * found.value


def test_halves_of_three_are_no_sets():
    (found,) = half_samples(lambda rows: [float(len(rows))], 3)
    assert found.value == 3
    assert math.isnan(found.error)
    assert math.isnan(found.bias)
