"""Reward guidance: the published formula, the same tilt for every process, and the Gaussian that a linear reward must give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from scripts.tiny_families import by_name
from visalign.maths.gaussian import transition_mean
from visalign.maths.oracle import GaussianWorld
from visalign.maths.outputs import tilted
from visalign.maths.process import to_prediction
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.protocols import DifferentiableReward, Policy, RewardSpec
from visalign.samplers.dynamics import ODE
from visalign.samplers.guidance import GuidedPolicy, MediaReward, Tilt
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import generate
from visalign.types import NoiseLevel, Prompt

A = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
WORLD = GaussianWorld(torch.tensor([[1.5, 0.0, -1.0]], dtype=torch.float64), 0.25)


@dataclass
class Linear:
    """a . media, differentiable."""

    slope: torch.Tensor
    spec: RewardSpec = field(default_factory=lambda: RewardSpec(name="linear", differentiable=True))

    def score_tensor(self, media, prompts):
        return (media * self.slope).flatten(1).sum(dim=1)


@dataclass
class LinearInState:
    """a . x at every noise level."""

    slope: float
    through_denoiser: bool = False

    def __call__(self, x, x0, level, prompts):
        return self.slope * x.flatten(1).sum(dim=1)


def gaussian(num_steps):
    return GaussianPolicy(WORLD, flow_schedule(dance_sigmas(num_steps, shift=1.0)), dtype=torch.float64)


def media_tilt(weight, through_denoiser=True, skip_first=1, max_ratio=math.inf, slope=A):
    reward = MediaReward(Linear(slope), decode=lambda latents, prompts: latents, through_denoiser=through_denoiser)
    return Tilt([(reward, weight)], max_ratio=max_ratio, skip_first=skip_first)


def endpoint(policy, tilt):
    """Mean and slope of the affine map from the first state to the sample."""
    guided = GuidedPolicy(policy, tilt)
    x = torch.stack([torch.zeros(policy.latent_shape), torch.ones(policy.latent_shape)]).double()
    conditioning = guided.encode([Prompt("a"), Prompt("b")])
    for step in range(policy.schedule.num_steps):
        x = transition_mean(guided.predict(x, step, conditioning), ODE().transition(policy.schedule.levels, step))
    return x[0], x[1] - x[0]


@pytest.mark.parametrize(("t", "velocity", "guided", "score"), [(0.5, 0.0, -0.6, -1.4), (0.25, -0.8, -1.0, -1.0)])
def test_flow_velocity_is_the_published_one(t, velocity, guided, score):
    """Prior N(0, 1), r = 2 x, w = 0.3, x = 1: v - w t / (1 - t) grad r, and its score is -x / V + w a."""
    x, level = torch.ones(1, 1, dtype=torch.float64), NoiseLevel(1 - t, t)
    plain = GaussianWorld(0.0, 1.0).predict(x, level)
    new = tilted(plain, x, level, gradient=torch.full_like(x, 0.3 * 2.0))
    assert plain.velocity.item() == pytest.approx(velocity, abs=1e-12)
    assert new.velocity.item() == pytest.approx(guided, abs=1e-12)
    assert -(x + (1 - t) * new.velocity).item() / t == pytest.approx(score, abs=1e-12)


def test_a_guided_policy_takes_the_gradient_itself():
    world = GaussianWorld(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    policy = GaussianPolicy(world, flow_schedule((1.0, 0.5, 0.25)), dtype=torch.float64)
    guided: Policy = GuidedPolicy(policy, Tilt([(LinearInState(2.0), 0.3)]))
    conditioning, x = guided.encode([Prompt("a")]), torch.ones(1, 1, 1, dtype=torch.float64)
    assert guided.predict(x, 1, conditioning).velocity.item() == pytest.approx(-0.6, abs=1e-12)
    two = GuidedPolicy(policy, Tilt([(LinearInState(2.0), 0.2), (LinearInState(-1.0), -0.2)]))
    assert two.predict(x, 1, conditioning).velocity.item() == pytest.approx(-0.6, abs=1e-12)


@pytest.mark.parametrize("level", [NoiseLevel(0.3, 0.7), NoiseLevel(0.6, 0.8), NoiseLevel(0.99, 0.141), NoiseLevel(1.0, 7.0)], ids=str)
def test_the_exact_noise_aware_reward_gives_the_tilted_worlds_prediction(level):
    """For a . x0 and Gaussian data, log E[exp(w a . x0) | x] has the gradient of w a . E[x0 | x], at flow, VP and sigma levels alike."""
    weight, x = 0.7, torch.randn(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(weight * (A * WORLD.predict(state, level).x0).sum(), state)
    new, expected = tilted(WORLD.predict(x, level), x, level, gradient), WORLD.tilted(A, 1 / weight).predict(x, level)
    torch.testing.assert_close(new.x0, expected.x0, atol=1e-12, rtol=0)
    torch.testing.assert_close(new.x1, expected.x1, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_the_shift_is_classifier_guidance_in_epsilon(kind):
    """x1_pred moves by -sigma grad whatever the network's output means, and x = alpha x0 + sigma x1 keeps holding."""
    generator = torch.Generator().manual_seed(1)
    x, output, gradient = (torch.randn(2, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    level = NoiseLevel(0.6, 0.8)
    plain = to_prediction(output, x, level.alpha, level.sigma, kind)
    new = tilted(plain, x, level, gradient)
    torch.testing.assert_close(new.x1, plain.x1 - level.sigma * gradient)
    torch.testing.assert_close(level.alpha * new.x0 + level.sigma * new.x1, x)


def test_guided_sampling_reaches_the_tilted_gaussian_with_first_order():
    """exp(w a . x) N(m, V) = N(m + w V a, V): the error of mean and standard deviation is O(1 / steps), 6e-3 at 200 steps."""
    weight, errors = 0.8, []
    target = WORLD.tilted(A, 1 / weight)
    for num_steps in (100, 200):
        mean, slope = endpoint(gaussian(num_steps), media_tilt(weight))
        errors.append(torch.cat([(mean - target.mean).flatten(), (slope - 0.5).flatten()]).abs().max().item())
    assert errors[1] < 6e-3
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)
    assert (target.mean - torch.as_tensor(WORLD.mean)).abs().max() > 0.3


def test_without_the_denoiser_guidance_overshoots_where_noise_is_high():
    """With d x0 / dx = 1 instead of alpha V / (alpha^2 V + sigma^2), V = 0.25, the mean moves the right way and too far."""
    target, base = WORLD.tilted(A, 1 / 0.8), torch.as_tensor(WORLD.mean)
    mean, _ = endpoint(gaussian(200), media_tilt(0.8, through_denoiser=False))
    assert ((mean - base) / (target.mean - base) > 1.5).all()


def test_limits_hold_guidance_back():
    policy = gaussian(10)
    plain, _ = endpoint(policy, None)
    full, _ = endpoint(policy, media_tilt(0.8))
    for tilt in (media_tilt(0.8, max_ratio=0.5), media_tilt(0.8, skip_first=5)):
        moved, _ = endpoint(policy, tilt)
        assert (((moved - plain) / (full - plain)) < 0.95).all()
        assert (((moved - plain) / (full - plain)) > 0.05).all()
    assert torch.equal(endpoint(policy, media_tilt(0.8, skip_first=10))[0], plain)


def test_zero_weight_changes_no_bit_and_no_weight_gets_a_gradient():
    policy = gaussian(6)
    prompts, seeds = [Prompt("a"), Prompt("b", metadata={"offset": 2.0})], [3, 4]
    assert torch.equal(generate(GuidedPolicy(policy, media_tilt(0.0)), prompts, seeds), generate(policy, prompts, seeds))
    moved = generate(GuidedPolicy(policy, media_tilt(0.5)), prompts, seeds, microbatch=1)
    torch.testing.assert_close(moved, generate(GuidedPolicy(policy, media_tilt(0.5)), prompts, seeds))
    assert (moved - generate(policy, prompts, seeds)).abs().min() > 1e-3
    assert policy.shift.grad is None


@pytest.mark.parametrize("through_denoiser", [True, False])
def test_the_reward_of_decoded_pixels_rises_on_a_real_pipeline(through_denoiser):
    """A tiny SD3 with classifier-free guidance: one guided step raises the reward of the decoded prediction, and the samples' reward."""
    family = by_name("Stable Diffusion 3")
    policy = PipelinePolicy.from_pipeline(family.build(), **family.call)
    policy.roles.add_lora(rank=2)
    reward = Linear(torch.full((3, 1, 1), 1.0))
    assert isinstance(reward, DifferentiableReward)
    tilt = Tilt([(MediaReward(reward, policy.decode_tensor, through_denoiser), 0.02)], max_ratio=2.0)
    prompts, seeds = [Prompt("a red circle"), Prompt("a dog")], [1, 2]
    plain, moved = generate(policy, prompts, seeds), generate(GuidedPolicy(policy, tilt), prompts, seeds)
    with torch.no_grad():
        gain = reward.score_tensor(policy.decode_tensor(moved), prompts) - reward.score_tensor(policy.decode_tensor(plain), prompts)
    assert (gain > 0.1).all()
    assert all(parameter.grad is None for parameter in policy.named_trainable().values())


def test_bad_limits_and_unbounded_factors_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Tilt([])
    with pytest.raises(ValueError, match="finite"):
        media_tilt(math.nan)
    with pytest.raises(ValueError, match="max_ratio > 0 and skip_first >= 0"):
        media_tilt(1.0, max_ratio=0.0)
    with pytest.raises(ValueError, match="skip_first=1"):
        endpoint(gaussian(3), media_tilt(1.0, skip_first=0))
    guided = GuidedPolicy(gaussian(3), media_tilt(1.0))
    with pytest.raises(ValueError, match="without guidance"):
        guided.predict_at(torch.zeros(1, 1, 3), torch.tensor([500.0]), guided.encode([Prompt("a")]))
