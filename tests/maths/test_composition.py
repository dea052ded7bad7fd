"""Several rewards to one number: closed forms, limits, orderings, and what is absent changes nothing. float64, seed 0."""

import math
from itertools import pairwise

import pytest
import torch

from visalign.maths.composition import (
    ensemble_mean,
    entropic,
    log_tame,
    power_mean,
    uncertainty_weighted,
    weighted_sum,
    worst_case,
)
from visalign.maths.composition_order import compare_hierarchically, hierarchical_rank
from visalign.maths.composition_references import log_sigmoid_centred, preference_as_reward, reference_quantile
from visalign.maths.composition_weights import arc_directions, follow_average, maxmin_weights, normalise_weights

NAN = float("nan")
ENSEMBLES = [ensemble_mean, worst_case, uncertainty_weighted, entropic]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestEnsembles:
    VALUES = tensor([1.0, -2.0], [3.0, 0.5], [5.0, 0.0])

    def test_closed_forms_with_equal_weights(self):
        # 1, 3, 5: mean 3, population variance 8 / 3
        ones = torch.ones_like(self.VALUES)
        assert ensemble_mean(self.VALUES, ones).tolist() == pytest.approx([3.0, -0.5])
        assert worst_case(self.VALUES, ones).tolist() == [1.0, -2.0]
        assert uncertainty_weighted(self.VALUES, ones, strength=0.3)[0] == pytest.approx(3 - 0.3 * 8 / 3)
        expected = -2 * math.log((math.exp(-0.5) + math.exp(-1.5) + math.exp(-2.5)) / 3)
        assert entropic(self.VALUES, ones, temperature=2.0)[0] == pytest.approx(expected)

    def test_the_entropic_family_joins_the_mean_and_the_worst_case(self):
        values = random(4, 50)
        ones = torch.ones_like(values)
        torch.testing.assert_close(entropic(values, ones, 1e8), ensemble_mean(values, ones), rtol=0, atol=1e-6)
        torch.testing.assert_close(entropic(values, ones, 1e-5), worst_case(values, ones), rtol=0, atol=1e-4)
        steps = [entropic(values, ones, temperature) for temperature in (0.01, 0.1, 1.0, 10.0)]
        for colder, warmer in pairwise(steps):
            assert (colder <= warmer + 1e-12).all()

    def test_its_second_order_is_the_uncertainty_penalty_of_strength_one_over_two_temperatures(self):
        values = random(4, 50)
        ones = torch.ones_like(values)
        gaps = []
        for temperature in (50.0, 100.0):
            difference = entropic(values, ones, temperature) - uncertainty_weighted(values, ones, strength=1 / (2 * temperature))
            gaps.append(float(difference.abs().max()))
        assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)  # the third cumulant's term falls with the square of the temperature

    @pytest.mark.parametrize("combine", ENSEMBLES)
    def test_members_that_agree_are_believed(self, combine):
        values = random(1, 6).expand(3, 6)
        torch.testing.assert_close(combine(values, torch.ones_like(values)), values[0])

    @pytest.mark.parametrize("combine", ENSEMBLES)
    def test_what_is_absent_is_never_read(self, combine):
        values, weights = random(3, 6), torch.ones(3, 6, dtype=torch.float64)
        absent = values.clone()
        absent[1, 2:] = NAN
        weights[1, 2:] = 0
        found = combine(absent, weights)
        torch.testing.assert_close(found[2:], combine(values[[0, 2]], torch.ones(2, 6, dtype=torch.float64))[2:])
        torch.testing.assert_close(found[:2], combine(values, torch.ones_like(values))[:2])

    @pytest.mark.parametrize("combine", [*ENSEMBLES, weighted_sum, power_mean])
    def test_a_sample_nobody_judged_has_no_number(self, combine):
        found = combine(tensor([1.0, NAN], [2.0, NAN]), tensor([1.0, 0.0], [1.0, 0.0]))
        assert torch.isfinite(found[0])
        assert found[1].isnan()

    def test_weights_are_shares(self):
        values, weights = tensor([1.0], [5.0]), tensor([3.0], [1.0])
        assert float(ensemble_mean(values, weights)) == pytest.approx(2.0)
        assert float(uncertainty_weighted(values, weights, 1.0)) == pytest.approx(2 - (0.75 * 1 + 0.25 * 9))
        assert float(weighted_sum(values, -weights)) == -8
        torch.testing.assert_close(entropic(values, weights, 0.7), entropic(values, 10 * weights, 0.7))

    def test_power_means(self):
        values, ones = tensor([0.2], [0.8]), torch.ones(2, 1, dtype=torch.float64)
        assert float(power_mean(values, ones)) == pytest.approx(0.4)                     # sqrt(0.16)
        assert float(power_mean(values, ones, power=-1)) == pytest.approx(0.32)          # 2 / (5 + 1.25)
        assert float(power_mean(values, ones, power=1)) == pytest.approx(0.5)
        with pytest.raises(ValueError, match="a power mean needs positive values, the smallest is 0"):
            power_mean(tensor([0.0], [0.8]), ones)

    @pytest.mark.parametrize(("call", "message"), [
        (lambda v, w: uncertainty_weighted(v, w, -0.1), "rewards samples the members disagree on"),
        (lambda v, w: entropic(v, w, 0.0), "worst_case is the limit 0"),
        (lambda v, w: ensemble_mean(v, -w), "weights >= 0"),
        (lambda v, w: ensemble_mean(v[0], w), r"one shape \(K, N\), got \(2,\) and \(3, 2\)"),
        (lambda v, w: weighted_sum(v / 0, w), "NaN or infinite; give it weight 0"),
    ])
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(self.VALUES, torch.ones_like(self.VALUES))


class TestLogTaming:
    # relative spreads: 0.5 / 0.5 = 1 and 0.1 / 0.5 = 0.2
    VALUES = tensor([0.0, 1.0, 0.0, 1.0], [0.4, 0.6, 0.4, 0.6])
    EVERYWHERE = torch.ones(2, 4, dtype=torch.bool)

    @pytest.mark.parametrize(("threshold", "tamed"), [("mean", [True, False]), ("median", [True, False]), (0.1, [True, True]),
                                                      (2.0, [False, False])])
    def test_only_rewards_of_large_relative_spread_are_tamed(self, threshold, tamed):
        values, which = log_tame(self.VALUES, self.EVERYWHERE, threshold)
        assert which.tolist() == tamed
        for row, (plain, was) in enumerate(zip(self.VALUES, tamed, strict=True)):
            torch.testing.assert_close(values[row], (1 + plain).log() if was else plain)

    def test_the_spread_of_the_largest_reward_shrinks_and_no_order_changes(self):
        values, _ = log_tame(self.VALUES, self.EVERYWHERE)
        assert values[0].std() < self.VALUES[0].std()
        assert torch.equal(values[0].argsort(stable=True), self.VALUES[0].argsort(stable=True))

    def test_rewards_of_one_spread_are_above_no_mean(self):
        values = self.VALUES[:1].expand(3, 4) * tensor([1.0], [0.1], [0.7])
        assert not log_tame(values, torch.ones(3, 4, dtype=torch.bool))[1].any()

    def test_what_is_absent_changes_no_statistic(self):
        values = torch.cat([self.VALUES, tensor([NAN], [-7.0])], dim=1)
        present = torch.cat([self.EVERYWHERE, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
        found, which = log_tame(values, present)
        torch.testing.assert_close(found[:, :4], log_tame(self.VALUES, self.EVERYWHERE)[0])
        assert which.tolist() == [True, False]

    def test_a_reward_that_is_zero_for_everybody_is_no_mistake(self):
        values = tensor([0.0, 0.0], [0.2, 0.4])
        assert log_tame(values, torch.ones(2, 2, dtype=torch.bool))[1].tolist() == [False, True]

    @pytest.mark.parametrize("values", [[-1.0, 4.0], [-3.0, 4.0], [-0.9, 0.5]])
    def test_rewards_without_a_logarithm_are_refused_not_turned_into_nan(self, values):
        with pytest.raises(ValueError, match="log-taming needs rewards above -1 with a positive mean"):
            log_tame(tensor(values), torch.ones(1, 2, dtype=torch.bool))

    def test_an_unknown_threshold(self):
        with pytest.raises(ValueError, match="'mean' or 'median', got 'max'"):
            log_tame(self.VALUES, self.EVERYWHERE, "max")


class TestReferences:
    def test_lsc_is_the_log_probability_of_beating_the_reference(self):
        reward = random(20, 1).squeeze(1)
        value = log_sigmoid_centred(reward, torch.tensor(0.3, dtype=torch.float64))
        torch.testing.assert_close(value, torch.sigmoid(reward - 0.3).log())
        assert (value <= 0).all()
        assert float(log_sigmoid_centred(tensor(2.0), tensor(2.0))) == pytest.approx(-math.log(2))

    def test_sums_of_lsc_are_a_logical_and(self):
        # One reward far above its reference cannot pay for another far below: 8 + (-8) against 0 + 0.
        uneven = log_sigmoid_centred(tensor(8.0, -8.0), tensor(0.0, 0.0)).sum()
        even = log_sigmoid_centred(tensor(0.0, 0.0), tensor(0.0, 0.0)).sum()
        assert float(uneven) == pytest.approx(-8, abs=1e-2)
        assert float(even) == pytest.approx(-2 * math.log(2))

    @pytest.mark.parametrize("level", [-30.0, 0.0, 30.0])
    def test_lsc_slope_goes_from_one_to_nothing_and_stays_finite(self, level):
        reward = tensor(level).requires_grad_()
        log_sigmoid_centred(reward, torch.zeros(1)).sum().backward()
        assert float(reward.grad) == pytest.approx(1 / (1 + math.exp(level)), rel=1e-6)

    def test_par_is_the_win_rate_over_references(self):
        reward = tensor(0.0, 2.0)
        references = torch.stack([tensor(0.0, 2.0), tensor(-1.0, NAN)], dim=1)
        expected = [(0.5 + 1 / (1 + math.exp(-1))) / 2, 0.5]
        assert preference_as_reward(reward, references).tolist() == pytest.approx(expected)
        assert preference_as_reward(tensor(1.0), tensor([NAN])).isnan().all()

    def test_par_is_bounded_and_centred(self):
        reward = torch.linspace(-30, 30, 61, dtype=torch.float64)
        value = preference_as_reward(reward, torch.zeros(61, 1, dtype=torch.float64))
        assert ((value > 0) & (value < 1)).all()
        torch.testing.assert_close(value + value.flip(0), torch.ones_like(value))

    def test_the_quantile_of_what_is_there(self):
        references = torch.stack([torch.arange(101, dtype=torch.float64), torch.full((101,), NAN, dtype=torch.float64)])
        references[1, 7] = 3.0
        assert reference_quantile(references, 0.85).tolist() == pytest.approx([85.0, 3.0])
        assert reference_quantile(tensor([NAN, NAN]), 0.5).isnan().all()
        with pytest.raises(ValueError, match=r"\[0, 1\], got 85"):
            reference_quantile(references, 85)
        with pytest.raises(ValueError, match="M >= 1"):
            reference_quantile(torch.zeros(3, 0))


class TestHierarchy:
    MARGINS = tensor(1.0, 0.1)

    def test_the_first_clear_difference_decides(self):
        a = torch.stack([tensor(5.0, 0.5, 0.5, 0.0), tensor(0.0, 1.0, 0.05, 9.0)])
        b = torch.stack([tensor(0.0, 0.0, 0.0, 1.5), tensor(9.0, 0.0, 0.0, 0.0)])
        found = compare_hierarchically(a, b, self.MARGINS)
        assert found.level.tolist() == [0, 1, -1, 0]
        assert found.preference.tolist() == [1.0, 1.0, 0.5, 0.0]
        back = compare_hierarchically(b, a, self.MARGINS)
        torch.testing.assert_close(found.preference + back.preference, torch.ones(4, dtype=torch.float64))

    def test_a_level_that_says_nothing_decides_nothing(self):
        found = compare_hierarchically(tensor([NAN], [1.0]), tensor([3.0], [0.0]), self.MARGINS)
        assert (found.level.tolist(), found.preference.tolist()) == ([1], [1.0])

    def test_cycles_are_ranked_by_the_share_of_siblings_beaten(self):
        # Within the margin on level 0, a > b > c on level 1; but c beats a clearly on level 0.
        values = torch.stack([tensor(0.0, 0.7, 1.4), tensor(3.0, 2.0, 1.0)])
        share, decided = hierarchical_rank(values, torch.ones(2, 3, dtype=torch.bool), self.MARGINS, torch.zeros(3, dtype=torch.int64))
        assert share.tolist() == [0.5, 0.5, 0.5]
        assert decided.tolist() == [2, 4, 0]

    def test_groups_do_not_meet_and_absent_samples_change_nobody(self):
        values, group = random(2, 8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        everywhere = torch.ones(2, 8, dtype=torch.bool)
        share, _ = hierarchical_rank(values, everywhere, tensor(0.2, 0.1), group)
        alone, _ = hierarchical_rank(values[:, :4], everywhere[:, :4], tensor(0.2, 0.1), group[:4])
        torch.testing.assert_close(share[:4], alone)
        assert share[:4].sum() == pytest.approx(2)
        absent = everywhere.clone()
        absent[:, 7] = False
        without, _ = hierarchical_rank(values, absent, tensor(0.2, 0.1), group)
        torch.testing.assert_close(without[:7], hierarchical_rank(values[:, :7], everywhere[:, :7], tensor(0.2, 0.1), group[:7])[0])
        assert without[7].isnan()

    def test_without_margins_it_is_the_lexicographic_order(self):
        values = torch.stack([tensor(0.0, 1.0, 0.0, 1.0), tensor(0.0, 0.0, 1.0, 1.0)])
        share, _ = hierarchical_rank(values, torch.ones(2, 4, dtype=torch.bool), tensor(0.0, 0.0), torch.zeros(4, dtype=torch.int64))
        assert share.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 1])

    @pytest.mark.parametrize("margins", [tensor(1.0), tensor(1.0, -0.1)])
    def test_bad_margins(self, margins):
        with pytest.raises(ValueError, match="2 levels need as many margins >= 0"):
            compare_hierarchically(torch.zeros(2, 3), torch.zeros(2, 3), margins)


class TestWeights:
    def test_maxmin_moves_towards_the_worst_group(self):
        weights = maxmin_weights(tensor(0.5, 0.5), tensor(1.0, 0.0), rate=1.0)
        assert weights.tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
        for _ in range(50):
            weights = maxmin_weights(weights, tensor(1.0, 0.0), rate=1.0)
        assert weights.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
        assert maxmin_weights(tensor(0.3, 0.7), tensor(0.2, 0.1), rate=None).tolist() == [0.0, 1.0]
        assert maxmin_weights(tensor(0.3, 0.7), tensor(0.1, 0.1), rate=None).tolist() == [0.5, 0.5]

    def test_maxmin_is_over_expectations_not_per_sample(self):
        # Every sample pleases one of two groups: per sample the worst reward is always 0, in expectation both get 1/2.
        values = tensor([1.0, 0.0], [0.0, 1.0])
        assert worst_case(values, torch.ones_like(values)).tolist() == [0.0, 0.0]
        weights = maxmin_weights(tensor(0.5, 0.5), values.mean(dim=1), rate=1.0)
        assert (weights[:, None] * values).sum(dim=0).tolist() == [0.5, 0.5]

    def test_maxmin_finds_the_saddle_point(self):
        # The policy picks s in [0, 1] with rewards R = (s, 1 - 2 s): max min is 1/3. Averages of the play approach it.
        weights, plays = tensor(0.5, 0.5), []
        for _ in range(4000):
            s = 1.0 if float(weights[0]) > 2 * float(weights[1]) else 0.0
            plays.append(s)
            weights = maxmin_weights(weights, tensor(s, 1 - 2 * s), rate=0.02)
        assert sum(plays) / len(plays) == pytest.approx(1 / 3, abs=0.02)

    def test_a_group_that_was_well_off_for_long_is_heard_again_within_ln_1e6_steps(self):
        weights = tensor(1.0, 0.0)
        for _ in range(14):
            weights = maxmin_weights(weights, tensor(1.0, 0.0), rate=1.0)
        assert weights[1] > 0.5

    def test_groups_without_observation(self):
        assert maxmin_weights(tensor(0.5, 0.5), tensor(NAN, NAN)).tolist() == [0.5, 0.5]
        weights = maxmin_weights(tensor(0.4, 0.3, 0.3), tensor(NAN, 1.0, 1.0), rate=2.0)
        assert weights.tolist() == pytest.approx([0.4, 0.3, 0.3])
        with pytest.raises(ValueError, match="rate must be > 0"):
            maxmin_weights(tensor(0.5, 0.5), tensor(1.0, 2.0), rate=0.0)

    def test_running_averages(self):
        average = follow_average(tensor(NAN, 2.0, 2.0), tensor(1.0, 4.0, NAN), decay=0.9)
        assert average.tolist() == pytest.approx([1.0, 2.2, 2.0])
        assert follow_average(tensor(NAN), tensor(NAN), 0.9).isnan().all()
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
            follow_average(tensor(1.0), tensor(1.0), 1.0)

    def test_directions_on_an_arc(self):
        directions = arc_directions(3, 0, 90)
        torch.testing.assert_close(directions, tensor([1.0, 0.0], [0.5**0.5, 0.5**0.5], [0.0, 1.0]))
        torch.testing.assert_close(arc_directions(7, -45, 45).norm(dim=1), torch.ones(7, dtype=torch.float64))
        with pytest.raises(ValueError, match="num >= 1"):
            arc_directions(0)

    def test_normalisation(self):
        weights = tensor([3.0, 0.0], [-4.0, 0.0])
        assert normalise_weights(weights, "unit")[:, 0].tolist() == pytest.approx([0.6, -0.8])
        assert normalise_weights(weights, "sum")[:, 0].tolist() == pytest.approx([3 / 7, -4 / 7])
        assert normalise_weights(weights, "none") is weights
        assert normalise_weights(weights, "unit")[:, 1].tolist() == [0.0, 0.0]
        with pytest.raises(ValueError, match="'sum' or 'unit'"):
            normalise_weights(weights, "max")
