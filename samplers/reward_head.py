"""Reward heads (`visalign.nn.reward_head`) learned from preferences between clean latents, and as guidance.

Both samples of a pair are noised to the same level, each with noise of its own, and Bradley-Terry with ties is fitted to the difference
of their rewards. Noise of its own is what makes the reward noise-aware: with one noise for both, the difference of the noisy states is
the difference of the clean ones, and the head would be as sure in pure noise as on data.

Source: Flow-NRG and its VideoReward, arXiv:2501.13918 (k = 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.maths.preference_models import bradley_terry_ties
from visalign.nn.reward_head import RewardHead
from visalign.protocols import TrainingTimes
from visalign.samplers.policy import PipelinePolicy
from visalign.types import NoiseLevel, Prompt

Embed = Callable[[Sequence[Prompt]], Tensor]


@dataclass(frozen=True)
class HeadReward:
    """A reward head as `visalign.samplers.guidance.GuidanceReward`: it reads the state, never the denoiser."""

    head: RewardHead
    embed: Embed | None = None
    through_denoiser: bool = False

    def __call__(self, x: Tensor, x0: Tensor, level: NoiseLevel, prompts: Sequence[Prompt]) -> Tensor:
        alpha, sigma = (torch.full((x.shape[0],), value, device=x.device) for value in (level.alpha, level.sigma))
        return self.head(x, alpha, sigma, None if self.embed is None else self.embed(prompts))


def pooled_prompts(policy: PipelinePolicy) -> Embed:
    """Embeddings (B, D) of prompts: every text tensor that the denoiser is given for the conditional prediction, averaged over its tokens.

    D is the same under every guidance scale, so that a head trained without guidance can serve with it.
    """
    plan = policy.capture.plans[0]
    row = max(range(len(plan.combination.weights)), key=plan.combination.weights.__getitem__)
    site = plan.row_sites[row]
    copy = plan.row_sites[:row].count(site)

    def embed(prompts: Sequence[Prompt]) -> Tensor:
        found = []
        for prompt in policy.encode(prompts).prompts:
            rows = [values[copy] for values in prompt.rows[site].values()]
            texts = [value.float().flatten(0, -2).mean(dim=0) if value.ndim > 1 else value.float()
                     for value in rows if isinstance(value, Tensor) and value.is_floating_point() and value.ndim]
            found.append(torch.cat(texts))
        return torch.stack(found)

    return embed


def pair_loss(head: RewardHead, first: Tensor, second: Tensor, outcome: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor,
              prompt: Tensor | None = None, k: float = 5.0) -> Tensor:
    """``-log P(outcome)`` of each pair under Bradley-Terry with ties, (n,).

    Args:
        first, second: clean latents (n, *latent_shape).
        outcome: (n,), 1 where the first is preferred, 0 where the second is, 0.5 for a tie.
        alpha, sigma: (n,), one level per pair.
        noise: (2, n, *latent_shape), each sample's own.
        prompt: (n, prompt_dim).
    Raises:
        ValueError: another outcome.
    """
    if not bool(torch.isin(outcome, torch.tensor([0.0, 0.5, 1.0], dtype=outcome.dtype, device=outcome.device)).all()):
        raise ValueError("outcomes are 1 (first preferred), 0 (second preferred) or 0.5 (tie)")
    both = torch.stack([first, second])
    levels = [level.to(both.device, torch.float32).reshape(1, -1, *[1] * (first.ndim - 1)) for level in (alpha, sigma)]
    noisy = (levels[0] * both + levels[1] * noise.to(both)).flatten(0, 1)
    rewards = head(noisy, alpha.repeat(2), sigma.repeat(2), None if prompt is None else prompt.repeat(2, 1)).unflatten(0, (2, -1))
    log_prob = bradley_terry_ties(rewards[0] - rewards[1], k)
    return -torch.where(outcome == 1, log_prob.first, torch.where(outcome == 0, log_prob.second, log_prob.tie))


def fit_reward_head(head: RewardHead, first: Tensor, second: Tensor, outcome: Tensor, times: TrainingTimes,
                    prompt: Tensor | None = None, *, num_steps: int = 1000, batch_size: int = 128, learning_rate: float = 1e-3,
                    k: float = 5.0, seed: int = 0) -> list[float]:
    """Train the head on pairs noised to levels uniform over the denoiser's training range; returns the loss of every step.

    Args as in `pair_loss`; AdamW with weight decay 0.01, and a learning rate that falls to 0 along a cosine.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(head.parameters()).device
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
    losses = []
    for _ in range(num_steps):
        rows = torch.randint(len(first), (batch_size,), generator=generator)
        alpha, sigma = times.level(times.timestep(torch.rand(batch_size, generator=generator)))
        noise = torch.randn(2, batch_size, *first.shape[1:], generator=generator)
        loss = pair_loss(head, first[rows].to(device), second[rows].to(device), outcome[rows].to(device), alpha.to(device),
                         sigma.to(device), noise, None if prompt is None else prompt[rows].to(device), k).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses
