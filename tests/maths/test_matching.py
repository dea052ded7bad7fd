"""Surrogate log-probabilities of matching errors: their table, slopes and bounds, float64."""

import pytest
import torch

from visalign.maths.matching import matching_error, surrogate_log_prob
from visalign.maths.process import to_prediction

GENERATOR = torch.Generator().manual_seed(0)
ERROR, S = torch.tensor([0.0, 0.04, 1.0, 9.0], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize(("weighting", "expected"), [
    ("uniform", [0.0, -0.04, -1.0, -9.0]),
    ("t", [0.0, -0.02, -0.8, -9.0]),
    ("t2", [0.0, -0.01, -0.64, -9.0]),
    ("huber", [0.0, -0.5 * 0.2, -0.8, -3.0]),
    ("ghuber", [0.0, -0.5 * 4 * 0.04**0.25, -0.8 * 4, -4 * 9**0.25]),
])
def test_the_table(weighting, expected):
    """The two robust forms subtract their value at 0, at most 4 (1e-10)^0.25 = 0.0127."""
    got = surrogate_log_prob(ERROR, S, weighting)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=0.0127, rtol=0)
    assert float(got[0]) == 0.0


def test_the_slope_of_ghuber_is_a_power_and_finite_at_zero():
    """d lp / dl = -s (l + 1e-10)^(p - 1)."""
    error = ERROR.clone().requires_grad_()
    surrogate_log_prob(error, S, "ghuber", power=0.25).sum().backward()
    torch.testing.assert_close(error.grad, -S * (ERROR + 1e-10) ** -0.75, atol=0, rtol=1e-12)


def test_ghuber_contains_t_and_half_of_huber():
    torch.testing.assert_close(surrogate_log_prob(ERROR, S, "ghuber", power=1.0), surrogate_log_prob(ERROR, S, "t"), atol=1e-12, rtol=0)
    torch.testing.assert_close(surrogate_log_prob(ERROR, S, "ghuber", power=0.5), 2 * surrogate_log_prob(ERROR, S, "huber"))


@pytest.mark.parametrize(("alpha", "sigma"), [(0.4, 0.6), (0.8, 0.6), (1.0, 7.0)], ids=["flow", "VP", "sigma"])
def test_t2_is_the_error_of_x0_in_every_process(alpha, sigma):
    x0, noise = normal(5, 2, 3), normal(5, 2, 3)
    velocity = noise - x0 + 0.3 * normal(5, 2, 3)
    answer = to_prediction(velocity, alpha * x0 + sigma * noise, alpha, sigma, "flow").x0
    s = torch.full((5,), sigma / (alpha + sigma), dtype=torch.float64)
    got = -surrogate_log_prob(matching_error(velocity, noise - x0), s, "t2")
    torch.testing.assert_close(got, (answer - x0).square().flatten(1).mean(1), atol=1e-12, rtol=1e-12)


def test_errors_are_float64_whatever_the_network_gives():
    a, b = normal(3, 4).float(), normal(3, 4).float()
    assert matching_error(a, b).dtype == torch.float64
    torch.testing.assert_close(matching_error(a, b), (a.double() - b.double()).square().mean(1))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown weighting"):
        surrogate_log_prob(ERROR, S, "t3")
    with pytest.raises(ValueError, match="power of ghuber"):
        surrogate_log_prob(ERROR, S, "ghuber", power=0.0)
    with pytest.raises(ValueError, match="one level per sample"):
        surrogate_log_prob(ERROR, S[:2], "t")
    with pytest.raises(ValueError, match="one shape"):
        matching_error(normal(2, 3), normal(3))
