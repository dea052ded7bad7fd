"""Maximum mean discrepancies against plain double sums, closed forms and another implementation; float64, seeds stated per test."""

import math

import pytest
import torch

from visalign.maths import mmd
from visalign.maths.diversity import unit_rows
from visalign.maths.mmd import GaussianKernel, KernelReference, PolynomialKernel, kernel_sums, median_distance, mmd2, mmd2_over_subsets

KERNELS = [PolynomialKernel(), GaussianKernel(1.7)]


def features(n, d=4, seed=0, shift=0.0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def value(kernel, a, b):
    """k(a, b) as it is defined, one pair."""
    if isinstance(kernel, PolynomialKernel):
        return (float(a @ b) / len(a) + 1) ** 3
    return math.exp(-float((a - b).square().sum()) / (2 * kernel.bandwidth**2))


def middle(values):
    """Median as it is defined, the mean of the two in the middle of an even number."""
    ordered = values.sort().values
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def plainly(x, y, kernel):
    """The three double sums of MMD^2_u, without i = j."""
    def within(z):
        return sum(value(kernel, a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
    return within(x) + within(y) - 2 * sum(value(kernel, a, b) for a in x for b in y) / (len(x) * len(y))


def biased(x, y, kernel):
    """MMD^2 with the terms i = j."""
    return float(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_three_sums(kernel):
    x, y = features(6), features(9, seed=1, shift=0.4)
    assert mmd2(x, KernelReference(y, kernel)) == pytest.approx(plainly(x, y, kernel), rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_do_not_change_the_sums(kernel, monkeypatch):
    x, y = features(23), features(17, seed=1)
    whole = kernel_sums(x, y, kernel), mmd2(x, KernelReference(y, kernel))
    monkeypatch.setattr(mmd, "BLOCK", 5)
    torch.testing.assert_close(kernel_sums(x, y, kernel), whole[0], rtol=1e-12, atol=1e-12)
    assert mmd2(x, KernelReference(y, kernel)) == pytest.approx(whole[1], abs=1e-13)


def test_no_more_than_a_block_is_in_memory(monkeypatch):
    monkeypatch.setattr(mmd, "BLOCK", 8)
    shapes = []

    class Seen(PolynomialKernel):
        def __call__(self, x, y):
            shapes.append((len(x), len(y)))
            return super().__call__(x, y)

    mmd2(features(50), KernelReference(features(30, seed=1), Seen()))
    assert max(max(shape) for shape in shapes) == 8


def test_far_from_zero_the_gaussian_kernel_keeps_its_digits():
    x, y = features(5), features(7, seed=1)
    near, far = (GaussianKernel(0.5)(x + shift, y + shift) for shift in (0.0, 1e6))
    torch.testing.assert_close(near, far, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kernel", [PolynomialKernel(), GaussianKernel(3.0), GaussianKernel(0.5)])
def test_equal_distributions_give_zero_on_average_and_both_signs(kernel):
    """400 pairs of sets of 20; the mean lies within 4 standard errors of 0, the biased estimate far above."""
    values, with_diagonal = [], []
    for seed in range(400):
        x, y = features(20, 3, 2 * seed), features(20, 3, 2 * seed + 1)
        values.append(mmd2(x, KernelReference(y, kernel)))
        with_diagonal.append(biased(x, y, kernel))
    found = torch.tensor(values)
    error = float(found.std()) / 20
    assert abs(float(found.mean())) < 4 * error
    assert 0.35 < float((found < 0).double().mean()) < 0.75
    assert min(with_diagonal) > 0
    assert sum(with_diagonal) / 400 > 10 * error


def test_the_gaussian_mmd_of_two_gaussians_in_closed_form():
    """x ~ N(0, 1), y ~ N(a, 1): E k = (1 + 2 / s^2)^{-1/2} exp(-delta^2 / (2 (s^2 + 2))), delta the distance of the means."""
    s, a = 1.5, 0.8
    kernel = GaussianKernel(s)
    expected = 2 * (1 + 2 / s**2) ** -0.5 * (1 - math.exp(-a**2 / (2 * (s**2 + 2))))
    found = [mmd2(features(400, 1, seed), KernelReference(features(400, 1, seed + 100, a), kernel)) for seed in range(30)]
    assert sum(found) / 30 == pytest.approx(expected, abs=4 * float(torch.tensor(found).std()) / math.sqrt(30))


def test_on_unit_rows_the_wide_kernel_compares_means():
    """CMMD, bandwidth 10: 1000 MMD^2 is 10 |mean x - mean y|^2 to about a percent, both with the terms i = j."""
    x, y = unit_rows(features(300, 32, 1, 0.3)), unit_rows(features(300, 32, 2, 0.1))
    means = 10 * float((x.mean(dim=0) - y.mean(dim=0)).square().sum())
    assert 1000 * biased(x, y, GaussianKernel(10.0)) == pytest.approx(means, rel=0.015)


def test_the_biased_estimate_of_a_small_set_hides_a_small_shift():
    """The published CMMD is biased: its value for two equal distributions at n = 250 is as large as that of a small shift at n = 500."""
    kernel = GaussianKernel(10.0)
    null = [unit_rows(features(250, 64, seed, 0.2)) for seed in (1, 2)]
    shifted = [unit_rows(features(500, 64, seed, shift)) for seed, shift in ((3, 0.2), (4, 0.22))]
    assert biased(*null, kernel) > biased(*shifted, kernel)
    unbiased = [1000 * mmd2(x, KernelReference(y, kernel)) for x, y in (null, shifted)]
    assert abs(unbiased[0]) < 0.3 * 1000 * biased(*null, kernel)
    assert unbiased[1] < 0.7 * 1000 * biased(*shifted, kernel)


@pytest.mark.parametrize(("kernel", "theirs"), [(PolynomialKernel(), {"kid_kernel": "poly"}),
                                                (GaussianKernel(10.0), {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": 10.0})])
def test_another_implementation_agrees(kernel, theirs):
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(50, 6, 1), features(50, 6, 2, 0.3)
    assert mmd2(x, KernelReference(y, kernel)) == pytest.approx(float(fidelity.kernel_mmd(x.numpy(), y.numpy(), **theirs)), rel=1e-10)


def test_subsets_are_drawn_without_replacement_and_repeat():
    x, y = features(60, 3, 1), features(80, 3, 2, 0.5)
    reference = KernelReference(y, PolynomialKernel())
    found = mmd2_over_subsets(x, reference, torch.Generator().manual_seed(0), num_subsets=200, subset_size=20)
    again = mmd2_over_subsets(x, reference, torch.Generator().manual_seed(0), num_subsets=200, subset_size=20)
    assert found == again
    assert (found.num_subsets, found.subset_size) == (200, 20)
    assert found.std > 0
    assert found.mean == pytest.approx(mmd2(x, reference), abs=4 * found.std / math.sqrt(200))
    # Every subset of all rows is all rows; with repeated rows no two estimates would be alike.
    all_rows = mmd2_over_subsets(x, KernelReference(y[:60], PolynomialKernel()), torch.Generator().manual_seed(0), 5, 60)
    assert all_rows.std < 1e-12
    assert all_rows.mean == pytest.approx(mmd2(x, KernelReference(y[:60], PolynomialKernel())), rel=1e-10)


@pytest.mark.parametrize(("ours", "theirs"), [(19, 80), (60, 19)])
def test_fewer_rows_than_a_subset_are_one_estimate_without_spread(ours, theirs):
    x, reference = features(ours, 3, 1), KernelReference(features(theirs, 3, 2), PolynomialKernel())
    found = mmd2_over_subsets(x, reference, torch.Generator().manual_seed(0), subset_size=20)
    assert found.std is None
    assert (found.mean, found.num_subsets, found.subset_size) == (mmd2(x, reference), 1, ours)


@pytest.mark.parametrize(("n", "block"), [(2, 4096), (3, 4096), (40, 7), (41, 7)])
def test_the_median_distance_is_exact(n, block, monkeypatch):
    monkeypatch.setattr(mmd, "BLOCK", block)
    x = features(n, 3, seed=n)
    assert median_distance(x) == pytest.approx(middle(torch.pdist(x)), rel=1e-12)


@pytest.mark.parametrize("x", [
    torch.tensor([[0.0], [0.0], [0.0], [1.0]]),                     # half of the distances are 0, the median is between 0 and 1
    torch.tensor([[0.0]] * 5 + [[1.0]]),                            # most are 0
    torch.tensor([[0.0], [1.0], [2.0], [3.0], [1000.0]]),           # one bin of the histogram holds almost all
    torch.full((4, 2), 3.0),
])
def test_the_median_of_ties_and_outliers(x):
    assert median_distance(x) == pytest.approx(middle(torch.pdist(x.double())), rel=1e-10, abs=1e-12)


def test_bad_input():
    reference = KernelReference(features(5), PolynomialKernel())
    with pytest.raises(ValueError, match="at least two rows"):
        mmd2(features(1), reference)
    with pytest.raises(ValueError, match="1 of 3 rows of features are not finite"):
        mmd2(torch.tensor([[1.0] * 4, [math.nan] * 4, [0.0] * 4]), reference)
    with pytest.raises(ValueError, match="3 dimensions cannot be compared with a reference in 4"):
        mmd2(features(5, 3), reference)
    with pytest.raises(ValueError, match="the reference's features are"):
        KernelReference(features(1), PolynomialKernel())
    with pytest.raises(ValueError, match=r"bandwidth 0\.0 must be above 0"):
        GaussianKernel(0.0)
    with pytest.raises(ValueError, match="subset_size 1"):
        mmd2_over_subsets(features(5), reference, torch.Generator(), subset_size=1)
    with pytest.raises(ValueError, match="at least two rows"):
        median_distance(features(1))
    with pytest.raises(ValueError, match="MMD needs at least 2 features, got 1"):
        mmd.KernelSums(1, 0.0, 1.0).mmd2(reference)
