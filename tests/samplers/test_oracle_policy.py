"""The oracle policy keeps the Policy protocol and samples the world it claims to."""

import pytest
import torch

from visalign.maths.advantages import AdvantageRule, group_advantages
from visalign.maths.gaussian import kl_divergence, log_prob, transition_mean
from visalign.maths.oracle import GaussianWorld, propagate, shift_response
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.protocols import Policy
from visalign.samplers.dynamics import ODE, FlowSDE, Mixed
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.types import Prompt

SCHEDULE = flow_schedule(dance_sigmas(10, shift=3.0))
MEAN = torch.tensor([[1.5, 0.0, -1.0]], dtype=torch.float64)


def make(**options) -> GaussianPolicy:
    return GaussianPolicy(GaussianWorld(MEAN, 0.25), SCHEDULE, dtype=torch.float64, **options)


def test_it_is_a_policy():
    policy: Policy = make()
    assert policy.latent_shape == (1, 3)
    assert list(policy.named_trainable()) == ["shift"]
    conditioning = policy.encode([Prompt("a"), Prompt("b", metadata={"offset": 2.0})])
    assert len(conditioning) == 2
    assert len(conditioning.select([1, 1, 0])) == 3


def test_latents_depend_on_their_own_seed_only():
    policy = make()
    together, alone = policy.initial_latents([3, 5]), policy.initial_latents([5])
    assert together.dtype == torch.float32
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_predictions_are_those_of_the_shifted_world_with_the_prompts_offset():
    policy = make()
    with torch.no_grad():
        policy.shift.fill_(0.3)
    x = policy.initial_latents([0, 1]).double()
    conditioning = policy.encode([Prompt("a"), Prompt("b", metadata={"offset": 2.0})])
    prediction = policy.predict(x, 4, conditioning)
    for k, offset in enumerate((0.0, 2.0)):
        expected = GaussianWorld(MEAN + 0.3 + offset, 0.25).predict(x[k:k + 1], SCHEDULE.levels[4])
        torch.testing.assert_close(prediction.x0[k:k + 1], expected.x0)
        torch.testing.assert_close(prediction.x1[k:k + 1], expected.x1)


def test_sampling_it_reaches_the_exact_mean():
    """The ODE with the mean latent as start is the exact propagation of the mean."""
    policy = make()
    conditioning, x = policy.encode([Prompt("a")]), torch.zeros(1, 1, 3, dtype=torch.float64)
    for i in range(10):
        x = transition_mean(policy.predict(x, i, conditioning), ODE().transition(SCHEDULE.levels, i))
    exact = propagate(GaussianWorld(MEAN, 0.25), ODE(), SCHEDULE.levels)
    torch.testing.assert_close(x[0], exact.mean, atol=1e-13, rtol=0)


@pytest.mark.parametrize("per_step", [False, True])
def test_the_gradient_of_the_final_mean_is_the_gain(per_step):
    policy = make(per_step=per_step)
    conditioning, x = policy.encode([Prompt("a")]), torch.zeros(1, 1, 3, dtype=torch.float64)
    for i in range(10):
        x = transition_mean(policy.predict(x, i, conditioning), FlowSDE().transition(SCHEDULE.levels, i))
    (gradient,) = torch.autograd.grad(x.sum(), policy.shift)
    gain = shift_response(GaussianWorld(MEAN, 0.25), FlowSDE(), SCHEDULE.levels).gain
    torch.testing.assert_close(gradient, gain if per_step else gain.sum(0), atol=1e-13, rtol=0)


def test_roles():
    policy = make()
    x, conditioning = policy.initial_latents([0]).double(), policy.encode([Prompt("a")])
    at_start = policy.predict(x, 2, conditioning).x0
    assert torch.equal(policy.predict(x, 2, conditioning, role="reference").x0, at_start)
    assert not policy.has_role("old")
    with pytest.raises(ValueError, match=r"no weights play the role 'old' yet; call snapshot"):
        policy.predict(x, 2, conditioning, role="old")
    with torch.no_grad():
        policy.shift.fill_(1.0)
    policy.snapshot("old")
    with torch.no_grad():
        policy.shift.fill_(2.0)
    old, now = policy.predict(x, 2, conditioning, role="old").x0, policy.predict(x, 2, conditioning).x0
    assert torch.equal(policy.predict(x, 2, conditioning, role="reference").x0, at_start)
    torch.testing.assert_close(now - at_start, 2 * (old - at_start))
    assert policy.has_role("policy")
    assert not policy.predict(x, 2, conditioning, role="old").x0.requires_grad
    assert now.requires_grad


def test_audio_carries_latents_without_loss():
    latents = 10 * torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))
    media = make().decode(latents)
    assert [m.kind for m in media] == ["audio", "audio"]
    assert torch.equal(torch.stack([m.data for m in media]), latents)


def test_images_are_uint8():
    policy = GaussianPolicy(GaussianWorld(torch.zeros(3, 2, 2), 0.1), SCHEDULE, media="image")
    (image,) = policy.decode(torch.tensor([-1.0, 0.0, 3.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2))
    assert image.data.dtype == torch.uint8
    assert image.data[:, 0, 0].tolist() == [0, 128, 255]


def test_refusals():
    with pytest.raises(ValueError, match=r"needs a world of shape \(3, H, W\)"):
        make(media="image")
    with pytest.raises(ValueError, match="2 states need as many conditioning rows, got 1"):
        make().predict(torch.zeros(2, 1, 3), 0, make().encode([Prompt("a")]))


@pytest.mark.parametrize("steps", [tuple(range(9)), (2, 3, 4)])
def test_the_policy_gradient_vanishes_exactly_at_the_shared_optimum(steps):
    """On-policy GRPO with leave-one-out advantages and the exact per-step KL: 20,000 samples, seed 0, five standard errors."""
    slope, beta, num_samples = 0.8, 0.5, 20_000
    policy, dynamics, levels = make(), Mixed(FlowSDE(), steps), SCHEDULE.levels
    optimum = shift_response(GaussianWorld(MEAN, 0.25), dynamics, levels).shared_optimum(slope, beta)
    gradients = []
    for shift in (optimum, torch.zeros_like(optimum)):
        generator = torch.Generator().manual_seed(0)
        policy.shift.data.copy_(shift)
        conditioning = policy.encode([Prompt("a")]).select([0] * num_samples)
        x = torch.randn(num_samples, 1, 3, generator=generator, dtype=torch.float64)
        score, kl = torch.zeros(num_samples, dtype=torch.float64), torch.zeros(num_samples, dtype=torch.float64)
        for i in range(10):
            step = dynamics.transition(levels, i)
            mean = transition_mean(policy.predict(x, i, conditioning), step)
            x_next = (mean + step.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)).detach()
            if step.std > 0:
                score = score + log_prob(x_next, mean, step.std)
                reference = transition_mean(policy.predict(x, i, conditioning, role="reference"), step)
                kl = kl + kl_divergence(mean, reference, step.std)
            x = x_next
        reward, group = slope * x.sum((1, 2)), torch.arange(num_samples) // 10
        rule = AdvantageRule(centre="leave_one_out", scale="none", clip=None)
        advantage = group_advantages(reward, torch.ones(num_samples, dtype=torch.bool), group, rule).advantage
        (gradient,) = torch.autograd.grad((beta * kl - advantage * score).mean(), policy.shift)
        gradients.append(gradient)
    response = shift_response(GaussianWorld(MEAN, 0.25), dynamics, levels)
    # Var(A d score) is about Var(A) times the Fisher information, which is the summed cost; 3 elements contribute to the reward.
    error = (advantage.var() * response.cost.sum(0) / num_samples).sqrt()
    assert (gradients[0].abs() < 5 * error).all()
    expected = -slope * response.gain[response.stochastic].sum(0)
    assert ((gradients[1] - expected).abs() < 5 * error).all()
    assert (expected.abs() > 20 * error).all()
