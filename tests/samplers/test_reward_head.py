"""Noise-aware reward heads: the loss in closed form, what they learn on Gaussian data, and where guiding by them leads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from scripts.tiny_families import by_name
from visalign.maths.oracle import GaussianWorld
from visalign.maths.preference_models import bradley_terry_ties
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.samplers.guidance import GuidanceReward, GuidedPolicy, Tilt
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.reward_head import HeadReward, RewardHead, fit_reward_head, pair_loss, pooled_prompts
from visalign.samplers.rollout import generate
from visalign.types import NoiseLevel, Prompt

SLOPE = torch.tensor([[1.5], [-1.0], [0.0]])  # of latents (3, 1), data N(0, 1)


def policy(num_steps=50):
    return GaussianPolicy(GaussianWorld(torch.zeros(3, 1), 1.0), flow_schedule(dance_sigmas(num_steps, shift=1.0)))


@pytest.fixture(scope="module")
def head():
    """Trained on 4000 pairs labelled by Bradley-Terry with ties, k = 5, of r = SLOPE . x0; seed 0, 3 seconds."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4000, 3, 1, generator=generator)
    log_prob = bradley_terry_ties(((first - second) * SLOPE).sum(dim=(1, 2)))
    drawn = torch.multinomial(torch.stack([log_prob.second, log_prob.tie, log_prob.first], dim=1).exp(), 1, generator=generator)
    head = RewardHead((3, 1), width=16, depth=1, grid=1)
    losses = fit_reward_head(head, first, second, drawn[:, 0] / 2, policy().times, num_steps=600, batch_size=256, learning_rate=1e-2)
    assert sum(losses[-50:]) < 0.95 * sum(losses[:50])
    return head.requires_grad_(False)


def mean_gradient(head, level):
    """Average gradient over states at this level, (3, 1)."""
    x0, noise = torch.randn(2, 500, 3, 1, generator=torch.Generator().manual_seed(1))
    x = (level.alpha * x0 + level.sigma * noise).requires_grad_()
    values = HeadReward(head)(x, x, level, [Prompt("a")] * 500)
    return torch.autograd.grad(values.sum(), x)[0].mean(dim=0)


class Constant(torch.nn.Module):
    """Rewards that do not depend on the noise: 0 for the first half of a batch, -difference for the second."""

    def __init__(self, difference):
        super().__init__()
        self.difference = difference

    def forward(self, x, alpha, sigma, prompt):
        n = x.shape[0] // 2
        return torch.cat([torch.zeros(n), torch.full((n,), -self.difference)])


@pytest.mark.parametrize(("difference", "wins", "ties", "loses"),
                         [(0.0, 1.791759, 0.405465, 1.791759), (2.0, 0.516813, 0.974906, 3.636141)])
def test_the_loss_is_bradley_terry_with_ties(difference, wins, ties, loses):
    """k = 5: P = (1/6, 4/6, 1/6) at 0 and (.596418, .377228, .026354) at 2."""
    x, noise = torch.zeros(3, 3, 1), torch.zeros(2, 3, 3, 1)
    loss = pair_loss(Constant(difference), x, x, torch.tensor([1.0, 0.5, 0.0]), torch.ones(3), torch.zeros(3), noise)
    torch.testing.assert_close(loss, torch.tensor([wins, ties, loses]), atol=1e-4, rtol=0)


def test_swapping_a_pair_swaps_its_outcome():
    torch.manual_seed(0)
    head = RewardHead((3, 5), width=8, prompt_dim=4)
    first, second, prompt, noise = torch.randn(6, 3, 5), torch.randn(6, 3, 5), torch.randn(6, 4), torch.randn(2, 6, 3, 5)
    outcome, alpha = torch.tensor([1.0, 0.5, 0.0] * 2), torch.rand(6)
    one = pair_loss(head, first, second, outcome, alpha, 1 - alpha, noise, prompt)
    torch.testing.assert_close(one, pair_loss(head, second, first, 1 - outcome, alpha, 1 - alpha, noise.flip(0), prompt))


def test_it_learns_the_gradient_of_the_expected_reward_at_every_level(head):
    """grad E[r(x0) | x] = alpha / (alpha^2 + sigma^2) SLOPE for unit data: above SLOPE at middle levels, gone in noise. Within 15 %, with
    the labels' own scale; less at high noise, where the logistic link shrinks it further (24 % at t = 0.8)."""
    for t in (0.05, 0.2, 0.4, 0.6):
        expected = (1 - t) / ((1 - t) ** 2 + t**2) * SLOPE
        assert (mean_gradient(head, NoiseLevel(1 - t, t)) - expected).norm() < 0.15 * expected.norm()
    assert mean_gradient(head, NoiseLevel(0.2, 0.8)).norm() < 0.3 * SLOPE.norm()
    assert mean_gradient(head, NoiseLevel(0.05, 0.95)).norm() < 0.15 * SLOPE.norm()


def test_guiding_by_it_moves_the_gaussian_towards_the_tilted_one(head):
    """exp(r) N(0, 1) has mean SLOPE and variance 1. The logistic link's shrinkage at high noise leaves 0.84 of the shift; 512 samples."""
    prompts, seeds = [Prompt("a")] * 512, list(range(512))
    plain = generate(policy(), prompts, seeds)
    reward: GuidanceReward = HeadReward(head)
    moved = generate(GuidedPolicy(policy(), Tilt([(reward, 1.0)], max_ratio=10.0)), prompts, seeds)
    shift = (moved - plain).mean(dim=0)
    assert torch.cosine_similarity(shift.flatten(), SLOPE.flatten(), dim=0) > 0.98
    assert 0.75 < shift.norm() / SLOPE.norm() < 1.0
    assert ((moved.var(dim=0) - 1).abs() < 0.15).all()


def test_a_level_means_the_same_in_every_process():
    """x at (alpha, sigma) and c x at (c alpha, c sigma) are one state: flow, VP and sigma levels share one head."""
    torch.manual_seed(0)
    head, x, prompts = HeadReward(RewardHead((2, 6, 6), width=8)), torch.randn(3, 2, 6, 6), [Prompt("a")] * 3
    flow = head(x, x, NoiseLevel(0.6, 0.4), prompts)
    for c in (1 / 0.6, (0.6**2 + 0.4**2) ** -0.5):
        torch.testing.assert_close(head(c * x, x, NoiseLevel(0.6 * c, 0.4 * c), prompts), flow, rtol=1e-4, atol=1e-6)


def test_prompts_decide_what_is_preferred():
    """One head, two prompts with opposite preferences: after training each row's gradient follows its own prompt."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1000, 3, 1, generator=generator)
    sign = torch.randint(2, (1000,), generator=generator) * 2.0 - 1
    outcome = (sign * (first - second)[:, 0, 0] > 0).float()
    head = RewardHead((3, 1), width=16, depth=1, grid=1, prompt_dim=2)
    prompt = torch.stack([sign, -sign], dim=1)
    fit_reward_head(head, first, second, outcome, policy().times, prompt, num_steps=300, learning_rate=1e-2)

    def embed(prompts):
        return torch.tensor([[1.0, -1.0] if one.text == "more" else [-1.0, 1.0] for one in prompts])

    x = (0.3 * torch.randn(8, 3, 1, generator=generator)).requires_grad_()
    values = HeadReward(head, embed)(x, x, NoiseLevel(0.9, 0.1), [Prompt("more"), Prompt("less")] * 4)
    slopes = torch.autograd.grad(values.sum(), x)[0][:, 0, 0]
    assert (slopes[0::2] > 0).all()
    assert (slopes[1::2] < 0).all()


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "Stable Diffusion XL", "Wan 2.1"])
def test_prompt_embeddings_are_what_the_denoiser_reads_whatever_the_guidance(name):
    """Token means of the conditional rows: other texts give other embeddings, another guidance scale gives the same ones."""
    family = by_name(name)
    policy = PipelinePolicy.from_pipeline(family.build(), **family.call)
    prompts = [Prompt("a red circle"), Prompt("two blue squares above a very large green triangle"), Prompt("a red circle", negative="bad")]
    found = pooled_prompts(policy)(prompts)
    assert found.shape[0] == 3
    assert not torch.allclose(found[0], found[1], rtol=1e-2)
    torch.testing.assert_close(found[0], found[2])
    unguided = pooled_prompts(policy.with_call(guidance_scale=1.0))(prompts)
    torch.testing.assert_close(unguided, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((4, 7), 0), ((9, 4), 1), ((4, 5, 6), 0), ((3, 4, 5, 6), 1)])
def test_latents_of_audio_packed_images_and_video(tmp_path, shape, axis):
    torch.manual_seed(0)
    head = RewardHead(shape, channel_axis=axis, width=8, prompt_dim=3)
    x, alpha, prompt = torch.randn(2, *shape), torch.rand(2), torch.randn(2, 3)
    head.save(tmp_path / "head.safetensors")
    again = RewardHead.load(tmp_path / "head.safetensors")
    assert torch.equal(again(x, alpha, 1 - alpha, prompt), head(x, alpha, 1 - alpha, prompt))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one channel axis and one to three others"):
        RewardHead((4,))
    head, x = RewardHead((3, 5), width=8), torch.zeros(1, 3, 5)
    with pytest.raises(ValueError, match=r"takes latents \(3, 5\), got \(3, 4\)"):
        head(x[..., :4], torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="length 0, got 2"):
        head(x, torch.ones(1), torch.ones(1), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="outcomes are 1"):
        pair_loss(head, x, x, torch.tensor([0.3]), torch.ones(1), torch.ones(1), torch.zeros(2, 1, 3, 5))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no reward head"):
        RewardHead.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a readable"):
        RewardHead.load(tmp_path / "none.safetensors")
