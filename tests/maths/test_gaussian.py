"""Step densities against torch.distributions, and the identities GRPO's clip ranges rest on."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from visalign.maths.gaussian import (
    cps_log_prob_published,
    kl_divergence,
    kl_divergence_per_dim,
    log_prob,
    log_prob_per_dim,
    state_coefficients,
    transition_mean,
)
from visalign.maths.process import from_velocity
from visalign.types import NoiseLevel, Prediction, Transition


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("std", [0.3, torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)])
def test_log_prob_is_the_sum_of_normal_log_densities(std):
    x, mean = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
    expected = Normal(mean, std if isinstance(std, float) else std[:, None, None]).log_prob(x)
    torch.testing.assert_close(log_prob(x, mean, std), expected.sum((1, 2)), rtol=1e-14, atol=0)
    torch.testing.assert_close(log_prob_per_dim(x, mean, std), expected.mean((1, 2)), rtol=1e-14, atol=0)


def test_bfloat16_states_are_scored_in_float32():
    x, mean = normal(2, 100).bfloat16(), normal(2, 100, seed=3)
    assert log_prob(x, mean.float(), 0.5).dtype == torch.float32


def test_log_ratio_identity():
    """lp - lp_old = mean(eps Delta) / std - mean(Delta^2) / (2 std^2), to 1e-12."""
    mean_old, delta, noise, std = normal(6, 50, seed=4), 0.1 * normal(6, 50, seed=5), normal(6, 50, seed=6), 0.37
    x = mean_old + std * noise
    difference = log_prob_per_dim(x, mean_old + delta, std) - log_prob_per_dim(x, mean_old, std)
    expected = (noise * delta).mean(1) / std - delta.square().mean(1) / (2 * std**2)
    assert (difference - expected).abs().max() < 1e-12


def test_guard_identity():
    """(lp - lp_old + KL per dim) std = mean(eps Delta): the guarded log-ratio has expectation 0."""
    mean_old, delta, noise, std = normal(6, 50, seed=4), 0.1 * normal(6, 50, seed=5), normal(6, 50, seed=6), 0.37
    x, mean = mean_old + std * noise, mean_old + delta
    exponent = log_prob_per_dim(x, mean, std) - log_prob_per_dim(x, mean_old, std) + kl_divergence_per_dim(mean, mean_old, std)
    assert (exponent * std - (noise * delta).mean(1)).abs().max() < 1e-12


def test_log_ratio_statistics_give_the_clip_range_its_meaning():
    """Mean -K and std sqrt(2 K / D) over 20,000 draws (seed 7): standard errors 7e-4 and 5e-4 of the std."""
    dims, std = 64, 0.5
    delta = torch.full((20_000, dims), 0.02, dtype=torch.float64)
    noise = normal(20_000, dims, seed=7)
    ratio = log_prob_per_dim(std * noise, delta, std) - log_prob_per_dim(std * noise, torch.zeros_like(delta), std)
    k = 0.02**2 / (2 * std**2)
    expected = math.sqrt(2 * k / dims)
    assert abs(float(ratio.mean()) + k) < 0.03 * expected
    assert abs(float(ratio.std()) / expected - 1) < 0.02


def test_published_clip_range_in_nats():
    """A clip range of 1e-4 at D = 65536 corresponds to 21 nats per step, 1e-5 to 0.21."""
    dims = 16 * 64 * 64
    assert round(1e-4**2 * dims / 2 * dims, 0) == 21
    delta = torch.full((1, dims), 1.0, dtype=torch.float64)
    k = 1e-5**2 * dims / 2
    assert abs(float(kl_divergence(delta * math.sqrt(2 * k), 0 * delta, 1.0)) - 0.2147) < 1e-4


def test_cps_published_difference_is_2_variance_times_the_true_one():
    mean_old, mean, noise, std = normal(4, 9, seed=1), normal(4, 9, seed=2), normal(4, 9, seed=3), 0.2
    x = mean_old + std * noise
    published = cps_log_prob_published(x, mean) - cps_log_prob_published(x, mean_old)
    true = log_prob_per_dim(x, mean, std) - log_prob_per_dim(x, mean_old, std)
    torch.testing.assert_close(published, 2 * std**2 * true, atol=1e-13, rtol=0)


def test_kl_and_its_gradient_match_torch_distributions():
    std = torch.tensor([0.2, 1.5], dtype=torch.float64)
    p, q = normal(2, 3, 4, seed=8).requires_grad_(), normal(2, 3, 4, seed=9).requires_grad_()
    expected = torch_kl(Normal(p, std[:, None, None]), Normal(q, std[:, None, None]))
    torch.testing.assert_close(kl_divergence(p, q, std), expected.sum((1, 2)))
    torch.testing.assert_close(kl_divergence_per_dim(p, q, std), expected.mean((1, 2)))
    ours = torch.autograd.grad(kl_divergence_per_dim(p, q, std).sum(), (p, q))
    theirs = torch.autograd.grad(expected.mean((1, 2)).sum(), (p, q))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_kl_to_itself_is_exactly_zero():
    p = normal(3, 7).float()
    assert kl_divergence(p, p.clone(), 0.01).eq(0).all()


def test_sensitivity_of_the_mean_to_each_output_kind():
    """k_v / k_eps = sqrt(ab) exactly, and k_eps, k_x0 are the closed forms of DDIM (eta 1)."""
    ab, ab_next = 0.4, 0.6
    alpha, sigma = math.sqrt(ab), math.sqrt(1 - ab)
    std = math.sqrt((1 - ab_next) / (1 - ab) * (1 - ab / ab_next))
    step = Transition(A=math.sqrt(ab_next), B=math.sqrt(1 - ab_next - std**2), std=std)
    _, c_v = state_coefficients(NoiseLevel(alpha, sigma), step)
    k_eps = step.B - math.sqrt(ab_next * (1 - ab) / ab)
    # dm = 1 moves the velocity x1 - x0 by (alpha + sigma) / alpha for epsilon and by alpha + sigma for v.
    assert abs(c_v * (alpha + sigma) / alpha - k_eps) < 1e-15
    assert abs(c_v * (alpha + sigma) / k_eps - alpha) < 1e-15
    k_x0 = math.sqrt(ab_next) - math.sqrt(ab) * step.B / sigma
    assert abs(-c_v * (alpha + sigma) / sigma - k_x0) < 1e-15


def test_state_coefficients_reproduce_the_mean():
    x, v = normal(2, 3, seed=1), normal(2, 3, seed=2)
    step = Transition(A=0.4, B=1.3, std=0.1)
    c_x, c_v = state_coefficients(NoiseLevel(0.3, 2.0), step)
    torch.testing.assert_close(transition_mean(from_velocity(v, x, 0.3, 2.0), step), c_x * x + c_v * v, atol=1e-14, rtol=0)


def test_policy_gradient_slope_matches_finite_differences():
    """dlp/dv = c_v eps / std per dimension, in one dimension."""
    level, step = NoiseLevel(0.4, 0.6), Transition(A=0.5, B=0.3, std=0.2)
    x, noise, v = (torch.tensor([[value]], dtype=torch.float64) for value in (0.7, -1.3, 0.25))
    _, c_v = state_coefficients(level, step)
    x_next = transition_mean(from_velocity(v, x, 0.4, 0.6), step) + step.std * noise

    def value(velocity):
        return log_prob_per_dim(x_next, transition_mean(from_velocity(velocity, x, 0.4, 0.6), step), step.std)

    slope = float((value(v + 1e-6) - value(v - 1e-6)) / 2e-6)
    leaf = v.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf)
    assert abs(float(gradient) - c_v * -1.3 / 0.2) < 1e-13
    assert abs(slope - float(gradient)) < 1e-7


@pytest.mark.parametrize("std", [0.0, -0.1, torch.tensor([0.1, 0.0])])
def test_deterministic_steps_have_no_density(std):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="a deterministic step has no density"):
        log_prob(x, x, std)
    with pytest.raises(ValueError, match="std must be > 0"):
        kl_divergence(x, x, std)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="need one shape"):
        log_prob(torch.zeros(2, 3), torch.zeros(2, 1), 0.1)
    with pytest.raises(ValueError, match="one scalar per sample"):
        log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3))


def test_transition_mean_is_a_plain_combination():
    prediction = Prediction(x0=torch.ones(1, 2), x1=torch.full((1, 2), 3.0))
    assert transition_mean(prediction, Transition(A=0.5, B=2.0, std=0.0)).tolist() == [[6.5, 6.5]]
