"""Flip rates found by expectation maximisation, against labels whose flips are known. float64, seeds as stated."""

import pytest
import torch

from visalign.maths.calibration import fit_temperature
from visalign.maths.reward_noise import fit_flips, label_posterior


def agreement(rate, num=20_000, temperature=3.0, seed=1):
    """Differences of a model with this temperature, positive where it agrees with a label; and whether the label is right."""
    generator = torch.Generator().manual_seed(seed)
    odds = 2 * torch.randn(num, generator=generator, dtype=torch.float64)
    label = torch.where(torch.rand(num, generator=generator, dtype=torch.float64) < torch.sigmoid(odds), 1, -1)
    right = torch.rand(num, generator=generator, dtype=torch.float64) >= rate
    return temperature * odds * torch.where(right, label, -label), right


@pytest.mark.parametrize("rate", [0.1, 0.25])
def test_rate_and_temperature_are_recovered_together(rate):
    found = fit_flips(agreement(rate)[0])
    assert found.rate == pytest.approx(rate, abs=0.03)
    assert found.temperature == pytest.approx(3.0, rel=0.1)


def test_clean_labels_have_a_rate_near_0():
    assert fit_flips(agreement(0.0)[0]).rate < 0.02


def test_the_answer_is_a_fixed_point():
    margin, _ = agreement(0.25)
    found = fit_flips(margin)
    assert found.rate == pytest.approx(float(1 - found.posterior.mean()), abs=1e-5)
    torch.testing.assert_close(found.posterior, label_posterior(margin / found.temperature, found.rate), atol=1e-5, rtol=0)


def test_the_posterior_is_calibrated():
    margin, right = agreement(0.25)
    posterior = fit_flips(margin).posterior
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 0.9), (0.9, 1.0)):
        inside = (posterior >= low) & (posterior < high)
        assert float(posterior[inside].mean()) == pytest.approx(float(right[inside].double().mean()), abs=0.04)


def test_a_known_rate_fits_the_temperature_alone():
    margin, _ = agreement(0.25)
    found = fit_flips(margin, 0.25)
    assert found.rate == 0.25
    assert found.temperature == pytest.approx(3.0, rel=0.05)
    plain = fit_temperature(margin, torch.ones(len(margin)))
    assert plain > 1.5 * found.temperature  # flips look like a lack of confidence
    assert fit_flips(margin, 0.0).temperature == pytest.approx(plain)


@pytest.mark.parametrize(("margin", "rate", "message"), [
    (torch.tensor([1.0, -2.0]), None, "no better|wins|direction"), (torch.tensor([1.0, 2.0]), None, "ranked right"),
    (torch.tensor([1.0, float("nan")]), None, "NaN"), (torch.tensor([1.0, -0.5]), 0.5, "flip_rate must lie in")])
def test_bad_input(margin, rate, message):
    with pytest.raises(ValueError, match=message):
        fit_flips(margin, rate)
