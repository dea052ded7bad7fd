"""Pairs out of groups: rules, margins, agreement, rejection sampling."""

import math

import pytest
import torch

from visalign.maths.preference_selection import rejection_sample, rso_acceptance, select_pairs


def table(*groups):
    return torch.tensor(groups, dtype=torch.float32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def select(reward, rule="best_worst", valid=None, **options):
    pairs = select_pairs(reward, torch.ones_like(reward, dtype=torch.bool) if valid is None else valid, rule, **options)
    return list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)), pairs.margin.tolist()


def test_best_against_worst():
    rows, margins = select(table((0.1, 0.9, 0.4), (0.7, 0.2, 0.3)))
    assert rows == [(1, 0), (3, 4)]
    assert margins == pytest.approx([0.8, 0.5])


@pytest.mark.parametrize("rule", ["best_worst", "random", "all", "rso"])
def test_equal_rewards_give_no_pair(rule):
    assert select(table((0.5, 0.5, 0.5)), rule, generator=generator()) == ([], [])


def test_the_margin_is_strict():
    reward = table((1.0, 0.5), (1.0, 0.25))
    assert select(reward, margin=0.5)[0] == [(2, 3)]
    assert select(reward, margin=0.75)[0] == []


def test_invalid_samples_are_never_used():
    reward, valid = table((9.0, 0.2, math.nan, 0.1, -5.0)), torch.tensor([[False, True, False, True, False]])
    for rule in ("best_worst", "random", "all", "rso"):
        assert select(reward, rule, valid, generator=generator())[0] == [(1, 3)]
        assert select(reward, rule, torch.zeros_like(valid), generator=generator())[0] == []


def test_all_pairs_come_largest_gap_first_and_capped():
    reward = table((3.0, 0.0, 1.0), (0.0, 1.0, 1.0))
    assert select(reward, "all") == ([(0, 1), (0, 2), (2, 1), (4, 3), (5, 3)], [3, 2, 1, 1, 1])
    assert select(reward, "all", max_pairs=1)[0] == [(0, 1), (4, 3)]
    assert select(reward, "all", margin=1.5)[0] == [(0, 1), (0, 2)]


def test_random_pairs_are_reproducible_and_uniform():
    reward = table(*[(2.0, 1.0, 0.0)] * 3000)
    rows, margins = select(reward, "random", generator=generator(3))
    assert rows == select(reward, "random", generator=generator(3))[0]
    assert len(rows) == 3000
    assert margins.count(2.0) / 3000 == pytest.approx(1 / 3, abs=0.03)
    assert len(select(reward[:1], "random", max_pairs=2, generator=generator())[0]) == 2


def test_several_rewards_must_agree():
    criteria = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]])
    reward = criteria.sum(-1)
    assert select(reward)[0] == [(0, 1), (2, 3)]
    assert select(reward, agreement="majority", criteria=criteria)[0] == [(0, 1), (2, 3)]
    assert select(reward, agreement="unanimous", criteria=criteria)[0] == [(2, 3)]
    tied = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]])
    assert select(tied.sum(-1), agreement="majority", criteria=tied)[0] == []


def test_acceptance_numbers():
    assert rso_acceptance(table((1.0, 0.5, 0.0)), 0.5)[0].tolist() == pytest.approx([1, 0.367879, 0.135335], abs=1e-6)


def test_acceptance_limits():
    reward = torch.linspace(0, 1, 8)
    for seed in range(20):
        assert rejection_sample(reward, 1e-4, 3, generator(seed)).tolist() == [5, 6, 7]       # best of n
    counts = torch.zeros(8)
    for seed in range(2000):
        counts[rejection_sample(reward, 1e6, 3, generator(seed))] += 1
    assert (counts / 2000).tolist() == pytest.approx([3 / 8] * 8, abs=0.05)                    # uniform
    assert rejection_sample(reward, 1.0, 20, generator()).tolist() == list(range(8))


def test_accepted_samples_follow_the_tilted_distribution():
    """Pool N(0, 1), reward x, temperature 1: accepted samples are N(1, 1) up to the pool's largest value."""
    pool = torch.randn(20_000, generator=generator(1), dtype=torch.float64)
    first_sweep = torch.rand(20_000, generator=generator(2), dtype=torch.float64) < rso_acceptance(pool, 1.0)
    weights = rso_acceptance(pool, 1.0)
    assert float((weights * pool).sum() / weights.sum()) == pytest.approx(1.0, abs=0.05)
    assert float(pool[first_sweep].mean()) == pytest.approx(1.0, abs=0.12)
    kept = pool[rejection_sample(pool, 1.0, 300, generator(2))]
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.15)


def test_rso_pairs_are_among_the_accepted():
    reward = table((0.0, 0.1, 0.2, 5.0, 6.0, 7.0))
    rows, _ = select(reward, "rso", temperature=0.01, num_accepted=3, generator=generator())
    assert sorted(rows) == [(4, 3), (5, 3), (5, 4)]
    assert len(select(reward, "rso", temperature=0.01, num_accepted=3, max_pairs=1, generator=generator())[0]) == 1


def test_no_groups_give_no_pairs():
    pairs = select_pairs(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool))
    assert pairs.chosen.shape == pairs.rejected.shape == pairs.margin.shape == (0,)
    assert pairs.chosen.dtype == torch.int64


@pytest.mark.parametrize(("options", "message"), [
    ({"rule": "best"}, "unknown rule 'best'"),
    ({"agreement": "all"}, "unknown rule 'best_worst' or agreement 'all'"),
    ({"margin": -0.1}, "margin must be >= 0"),
    ({"max_pairs": 0}, "max_pairs must be >= 1"),
    ({"rule": "random"}, "seeded"),
    ({"agreement": "majority"}, "needs criteria of shape"),
    ({"rule": "rso", "generator": generator(), "temperature": 0.0}, "temperature > 0"),
    ({"rule": "rso", "generator": generator(), "num_accepted": 0}, "num_accepted >= 1"),
])
def test_bad_options_teach(options, message):
    with pytest.raises(ValueError, match=message):
        select_pairs(table((1.0, 0.0)), torch.ones(1, 2, dtype=torch.bool), **options)


def test_bad_rewards_teach():
    with pytest.raises(ValueError, match="mark that sample invalid"):
        select(table((1.0, math.nan)))
    with pytest.raises(ValueError, match=r"one shape \(P, G\)"):
        select_pairs(torch.zeros(4), torch.ones(4, dtype=torch.bool))
