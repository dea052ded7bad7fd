"""Distances extrapolated to infinitely many samples, on Gaussians whose true distance is known; seeds stated per test."""

import pytest
import torch

from visalign.maths.extrapolation import extrapolate, frechet_at_infinity
from visalign.maths.frechet import Gaussian, Moments, frechet_distance


def standard(d):
    return Gaussian(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))


def shifted(n, d, generator, by=0.1):
    """N(by, I): its Frechet distance to the standard Gaussian is d by^2."""
    return torch.randn(n, d, dtype=torch.float64, generator=generator) + by


def test_a_line_in_one_over_n_is_found_exactly():
    sizes = [10, 20, 40, 80]
    line = extrapolate(sizes, [0.3 + 7 / n for n in sizes])
    assert line.intercept == pytest.approx(0.3, abs=1e-12)
    assert line.slope == pytest.approx(7, rel=1e-12)
    assert line.r_squared == pytest.approx(1, abs=1e-12)
    bent = extrapolate(sizes, [0.3, 0.9, 0.2, 0.8])
    assert bent.r_squared < 0.5
    assert extrapolate(sizes, [2.0] * 4).r_squared == 1.0


def test_the_intercept_is_nearer_the_truth_than_the_distance_of_all_samples():
    """d = 64, true distance 0.64, N = 1000, 6 seeds: 1.77 at N, 0.57 +- 0.11 at infinity, 1.64 from repeated samples."""
    d, n, true = 64, 1000, 0.64
    at_n, at_infinity, repeated = [], [], []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = shifted(n, d, generator)
        line = frechet_at_infinity(x, standard(d), generator)
        at_n.append(frechet_distance(Moments.of(x).gaussian(), standard(d)))
        at_infinity.append(line.intercept)
        assert line.r_squared > 0.98
        assert line.values[-1] == pytest.approx(at_n[-1], rel=1e-9)  # the last subset is everything, so nothing comes twice
        again = [x[torch.randint(n, (size,), generator=generator)] for size in line.sizes]
        repeated.append(extrapolate(line.sizes, [frechet_distance(Moments.of(rows).gaussian(), standard(d)) for rows in again]).intercept)
        assert abs(line.intercept - true) < 0.4 * (at_n[-1] - true)
    mean_n, mean_infinity, mean_repeated = (sum(values) / 6 for values in (at_n, at_infinity, repeated))
    assert mean_n - true > 1
    assert abs(mean_infinity - true) < 0.15
    assert mean_repeated - true > 0.8


def test_sizes_run_from_the_smallest_to_all():
    generator = torch.Generator().manual_seed(0)
    line = frechet_at_infinity(shifted(500, 8, generator), standard(8), generator)
    assert (line.sizes[0], line.sizes[-1], len(line.sizes)) == (50, 500, 25)
    assert frechet_at_infinity(shifted(100, 20, generator), standard(20), generator).sizes[0] == 40
    chosen = frechet_at_infinity(shifted(500, 8, generator), standard(8), generator, num_sizes=3, smallest=100)
    assert chosen.sizes == (100, 300, 500)


def test_bad_input():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"30 features are too few to extrapolate: sizes from 16 on need at least 32 \(4 per dim"):
        frechet_at_infinity(shifted(30, 8, generator), standard(8), generator)
    with pytest.raises(ValueError, match="smallest 1 must be"):
        frechet_at_infinity(shifted(30, 2, generator), standard(2), generator, smallest=1)
    with pytest.raises(ValueError, match="at least three"):
        extrapolate([10, 20], [1.0, 2.0])
