"""Published strengths and exact conversions of errors between prediction spaces."""

import pytest
import torch

from visalign.maths.preference_scale import PRESETS, beta_to_kappa, space_weight
from visalign.maths.process import from_prediction
from visalign.types import Prediction


def level(value):
    return torch.tensor([value], dtype=torch.float64)


def test_numbers():
    alpha, sigma = level(0.6), level(0.8)
    assert float(space_weight("v_prediction", "epsilon", alpha, sigma)) == pytest.approx(0.36)
    assert float(space_weight("v_prediction", "x0", alpha, sigma)) == pytest.approx(0.64)
    assert float(space_weight("x0", "epsilon", alpha, sigma)) == pytest.approx(0.36 / 0.64)
    assert float(space_weight("velocity", "epsilon", level(0.7), level(0.3))) == pytest.approx(0.49)
    assert float(space_weight("velocity", "x0", level(0.7), level(0.3))) == pytest.approx(0.09)


KINDS = {**{kind: kind for kind in ("epsilon", "sample", "flow", "v_prediction", "edm")}, "x0": "sample", "velocity": "flow"}


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.6, 0.8), (0.7, 0.3), (1.0, 3.5)])
def test_errors_of_one_prediction_convert_exactly(source, target, alpha, sigma):
    """Truth and prediction share x; the ratio of the squared residuals is the weight, element by element."""
    generator = torch.Generator().manual_seed(0)
    x0, x1, guess = (torch.randn(1, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    x = alpha * x0 + sigma * x1
    truth, prediction = Prediction(x0=x0, x1=x1), Prediction(x0=guess, x1=(x - alpha * guess) / sigma)
    below, above = (
        (from_prediction(truth, alpha, sigma, KINDS[s], 0.7) - from_prediction(prediction, alpha, sigma, KINDS[s], 0.7)).square()
        for s in (source, target))
    assert torch.allclose(above, space_weight(source, target, level(alpha), level(sigma), sigma_data=0.7) * below)


def test_the_decaying_flow_weight_is_the_constant_one_in_epsilon():
    """beta (1 - t)^2 with velocity errors is constant beta with epsilon errors: u = 1 at t = 0.8 becomes 0.04."""
    assert float(250 * 0.004 * space_weight("velocity", "epsilon", level(0.2), level(0.8))) == pytest.approx(0.04)


@pytest.mark.parametrize(("name", "kappa"), [
    ("diffusion_dpo", 2500), ("diffusers_dpo_sd15", 2500), ("smpo_sd15", 1000), ("smpo_sdxl", 2500), ("npo_sd15", 500), ("npo_sdxl", 1000),
    ("dmpo", 1000), ("diffusion_kto", 1000), ("align_anything", 2500), ("dso", 250), ("flow_grpo_dpo", 50), ("flow_factory_dpo", 1000),
])
def test_presets(name, kappa):
    assert PRESETS[name].kappa == kappa


def test_every_preset_is_checked_above():
    assert len(PRESETS) == 12
    assert beta_to_kappa(5000, half=True) == beta_to_kappa(2500, half=False)


@pytest.mark.parametrize(("source", "target", "alpha", "message"), [
    ("epsilon", "velocity", 0.0, "where alpha is 0"), ("score", "x0", 0.5, "unknown error space 'score'"),
    ("epsilon", "x0", -0.1, "must be >= 0"),
])
def test_impossible_conversions_teach(source, target, alpha, message):
    with pytest.raises(ValueError, match=message):
        space_weight(source, target, level(alpha), level(0.5))


def test_a_target_that_vanishes_has_weight_zero():
    assert float(space_weight("velocity", "epsilon", level(0.0), level(1.0))) == 0.0
