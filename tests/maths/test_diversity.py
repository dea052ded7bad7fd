"""Vendi scores with known values; float64, seeds stated."""

import math

import pytest
import torch

from visalign.maths.diversity import cosine_vendi, gaussian_vendi, spectral_diversity, unit_rows, vendi_score


def features(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kernel", "expected"), [
    (torch.eye(3), 3.0),
    (torch.ones(3, 3), 1.0),
    (torch.tensor([[1.0, 0.5], [0.5, 1.0]]), 1.754765),
    (torch.ones(1, 1), 1.0),
])
def test_known_values(kernel, expected):
    assert vendi_score(kernel) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, math.inf])
def test_equal_modes_count_alike_in_every_order(q):
    # Three orthogonal groups of 4, 4 and 4 equal members are 3 effective members.
    kernel = torch.block_diag(*[torch.ones(4, 4)] * 3)
    assert vendi_score(kernel, q) == pytest.approx(3, rel=1e-9)


def test_orders():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    assert spectral_diversity(p, 2.0) == pytest.approx(1 / float(p.square().sum()), rel=1e-12)
    assert spectral_diversity(p, math.inf) == pytest.approx(1 / 0.7, rel=1e-12)
    assert spectral_diversity(p, 1 + 1e-6) == pytest.approx(spectral_diversity(p), rel=1e-5)
    orders = [spectral_diversity(p, q) for q in (0.1, 0.5, 1.0, 2.0, 10.0, math.inf)]
    assert orders == sorted(orders, reverse=True)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7)])
def test_both_grams_give_the_kernels_score(shape):
    x = features(*shape, seed=1)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    assert cosine_vendi(x) == pytest.approx(vendi_score(cosine), rel=1e-10)


def test_length_and_order_of_the_rows_do_not_matter_and_copies_add_nothing():
    x = features(6, 9, seed=2)
    scaled = x.flip(0) * torch.linspace(0.1, 7, 6, dtype=torch.float64)[:, None]
    assert cosine_vendi(scaled) == pytest.approx(cosine_vendi(x), rel=1e-10)
    assert cosine_vendi(torch.cat([x, x])) == pytest.approx(cosine_vendi(x), rel=1e-10)
    assert 1 < cosine_vendi(x) < 6


def test_bad_input():
    with pytest.raises(ValueError, match=r"the kernel is \(2, 3\)"):
        vendi_score(torch.ones(2, 3))
    with pytest.raises(ValueError, match="ones on its diagonal"):
        vendi_score(2 * torch.eye(2))
    with pytest.raises(ValueError, match="symmetric"):
        vendi_score(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="positive semi-definite"):
        vendi_score(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="q = 0"):
        vendi_score(torch.eye(2), q=0)
    with pytest.raises(ValueError, match="zero or not finite"):
        unit_rows(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="at least one row"):
        cosine_vendi(torch.zeros(0, 3))


def test_a_gaussian_kernel_counts_clusters_and_ignores_what_all_share():
    rows = torch.cat([torch.zeros(5, 3), torch.full((5, 3), 50.0)]) + 100
    assert gaussian_vendi(rows, bandwidth=1.0) == pytest.approx(2, rel=1e-9)
    assert gaussian_vendi(rows - 100, bandwidth=1.0) == pytest.approx(gaussian_vendi(rows, bandwidth=1.0), rel=1e-9)
    assert gaussian_vendi(rows[:5], bandwidth=1.0) == pytest.approx(1, abs=1e-9)


def test_a_wider_gaussian_kernel_sees_fewer_differences():
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    scores = [gaussian_vendi(rows, bandwidth) for bandwidth in (1e-3, 0.5, 1.0, 2.0, 1e4)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(20)
    assert scores[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("rows", "bandwidth", "match"), [(torch.zeros(0, 2), 1.0, "at least one row"), (torch.zeros(3, 2), 0.0, "above 0"),
                                                          (torch.full((2, 2), torch.nan), 1.0, "finite")])
def test_a_gaussian_kernel_needs_rows_and_a_ruler(rows, bandwidth, match):
    with pytest.raises(ValueError, match=match):
        gaussian_vendi(rows, bandwidth)
