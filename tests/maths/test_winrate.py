"""Win rates: published numbers, conservation, position bias, schedules."""

import math

import pytest
import torch

from visalign.maths.advantages import group_advantages
from visalign.maths.winrate import all_pairs, bradley_terry, combine_orders, cyclic_triads, d_regular, ring, win_rates


def rates(pairs, judged, num_samples, valid=None):
    valid = [True] * len(judged) if valid is None else valid
    return win_rates(pairs, torch.tensor(judged, dtype=torch.float64), torch.tensor(valid, dtype=torch.bool), num_samples)


def test_published_example():
    """1 beats 2 and 3 and ties 4; 2 beats 3; 4 beats 2 and 3. Published code rounds to 3 decimals, at which we agree."""
    # Pairs in order: 12, 13, 14, 23, 24, 34.
    result = rates(all_pairs(4), [1.0, 1.0, 0.5, 1.0, 0.0, 0.0], 4)
    assert [round(w, 3) for w in result.value.tolist()] == [0.833, 0.333, 0.0, 0.833]
    assert result.value.tolist() == pytest.approx([5 / 6, 1 / 3, 0, 5 / 6], abs=1e-15)
    assert float(result.value.sum()) == pytest.approx(2.0, abs=1e-15)
    advantage = group_advantages(result.value, result.valid, torch.zeros(4, dtype=torch.int64)).advantage
    assert [round(a, 4) for a in advantage.tolist()] == [0.8165, -0.4082, -1.2247, 0.8165]


def test_a_judge_that_always_says_first_is_neutral_only_with_the_swap():
    pairs = all_pairs(4)
    always = torch.ones(len(pairs), dtype=torch.float64)
    valid = torch.ones(len(pairs), dtype=torch.bool)
    assert win_rates(pairs, always, valid, 4).value.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert win_rates(pairs, combine_orders(always, always), valid, 4).value.tolist() == [0.5] * 4


def test_combining_orders_keeps_a_consistent_judge():
    probability = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(combine_orders(probability, 1 - probability), probability)


@pytest.mark.parametrize("num_samples", [2, 3, 7, 8])
def test_all_pairs_conserve_half_a_win_each(num_samples):
    pairs = all_pairs(num_samples)
    assert len(pairs) == num_samples * (num_samples - 1) // 2
    judged = torch.rand(len(pairs), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = win_rates(pairs, judged, torch.ones(len(pairs), dtype=torch.bool), num_samples)
    assert float(result.value.sum()) == pytest.approx(num_samples / 2, abs=1e-12)


def test_swapping_a_pair_and_its_judgement_changes_nothing():
    plain = rates([(0, 1), (1, 2), (0, 2)], [0.8, 0.3, 0.6], 3)
    swapped = rates([(1, 0), (1, 2), (2, 0)], [0.2, 0.3, 0.4], 3)
    torch.testing.assert_close(plain.value, swapped.value)


def test_a_strict_total_order_has_a_fixed_spread():
    """Magnitudes are gone: any monotone rewards give (G - rank) / (G - 1)."""
    rewards = torch.tensor([0.1, 100.0, 0.2, -5.0], dtype=torch.float64)
    judged = [float(rewards[i] > rewards[j]) for i, j in all_pairs(4)]
    assert rates(all_pairs(4), judged, 4).value.tolist() == pytest.approx([1 / 3, 1.0, 2 / 3, 0.0])


def test_invalid_comparisons_are_left_out_not_made_ties():
    result = rates(all_pairs(3), [1.0, math.nan, 1.0], 3, valid=[True, False, True])
    assert result.value.tolist() == [1.0, 0.5, 0.0]
    assert result.num_comparisons.tolist() == [1, 2, 1]


def test_a_sample_without_a_comparison_is_invalid():
    result = rates([(0, 1), (1, 2)], [1.0, 0.0], 3, valid=[True, False])
    assert result.valid.tolist() == [True, True, False]
    assert math.isnan(float(result.value[2]))


def test_no_valid_comparison_at_all():
    result = rates(all_pairs(2), [math.nan], 2, valid=[False])
    assert result.valid.tolist() == [False, False]
    assert rates([], [], 2).valid.tolist() == [False, False]


@pytest.mark.parametrize(("num_samples", "degree"), [(2, 1), (5, 2), (5, 4), (6, 1), (6, 3), (6, 5), (8, 4), (24, 7)])
def test_d_regular_schedules_are_regular_and_never_repeat(num_samples, degree):
    pairs = d_regular(num_samples, degree)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == num_samples * degree // 2
    assert all(sum(k in pair for pair in pairs) == degree for k in range(num_samples))


@pytest.mark.parametrize("num_samples", [3, 4, 9])
def test_ring_shows_every_sample_once_in_each_position(num_samples):
    pairs = ring(num_samples)
    assert sorted(i for i, _ in pairs) == sorted(j for _, j in pairs) == list(range(num_samples))
    assert ring(2) == ((0, 1),)


def test_bradley_terry():
    a, b = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    p = bradley_terry(a, b, scale=2.0)
    assert p.tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-3))])
    torch.testing.assert_close(p + bradley_terry(b, a, scale=2.0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: rates([(0, 1)], [1.2], 2), r"probability in \[0, 1\]"),
    (lambda: rates([(0, 1)], [math.nan], 2), "mark refusals and parse failures invalid"),
    (lambda: rates([(0, 2)], [1.0], 2), r"two different samples of 0 .. 1"),
    (lambda: rates([(1, 1)], [1.0], 2), "two different samples"),
    (lambda: rates([(0, 1)], [1.0, 0.0], 2), "1 pairs need as many judgements"),
    (lambda: d_regular(5, 3), "use a degree from 1 to 4, even because"),
    (lambda: d_regular(4, 4), "use a degree from 1 to 3"),
    (lambda: d_regular(4, 0), "cannot each have 0"),
    (lambda: all_pairs(1), "at least 2 samples"),
    (lambda: ring(1), "at least 2 samples"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_ranking_has_no_circles_and_a_circle_is_one():
    pairs = all_pairs(4)
    ranked = torch.tensor([1.0 if i < j else 0.0 for i, j in pairs])
    everything = torch.ones(len(pairs), dtype=torch.bool)
    assert cyclic_triads(pairs, ranked, everything, 4).tolist() == [0.0] * 4
    circle = torch.tensor([{(0, 1): 1.0, (1, 2): 1.0, (0, 2): 0.0}.get(pair, 1.0 if pair[0] < pair[1] else 0.0) for pair in pairs])
    # 0 > 1 > 2 > 0 and all beat 3: one circle among the three triads of 0, 1 and 2, none among those of 3.
    torch.testing.assert_close(cyclic_triads(pairs, circle, everything, 4), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))


def test_circles_need_three_judgements_and_ties_make_none():
    pairs, prob = ((0, 1), (1, 2), (2, 0)), torch.tensor([0.9, 0.8, 0.6])
    assert cyclic_triads(pairs, prob, torch.ones(3, dtype=torch.bool), 3).tolist() == [1.0] * 3
    assert cyclic_triads(pairs, torch.tensor([0.9, 0.8, 0.5]), torch.ones(3, dtype=torch.bool), 3).tolist() == [0.0] * 3
    assert cyclic_triads(pairs, prob, torch.tensor([True, True, False]), 3).isnan().all()
    assert cyclic_triads(ring(5), torch.ones(5), torch.ones(5, dtype=torch.bool), 5).isnan().all()


def test_a_coin_makes_a_quarter_of_all_triads_circles():
    generator, pairs = torch.Generator().manual_seed(0), all_pairs(12)
    coins = torch.randint(0, 2, (40, len(pairs)), generator=generator).float()
    rates = [cyclic_triads(pairs, row, torch.ones(len(pairs), dtype=torch.bool), 12) for row in coins]
    assert float(torch.stack(rates).mean()) == pytest.approx(0.25, abs=0.01)
