"""Surrogate losses: truth tables, slopes on policy, and the identities of the guarded ratio."""

import math

import pytest
import torch

from visalign.maths.gaussian import kl_divergence_per_dim, log_prob_per_dim
from visalign.maths.surrogate import clipped, dppo, guard


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def gradient(function, ratio):
    log_prob = tensor(math.log(ratio)).requires_grad_()
    terms = function(log_prob)
    (slope,) = torch.autograd.grad(terms.loss.sum(), log_prob)
    return float(slope), terms


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [(1, 1.01, False), (1, 0.99, True), (-1, 1.01, True), (-1, 0.99, False)])
def test_clip_truth_table(advantage, ratio, moves):
    slope, terms = gradient(lambda lp: clipped(lp, tensor(0.0), tensor(advantage), 1e-3, 1e-3), ratio)
    assert slope == (pytest.approx(-advantage * ratio) if moves else 0.0)
    assert bool(terms.clipped) is not moves
    assert float(terms.ratio) == pytest.approx(ratio)


def test_unequal_ranges():
    assert bool(clipped(tensor(math.log(1.15)), tensor(0.0), tensor(1.0), 0.1, 0.2).clipped) is False
    assert bool(clipped(tensor(math.log(0.85)), tensor(0.0), tensor(-1.0), 0.1, 0.2).clipped) is True


def test_clipped_loss_value():
    terms = clipped(tensor(math.log(1.5), math.log(0.5)), tensor(0.0, 0.0), tensor(2.0, -2.0), 0.2, 0.2)
    assert terms.loss.tolist() == pytest.approx([-2.0 * 1.2, 2.0 * 0.8])


@pytest.mark.parametrize("function", [
    lambda lp, a: clipped(lp, lp.detach(), a, 1e-4, 1e-4),
    lambda lp, a: dppo(lp, lp.detach(), torch.zeros_like(lp), a),
])
def test_on_policy_slope_is_minus_the_advantage(function):
    lp, a = tensor(-1.3, 0.2, -0.7).requires_grad_(), tensor(1.5, -0.5, 0.0)
    terms = function(lp, a)
    (slope,) = torch.autograd.grad(terms.loss.sum(), lp)
    torch.testing.assert_close(slope, -a)
    assert terms.ratio.eq(1).all()
    assert not terms.clipped.any()


def test_zero_advantage_has_zero_gradient_everywhere():
    for ratio in (0.5, 1.0, 2.0):
        assert gradient(lambda lp: clipped(lp, tensor(0.0), tensor(0.0), 0.1, 0.1), ratio)[0] == 0
        assert gradient(lambda lp: dppo(lp, tensor(0.0), tensor(1.0), tensor(0.0)), ratio)[0] == 0


def steps(seed=0, std=0.37):
    """mean, mean_old, x_next, noise of 6 samples with 50 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mean_old, delta, noise = torch.randn(3, 6, 50, generator=generator, dtype=torch.float64).unbind(0)
    return mean_old + 0.01 * delta, mean_old, mean_old + std * noise, noise, 0.01 * delta


def test_guarded_ratio_is_exp_of_the_noise_projection():
    std = 0.37
    mean, mean_old, x_next, noise, delta = steps(std=std)
    lp, lp_old = log_prob_per_dim(x_next, mean, std), log_prob_per_dim(x_next, mean_old, std)
    terms = guard(lp, lp_old, kl_divergence_per_dim(mean, mean_old, std), std, torch.ones(6, dtype=torch.float64), 1e-4, 1e-4)
    assert (terms.ratio.log() - (noise * delta).mean(1)).abs().max() < 1e-12


def test_guarded_gradient_does_not_depend_on_the_std_of_the_step():
    """On policy: d loss / d mean = -A eps / D whatever the std (c_v of the step weights table), 1/h multiplies it."""
    for std, h in [(0.05, None), (0.9, None), (0.9, 0.1)]:
        _, mean_old, x_next, noise, _ = steps(std=std)
        mean = mean_old.clone().requires_grad_()
        lp, lp_old = log_prob_per_dim(x_next, mean, std), log_prob_per_dim(x_next, mean_old, std)
        a = torch.linspace(-1, 1, 6, dtype=torch.float64)
        terms = guard(lp, lp_old, kl_divergence_per_dim(mean, mean_old, std), std, a, 1e-4, 1e-4, step_size=h)
        (slope,) = torch.autograd.grad(terms.loss.sum(), mean)
        torch.testing.assert_close(slope, -a[:, None] * noise / 50 / (h or 1.0), atol=1e-12, rtol=0)


def test_guard_takes_one_std_per_step():
    lp = torch.zeros(3, 2, dtype=torch.float64)
    shift = 0.01 * torch.ones_like(lp)
    terms = guard(shift, lp, lp, tensor(0.1, 0.5), torch.ones_like(lp), 1.0, 1.0, step_size=tensor(0.2, 0.4))
    torch.testing.assert_close(terms.ratio, torch.exp(0.01 * tensor(0.1, 0.5)).expand(3, 2))
    torch.testing.assert_close(terms.loss, (-terms.ratio / tensor(0.2, 0.4)))


@pytest.mark.parametrize(("advantage", "ratio", "kl", "masked"), [
    (1, 1.01, 2e-5, True), (-1, 0.99, 2e-5, True), (1, 1.01, 1e-5, True),  # away, at or beyond the threshold
    (1, 0.99, 2e-5, False), (-1, 1.01, 2e-5, False),  # coming back
    (1, 1.01, 9e-6, False), (-1, 0.99, 0.0, False),  # still inside
])
def test_dppo_truth_table(advantage, ratio, kl, masked):
    slope, terms = gradient(lambda lp: dppo(lp, tensor(0.0), tensor(kl), tensor(advantage), threshold=1e-5), ratio)
    assert bool(terms.clipped) is masked
    assert slope == (0.0 if masked else pytest.approx(-advantage * ratio))
    assert float(terms.loss.detach()) == (0.0 if masked else pytest.approx(-advantage * ratio))


def test_dppo_never_clips_the_ratio():
    assert gradient(lambda lp: dppo(lp, tensor(0.0), tensor(0.0), tensor(1.0)), 3.0)[0] == pytest.approx(-3.0)


@pytest.mark.parametrize("function", [
    lambda lp, old, a: clipped(lp, old, a, 1.0, 1.0),
    lambda lp, old, a: guard(lp, old, torch.zeros_like(lp), 0.3, a, 1.0, 1.0),
    lambda lp, old, a: dppo(lp, old, torch.zeros_like(lp), a),
])
def test_old_log_probs_carry_no_gradient(function):
    lp, old = tensor(0.1).requires_grad_(), tensor(0.0).requires_grad_()
    function(lp, old, tensor(1.0)).loss.sum().backward()
    assert lp.grad is not None
    assert old.grad is None


@pytest.mark.parametrize(("call", "message"), [
    (lambda: clipped(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3), 0.1, 0.1), "one shape"),
    (lambda: clipped(torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.0, 0.1), "clip ranges must be > 0"),
    (lambda: guard(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.ones(3, 1, 1), torch.zeros(3), 0.1, 0.1), "one value per step"),
    (lambda: guard(torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.0, torch.zeros(3), 0.1, 0.1), "std must be > 0"),
    (lambda: guard(torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.1, torch.zeros(3), 0.1, 0.1, step_size=0.0), "step_size must be > 0"),
    (lambda: dppo(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(3), threshold=0.0), "must be > 0"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
