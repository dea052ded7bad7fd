"""First-order and exact effects of one member, against leaving it out for real; float64, generator seeds stated per test."""

import pytest
import torch

from visalign.maths.frechet import Gaussian, Moments, frechet_distance
from visalign.maths.influence import frechet_influence, member_sums, mmd2_influence, mmd2_without_each
from visalign.maths.mmd import GaussianKernel, KernelReference, KernelSet, PolynomialKernel, mmd2

KERNELS = [PolynomialKernel(), GaussianKernel(2.0)]


def features(n, d, seed=0, shift=0.0, scale=1.0):
    """Correlated by the seed, so that covariances do not commute."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(d, dtype=torch.float64) + 0.2 * torch.randn(d, d, dtype=torch.float64, generator=generator)
    return scale * torch.randn(n, d, dtype=torch.float64, generator=generator) @ mixing + shift


def without_each(rows, reference, shrinkage=0.0):
    """D(G without i) - D(G), each set made anew."""
    def distance(x):
        return frechet_distance(Moments.of(x).gaussian(shrinkage), reference.shrunk(shrinkage))
    return torch.tensor([distance(torch.cat([rows[:i], rows[i + 1:]])) - distance(rows) for i in range(len(rows))])


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a, b.to(a)]))[0, 1])


@pytest.mark.parametrize("seed", range(4))
def test_the_frechet_influence_is_what_leaving_out_does(seed):
    """m = 400, d = 8, a set twice as wide: correlation above 0.9999, and no deviation beyond 4 % of the largest change."""
    reference, rows = Moments.of(features(2000, 8, seed)).gaussian(), features(400, 8, seed + 50, 0.2, 2.0)
    exact = without_each(rows, reference)
    approximate = -frechet_influence(rows, Moments.of(rows), reference) / 399
    assert correlation(approximate, exact) > 0.9999
    assert float((approximate - exact).abs().max()) < 0.04 * float(exact.abs().max())


def test_near_the_reference_the_first_order_is_less_of_the_truth():
    """The same distribution on both sides: what remains is of second order, and the ranking of members still holds to 0.99."""
    for seed in range(3):
        x = features(2400, 8, seed)
        reference, rows = Moments.of(x[400:]).gaussian(), x[:400]
        found = correlation(-frechet_influence(rows, Moments.of(rows), reference), without_each(rows, reference))
        assert 0.98 < found < 0.9999


def test_the_frechet_influence_is_the_derivative_towards_one_member():
    """D((1 - eps) G + eps delta_i) with population moments, by a central difference; and it averages to 0."""
    rows, reference = features(30, 4, 1), Moments.of(features(200, 4, 2)).gaussian()
    weights = torch.full((30,), 1 / 30, dtype=torch.float64)

    def distance(weights):
        mean = weights @ rows
        centred = rows - mean
        return frechet_distance(Gaussian(mean, (weights[:, None] * centred).T @ centred), reference)

    moments = Moments.of(rows)
    # ``frechet_influence`` takes the unbiased covariance of its moments: give it one whose unbiased covariance is the population's.
    population = Moments(moments.count, moments.mean, moments.scatter * 29 / 30)
    found = frechet_influence(rows, population, reference)
    for i in (0, 7, 19):
        step = -weights + torch.nn.functional.one_hot(torch.tensor(i), 30)
        numeric = (distance(weights + 1e-5 * step) - distance(weights - 1e-5 * step)) / 2e-5
        assert float(found[i]) == pytest.approx(numeric, rel=1e-5, abs=1e-7)
    assert float(found.mean()) == pytest.approx(0, abs=1e-9)


def test_a_member_that_pulls_the_set_away_has_positive_influence():
    rows = torch.cat([features(60, 2, 3), torch.full((1, 2), 9.0, dtype=torch.float64)])
    standard = Gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    found = frechet_influence(rows, Moments.of(rows), standard)
    assert int(found.argmax()) == 60
    assert found[60] > 0
    assert int(without_each(rows, standard).argmin()) == 60


@pytest.mark.parametrize("kernel", KERNELS)
def test_members_away_from_the_reference_raise_the_kernel_distance(kernel):
    rows = torch.cat([features(60, 2, 3), features(12, 2, 5, 3.0)])
    sums = member_sums(rows, KernelReference(features(100, 2, 4), kernel))
    influence, removal = mmd2_influence(sums), mmd2_without_each(sums)
    assert float(influence[60:].mean()) > 0 > float(influence[:60].mean())
    assert float(removal[60:].mean()) < 0


@pytest.mark.parametrize("dead", ["both", "reference", "set"])
def test_features_that_never_vary_are_no_obstacle(dead):
    rows, exemplars = features(200, 6, 5, 0.1, 2.0), features(900, 6, 6)
    if dead in ("both", "set"):
        rows[:, :2] = 0.3
    if dead in ("both", "reference"):
        exemplars[:, 1:3] = 0.3
    reference = Moments.of(exemplars).gaussian()
    exact = without_each(rows, reference)
    approximate = -frechet_influence(rows, Moments.of(rows), reference) / 199
    assert correlation(approximate, exact) > 0.999
    assert float((approximate - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_shrinkage_and_memory_are_part_of_the_distance():
    rows, memory, reference = features(20, 6, 7, 0.1, 2.0), features(150, 6, 8, scale=2.0), Moments.of(features(900, 6, 9)).gaussian()
    moments = Moments.of(rows).merge(Moments.of(memory))
    for shrinkage in (0.0, 0.3):
        exact = without_each(torch.cat([rows, memory]), reference, shrinkage)[:20]
        approximate = -frechet_influence(rows, moments, reference, shrinkage) / 169
        assert correlation(approximate, exact) > 0.999
        assert float((approximate - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_no_more_members_than_dimensions_are_refused():
    reference = Moments.of(features(50, 6, 11)).gaussian()
    rows = features(7, 6, 10)
    with pytest.raises(ValueError, match="7 members span 6 dimensions: every one of them holds a dimension of its own"):
        frechet_influence(rows, Moments.of(rows), reference)
    with pytest.raises(ValueError, match="4 members span 3 dimensions"):
        frechet_influence(rows[:4], Moments.of(rows[:4]), reference, shrinkage=0.5)


def test_a_point_for_a_reference_leaves_the_spread_to_be_removed():
    """FD to a point is |mu - r|^2 + tr S, so that T = 0."""
    rows = features(40, 3, 12)
    point = Gaussian(torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64))
    exact = without_each(rows, point)
    assert correlation(-frechet_influence(rows, Moments.of(rows), point), exact) > 0.999


@pytest.mark.parametrize("memory", [0, 30])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_effect_on_mmd_is_exact(kernel, memory):
    rows, earlier = features(24, 5, 13, 0.3), features(memory, 5, 14) if memory else None
    reference = KernelReference(features(70, 5, 15), kernel)
    sums = member_sums(rows, reference, None if earlier is None else KernelSet(earlier, reference))
    whole = rows if earlier is None else torch.cat([rows, earlier])
    assert sums.whole.mmd2(reference) == pytest.approx(mmd2(whole, reference), rel=1e-10)
    exact = [mmd2(torch.cat([whole[:i], whole[i + 1:]]), reference) - mmd2(whole, reference) for i in range(24)]
    torch.testing.assert_close(mmd2_without_each(sums), torch.tensor(exact, dtype=torch.float64), atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("kernel", [GaussianKernel(2.0), PolynomialKernel()])
def test_attraction_minus_repulsion_is_nearly_the_effect_and_half_the_repulsion_is_not(kernel):
    """r_i = (2/n) sum_j k(g_i, r_j) - (2/(m-1)) sum_{j != i} k(g_i, g_j), m = 100. With 1/(m-1) the credits sum to the distance, but
    correlate with leaving one out by -0.2 and 0.8 here: removing a member takes it out of both slots of k(g, g')."""
    rows = features(100, 8, 16, 0.1)
    reference = KernelReference(features(400, 8, 16), kernel)
    sums = member_sums(rows, reference)
    attraction = 2 * kernel(rows, reference.features).mean(dim=1)
    repulsion = (kernel(rows, rows).sum(dim=1) - kernel(rows, rows).diagonal()) / 99
    exact = mmd2_without_each(sums)
    assert correlation(attraction - 2 * repulsion, exact) > 0.998
    tempting = attraction - repulsion
    assert reference.within - float(tempting.mean()) == pytest.approx(mmd2(rows, reference), rel=1e-9)
    assert correlation(tempting, exact) < 0.9
    # The influence is minus that credit, up to a constant, and averages to 0.
    influence = mmd2_influence(sums)
    assert float(influence.mean()) == pytest.approx(0, abs=1e-12)
    assert float((influence + attraction - 2 * repulsion).std()) < 1e-12


def test_sets_too_small_for_the_question_are_refused():
    reference = KernelReference(features(10, 2, 17), GaussianKernel(1.0))
    with pytest.raises(ValueError, match="a set of 2 is too small"):
        mmd2_without_each(member_sums(features(2, 2, 18), reference))
    with pytest.raises(ValueError, match="a set of 1 is too small"):
        mmd2_influence(member_sums(features(1, 2, 18), reference))
