"""Accuracy, calibration and their intervals against closed forms and known models. float64, seed 0."""

import math

import pytest
import torch

from visalign.maths.bootstrap import bootstrap_statistic
from visalign.maths.calibration import calibration, fit_temperature, log_loss, ranking_accuracy


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def judged(num=4000, temperature=1.0, seed=0):
    """Log-odds and labels drawn from them; stated differences are ``temperature`` times the log-odds."""
    generator = torch.Generator().manual_seed(seed)
    odds = 2 * torch.randn(num, generator=generator, dtype=torch.float64)
    label = torch.where(torch.rand(num, generator=generator, dtype=torch.float64) < torch.sigmoid(odds), 1, -1)
    return temperature * odds, label


class TestAccuracy:
    def test_ties_of_the_reward_count_half_and_ties_of_the_label_not_at_all(self):
        assert ranking_accuracy(tensor(1.0, -1.0, 0.0, 5.0), torch.tensor([1, 1, -1, 0])) == pytest.approx(0.5)
        assert ranking_accuracy(tensor(1.0, -1.0, 2.0), torch.tensor([1, -1, -1])) == pytest.approx(2 / 3)

    def test_swapping_pairs_changes_nothing(self):
        difference, label = judged(100)
        assert ranking_accuracy(-difference, -label) == ranking_accuracy(difference, label)
        assert calibration(-difference, -label).error == calibration(difference, label).error

    @pytest.mark.parametrize(("difference", "label", "message"), [
        (tensor(1.0), torch.tensor([0]), "no comparison has a winner"), (tensor(1.0), torch.tensor([2]), "labels are 1, 0 or -1, got"),
        (tensor(float("nan")), torch.tensor([1]), "could not be scored"), (tensor(1.0, 2.0), torch.tensor([1]), r"one shape \(n,\)")])
    def test_bad_input(self, difference, label, message):
        with pytest.raises(ValueError, match=message):
            ranking_accuracy(difference, label)


class TestCalibration:
    def test_closed_form(self):
        # Four comparisons stated with 0.82, three of them right; two with 0.63, one right. Bins of width 0.1 from 0.5.
        stated = tensor(0.82, 0.82, 0.82, 0.82, 0.63, 0.63)
        found = calibration((stated / (1 - stated)).log(), torch.tensor([1, 1, 1, -1, 1, -1]), num_bins=5)
        assert found.error == pytest.approx((4 * 0.07 + 2 * 0.13) / 6)
        assert found.count.tolist() == [0, 2, 0, 4, 0]
        assert found.accuracy[torch.isfinite(found.accuracy)].tolist() == pytest.approx([0.5, 0.75])
        assert found.confidence[torch.isfinite(found.confidence)].tolist() == pytest.approx([0.63, 0.82])

    def test_true_probabilities_are_calibrated_and_overconfidence_shows(self):
        difference, label = judged()
        assert calibration(difference, label).error < 0.02
        assert calibration(4 * difference, label).error > 0.08
        assert calibration(4 * difference / fit_temperature(4 * difference, label), label).error < 0.02

    def test_bins(self):
        with pytest.raises(ValueError, match="num_bins must be >= 1"):
            calibration(tensor(1.0), torch.tensor([1]), num_bins=0)


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.01, 1.0, 30.0])
    def test_it_is_found_again(self, temperature):
        difference, label = judged(temperature=temperature)
        assert fit_temperature(difference, label) == pytest.approx(temperature, rel=0.08)

    def test_it_is_a_stationary_point_of_the_likelihood(self):
        difference, label = judged(200)
        scale = tensor(1 / fit_temperature(difference, label)).requires_grad_()
        torch.nn.functional.logsigmoid(scale * difference * label).sum().backward()
        assert float(scale.grad) == pytest.approx(0, abs=1e-8)

    def test_what_no_temperature_explains(self):
        difference, label = judged(200)
        with pytest.raises(ValueError, match="another direction"):
            fit_temperature(-difference, label)
        with pytest.raises(ValueError, match="all 2 comparisons are ranked right"):
            fit_temperature(tensor(1.0, -2.0), torch.tensor([1, -1]))


class TestBootstrap:
    def test_the_interval_of_an_accuracy_has_the_binomial_width(self):
        difference, label = judged(500)
        found = bootstrap_statistic(lambda weight: ranking_accuracy(difference, label, weight), torch.arange(500),
                                    torch.Generator().manual_seed(0))
        assert found.value == ranking_accuracy(difference, label)
        width = 2 * 1.96 * math.sqrt(found.value * (1 - found.value) / 500)
        assert found.high - found.low == pytest.approx(width, rel=0.15)
        assert found.low < found.value < found.high

    def test_comparisons_of_one_prompt_stay_together(self):
        # Every prompt's 5 comparisons are all right or all wrong: the interval is that of 100 prompts, sqrt(5) times wider.
        right = torch.where(torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.8, 1, -1).repeat_interleave(5)
        prompt = torch.arange(100).repeat_interleave(5)
        ones = torch.ones(500, dtype=torch.float64)

        def interval(cluster):
            generator = torch.Generator().manual_seed(1)
            return bootstrap_statistic(lambda weight: ranking_accuracy(ones, right, weight), cluster, generator, num_resamples=600)

        together, apart = interval(prompt), interval(torch.arange(500))
        assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(5**0.5, rel=0.15)

    def test_any_statistic_of_weighted_rows(self):
        difference, label = judged(300)
        found = bootstrap_statistic(lambda weight: calibration(difference, label, weight).error, torch.arange(300) // 3,
                          torch.Generator().manual_seed(0), num_resamples=100)
        assert 0 <= found.low <= found.high <= 1
        assert found.value == calibration(difference, label).error

    @pytest.mark.parametrize(("cluster", "options"), [(torch.zeros(3, dtype=torch.int64), {}), (torch.arange(3), {"confidence": 1.0}),
                                                      (torch.arange(3), {"num_resamples": 0}), (torch.arange(0), {})])
    def test_bad_input(self, cluster, options):
        with pytest.raises(ValueError, match="at least two clusters"):
            bootstrap_statistic(lambda weight: 0.0, cluster, torch.Generator(), **options)


class TestLogLoss:
    def test_is_log_2_for_a_reward_that_says_nothing_and_counts_winners_alone(self):
        assert log_loss(tensor(0.0, 0.0), torch.tensor([1, -1])) == pytest.approx(math.log(2))
        expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(3))) / 2
        assert log_loss(tensor(2.0, -3.0, 9.0), torch.tensor([1, 1, 0])) == pytest.approx(expected)

    def test_weights_repeat_rows(self):
        difference, label = judged(50)
        weight = torch.arange(50) % 3
        repeated = log_loss(difference.repeat_interleave(weight), label.repeat_interleave(weight))
        assert log_loss(difference, label, weight) == pytest.approx(repeated)


def test_reflection_takes_a_third_and_more_of_the_bias_of_a_calibration_error_out():
    """A perfectly calibrated reward, whose bins hold noise alone: |N(0, 2 s^2)| is sqrt 2 times |N(0, s^2)|, so that 2 - sqrt 2 stay."""
    reflected, plain = [], []
    for seed in range(10):
        difference, label = judged(300, seed=seed)
        cluster, generator = torch.arange(300), torch.Generator().manual_seed(seed)
        found = [bootstrap_statistic(lambda weight, d=difference, y=label: calibration(d, y, weight).error, cluster, generator,
                                     num_resamples=200, reflect=reflect) for reflect in (True, False)]
        reflected.append(found[0])
        plain.append(found[1])
    assert sum(one.low > 0 for one in plain) == 10
    assert all(one.low <= one.value <= one.high for one in reflected)
    assert sum(one.value for one in reflected) / sum(one.value for one in plain) == pytest.approx(2 - 2**0.5, abs=0.15)


def test_reflection_leaves_a_mean_where_it_is():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cluster = torch.arange(200)
    found = bootstrap_statistic(lambda weight: float((weight * values).sum() / weight.sum()), cluster, torch.Generator().manual_seed(0),
                                reflect=True)
    assert found.value == pytest.approx(float(values.mean()), abs=0.01)
    assert found.low < float(values.mean()) < found.high
