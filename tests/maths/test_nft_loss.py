"""DiffusionNFT's loss by its closed forms, float64."""

import pytest
import torch

from visalign.maths.nft import implicit_predictions, nft_loss, optimality
from visalign.maths.process import from_prediction, to_prediction
from visalign.types import Prediction

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def test_the_minimum_of_a_scalar_problem_by_hand():
    """r = (.9, .2, .6), v = (1, -2, .5), v_old = .1, beta = .3 at t = 1 and x = 0, where x0 = -v: v* = v_old + 2.28889."""
    x0 = -torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    r, old = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64), torch.full((3, 1), -0.1, dtype=torch.float64)
    answer = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = nft_loss(answer.expand(3, 1), old, x0, r, beta=0.3, adaptive=False).sum()
    slope, = torch.autograd.grad(loss, answer, create_graph=True)
    curvature, = torch.autograd.grad(slope, answer)
    minimum = float((-slope / curvature).detach())  # exact: the loss is quadratic
    assert -minimum == pytest.approx(0.1 + 2.28889, abs=1e-5)
    closed = old[0, 0] + ((2 * r - 1) * (x0 - old)[:, 0]).mean() / 0.3
    assert minimum == pytest.approx(float(closed), abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_at_the_old_policy_is_independent_of_beta(beta):
    """2 A t (v_old - v) / mean |v_old - v| with x0 = .4, e = -1.1, t = .6, v_old = .3, A = 2: 2.4, in the velocity."""
    t, clip = 0.6, 5.0
    x0, noise = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[-1.1]], dtype=torch.float64)
    x = (1 - t) * x0 + t * noise
    velocity = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    old = x - t * velocity.detach()
    r = optimality(torch.tensor([2.0], dtype=torch.float64), clip)
    (clip * nft_loss(x - t * velocity, old, x0, r, beta)).sum().backward()
    assert float(velocity.grad) == pytest.approx(2.4, abs=1e-12)


def test_at_the_old_policy_an_uninformative_sample_has_no_gradient():
    old, x0 = normal(4, 3, 2), normal(4, 3, 2)
    policy = old.clone().requires_grad_()
    nft_loss(policy, old, x0, optimality(torch.zeros(4, dtype=torch.float64), 5.0), 0.3).sum().backward()
    assert torch.equal(policy.grad, torch.zeros_like(policy))


@pytest.mark.parametrize("adaptive", [True, False])
def test_away_from_the_old_policy_an_uninformative_sample_pulls_back(adaptive):
    """l+ + l- is smallest at the old policy."""
    old, x0 = normal(1, 5), normal(1, 5)
    policy = (old + 0.5).requires_grad_()
    nft_loss(policy, old, x0, torch.full((1,), 0.5, dtype=torch.float64), 1.0, adaptive).sum().backward()
    assert float((policy.grad * (policy.detach() - old)).sum()) > 0


@pytest.mark.parametrize(("alpha", "sigma"), [(0.4, 0.6), (0.8, 0.6), (1.0, 7.0)], ids=["flow", "VP", "sigma"])
def test_the_form_in_x0_is_the_published_one_in_velocities_of_flow_coordinates(alpha, sigma):
    """mean (X - x0)^2 / mean |X - x0| = s mean (dv)^2 / mean |dv|, with implicit velocities mixed as in the paper."""
    x0, noise, beta, s = normal(6, 4), normal(6, 4), 0.4, sigma / (alpha + sigma)
    r = torch.rand(6, generator=GENERATOR, dtype=torch.float64)
    x, truth = alpha * x0 + sigma * noise, noise - x0
    velocity, velocity_old = truth + 0.3 * normal(6, 4), truth + 0.3 * normal(6, 4)

    def answer(v):
        return to_prediction(v, x, alpha, sigma, "flow").x0

    got = nft_loss(answer(velocity), answer(velocity_old), x0, r, beta)
    parts = []
    for sign in (1, -1):
        dv = velocity_old + sign * beta * (velocity - velocity_old) - truth
        parts.append(s * dv.square().mean(1) / dv.abs().mean(1))
    torch.testing.assert_close(got, (r * parts[0] + (1 - r) * parts[1]) / beta, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow", "sample"])
def test_mixing_commutes_with_every_prediction_kind(kind):
    """The answer is affine in the network's output, so implicit outputs give implicit x0 predictions."""
    alpha, sigma = 0.6, 0.8
    x, first, second = normal(2, 3), normal(2, 3), normal(2, 3)
    outputs = [from_prediction(Prediction(x0=x0, x1=(x - alpha * x0) / sigma), alpha, sigma, kind, 0.5) for x0 in (first, second)]
    for mixed, wanted in zip(implicit_predictions(*outputs, 0.3), implicit_predictions(first, second, 0.3), strict=True):
        torch.testing.assert_close(to_prediction(mixed, x, alpha, sigma, kind).x0, wanted, atol=1e-12, rtol=1e-12)


def test_optimality_is_half_without_information_and_clipped():
    got = optimality(torch.tensor([-9.0, -2.5, 0.0, 2.5, 9.0]), 5.0)
    assert got.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_perfect_answer_has_a_finite_loss_and_gradient():
    x0 = normal(2, 3)
    policy = x0.clone().requires_grad_()
    loss = nft_loss(policy, x0, x0, torch.ones(2, dtype=torch.float64), 1.0)
    loss.sum().backward()
    assert torch.equal(loss.detach(), torch.zeros_like(loss))
    assert torch.equal(policy.grad, torch.zeros_like(x0))


def test_bad_input_is_refused():
    a, r = normal(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="one shape"):
        nft_loss(a, a[:1], a, r, 1.0)
    with pytest.raises(ValueError, match="one number per sample"):
        nft_loss(a, a, a, torch.ones(2, 1), 1.0)
    with pytest.raises(ValueError, match="beta must be > 0"):
        nft_loss(a, a, a, r, 0.0)
    with pytest.raises(ValueError, match="must be > 0"):
        optimality(r, 0.0)
