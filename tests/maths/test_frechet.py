"""Moments under single changes, and Fréchet distances with closed forms; float64, generator seeds stated per test."""

import math

import pytest
import torch

from visalign.maths.frechet import Gaussian, Moments, frechet_distance, mahalanobis, point_distances


def gaussian(mean, covariance):
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


def features(n, d, seed=0, offset=0.0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset


def random_gaussian(d, seed, rank=None):
    root = features(d, rank or d, seed)
    return Gaussian(features(1, d, seed + 100)[0], root @ root.T)


def assert_same(a, b, atol=1e-9):
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, atol=atol, rtol=0)
    torch.testing.assert_close(a.scatter, b.scatter, atol=atol, rtol=0)


def test_the_covariance_is_the_unbiased_one():
    x = features(20, 4)
    torch.testing.assert_close(Moments.of(x).gaussian().covariance, torch.cov(x.T), atol=1e-12, rtol=0)
    torch.testing.assert_close(Moments.of(x).gaussian(ddof=0).covariance, torch.cov(x.T, correction=0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_one_change_equals_starting_over(offset):
    x = features(12, 5, seed=1, offset=offset)
    some = Moments.of(x[:10])
    assert_same(some.add(x[10]), Moments.of(x[:11]))
    assert_same(some.remove(x[3]), Moments.of(torch.cat([x[:3], x[4:10]])))
    assert_same(some.swap(x[3], x[11]), Moments.of(torch.cat([x[:3], x[11:], x[4:10]])))
    assert_same(Moments.of(x[:4]).merge(Moments.of(x[4:])), Moments.of(x))
    assert_same(Moments.of(x[:1]).add(x[1]), Moments.of(x[:2]))
    assert_same(Moments.of(x[:2]).remove(x[1]), Moments.of(x[:1]))


def test_changes_leave_the_original_alone():
    x = features(6, 3)
    some = Moments.of(x[:5])
    some.swap(x[0], x[5]), some.add(x[5]), some.remove(x[0]), some.merge(some)
    assert_same(some, Moments.of(x[:5]), atol=0)


def test_thousands_of_swaps_stay_exact():
    pool, reference = features(300, 6, seed=2, offset=5.0), random_gaussian(6, seed=3)
    generator = torch.Generator().manual_seed(4)
    members = list(range(100))
    moments = Moments.of(pool[members])
    for _ in range(5000):
        row, new = int(torch.randint(100, (), generator=generator)), int(torch.randint(300, (), generator=generator))
        moments = moments.swap(pool[members[row]], pool[new])
        members[row] = new
    again = Moments.of(pool[members])
    assert_same(moments, again)
    assert abs(frechet_distance(moments.gaussian(), reference) - frechet_distance(again.gaussian(), reference)) < 1e-9


def test_known_distance():
    p, q = gaussian([0, 0], [[1, 0], [0, 4]]), gaussian([1, 0], [[4, 0], [0, 1]])
    assert frechet_distance(p, q) == pytest.approx(3, abs=1e-12)  # 1 + (1 - 2)^2 + (2 - 1)^2


def test_one_dimension():
    p, q = gaussian([0.3], [[4]]), gaussian([-1.2], [[0.25]])
    assert frechet_distance(p, q) == pytest.approx(1.5**2 + (2 - 0.5) ** 2, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_distance_to_itself_is_zero_even_if_singular(rank):
    p = random_gaussian(6, seed=5, rank=rank)
    assert p.factor.shape == (6, rank)
    assert frechet_distance(p, p) < 1e-12


def test_small_variances_beside_large_ones_lose_no_digits():
    # A square root of the eigenvalues of C_P C_Q would be wrong by about 1e-8 here.
    p, q = gaussian([0, 0], [[1, 0], [0, 1e-10]]), gaussian([0, 0], [[1, 0], [0, 4e-10]])
    assert frechet_distance(p, q) == pytest.approx(1e-10, abs=2e-15)


def test_commuting_covariances():
    rotation = torch.linalg.qr(features(4, 4, seed=6))[0]
    a, b = torch.tensor([1.0, 2.0, 0.0, 5.0], dtype=torch.float64), torch.tensor([0.5, 0.0, 3.0, 5.0], dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    p, q = Gaussian(zero, rotation * a @ rotation.T), Gaussian(zero, rotation * b @ rotation.T)
    assert frechet_distance(p, q) == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-12)


def test_it_equals_the_matrix_square_root():
    p, q = random_gaussian(5, seed=7), random_gaussian(5, seed=8)
    values, vectors = torch.linalg.eig(p.covariance @ q.covariance)
    root = (vectors * values.sqrt()) @ torch.linalg.inv(vectors)
    expected = (p.mean - q.mean).square().sum() + (p.covariance + q.covariance - 2 * root.real).trace()
    assert frechet_distance(p, q) == pytest.approx(float(expected), rel=1e-10)


def test_symmetric_and_invariant_to_rotation_and_translation():
    p, q = random_gaussian(5, seed=9, rank=3), random_gaussian(5, seed=10)
    rotation, shift = torch.linalg.qr(features(5, 5, seed=11))[0], features(1, 5, seed=12)[0]
    moved = [Gaussian(rotation @ g.mean + shift, rotation @ g.covariance @ rotation.T) for g in (p, q)]
    assert frechet_distance(p, q) == pytest.approx(frechet_distance(q, p), rel=1e-12)
    assert frechet_distance(*moved) == pytest.approx(frechet_distance(p, q), rel=1e-10)


def test_shrinkage_on_both_leaves_equal_gaussians_equal():
    p = random_gaussian(4, seed=13, rank=2)
    assert frechet_distance(p.shrunk(0.1), p.shrunk(0.1)) < 1e-12
    assert p.shrunk(0.1).factor.shape == (4, 4)
    assert p.shrunk(0.0) is p


def test_a_point_is_a_gaussian_without_covariance():
    q, points = random_gaussian(4, seed=14), features(3, 4, seed=15)
    expected = [frechet_distance(Gaussian(x, torch.zeros(4, 4, dtype=torch.float64)), q) for x in points]
    torch.testing.assert_close(point_distances(points, q), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


def test_mahalanobis_is_the_log_density():
    q, points = random_gaussian(4, seed=16), features(5, 4, seed=17)
    log_prob = torch.distributions.MultivariateNormal(q.mean, q.covariance).log_prob(points)
    constant = 4 * math.log(2 * math.pi) + torch.logdet(q.covariance)
    torch.testing.assert_close(mahalanobis(points, q), -2 * log_prob - constant, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="rank 2: Mahalanobis"):
        mahalanobis(points, random_gaussian(4, seed=18, rank=2))


@pytest.mark.parametrize(("x", "message"), [
    (torch.zeros(3), r"features are \(3,\); expected \(n, d\)"),
    (torch.zeros(0, 3), "at least one row"),
    (torch.tensor([[1.0, math.nan], [1.0, 2.0]]), "1 of 2 feature rows are not finite"),
])
def test_bad_features(x, message):
    with pytest.raises(ValueError, match=message):
        Moments.of(x)


def test_bad_use():
    one = Moments.of(features(1, 2))
    with pytest.raises(ValueError, match="needs at least 2 features, got 1"):
        one.gaussian()
    with pytest.raises(ValueError, match="only feature"):
        one.remove(one.mean)
    with pytest.raises(ValueError, match="shrinkage -1"):
        Moments.of(features(3, 2)).gaussian(shrinkage=-1)
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        frechet_distance(random_gaussian(3, 0), random_gaussian(2, 0))
    with pytest.raises(ValueError, match="do not fit"):
        Gaussian(torch.zeros(2, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected float64"):
        Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="positive semi-definite"):
        frechet_distance(gaussian([0, 0], [[1, 0], [0, -1]]), gaussian([0, 0], [[1, 0], [0, 1]]))
