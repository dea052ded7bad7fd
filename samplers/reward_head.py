"""A small reward of noisy latents, r(x, level, prompt), learned from preferences between clean ones.

Both samples of a pair are noised to the same level, each with noise of its own, and Bradley-Terry with ties is fitted to the difference
of their rewards. Noise of its own is what makes the reward noise-aware: with one noise for both, the difference of the noisy states is
the difference of the clean ones, and the head would be as sure in pure noise as on data.

The head sees ``x / sqrt(alpha^2 + sigma^2)`` and ``s = sigma / (alpha + sigma)``, the same for every process, so a head trained on the
levels of one scheduler can guide under another. Published heads sit on the first blocks of the video transformer; this one is a network
of its own, which needs no denoiser in its gradient.
Source: Flow-NRG and its VideoReward, arXiv:2501.13918 (k = 5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d, silu

from visalign.maths.preference_models import bradley_terry_ties
from visalign.protocols import TrainingTimes
from visalign.samplers.policy import PipelinePolicy
from visalign.types import NoiseLevel, Prompt

Embed = Callable[[Sequence[Prompt]], Tensor]

_CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOL = {1: adaptive_avg_pool1d, 2: adaptive_avg_pool2d, 3: adaptive_avg_pool3d}


class RewardHead(nn.Module):
    """Strided convolutions, modulated by level and prompt, pooled to a coarse grid: positions still matter.

    Args:
        latent_shape: of one sample: (C, length), (C, H, W), (C, frames, H, W), or any other with ``channel_axis``.
        channel_axis: which axis of it holds channels; 1 for packed latents (tokens, C).
        prompt_dim: length of the prompt's embedding, 0 without.
        width, depth: channels and number of convolutions, each of which halves the resolution.
        grid: cells per axis that are kept apart at the end.
    Raises:
        ValueError: a shape without one channel axis and one to three others.
    """

    def __init__(self, latent_shape: Sequence[int], channel_axis: int = 0, prompt_dim: int = 0, width: int = 64, depth: int = 2,
                 grid: int = 4) -> None:
        super().__init__()
        self._arguments = {"latent_shape": list(latent_shape), "channel_axis": channel_axis, "prompt_dim": prompt_dim, "width": width,
                           "depth": depth, "grid": grid}
        self.latent_shape, self.channel_axis, self.prompt_dim = tuple(latent_shape), channel_axis, prompt_dim
        self.axes, self.grid = len(latent_shape) - 1, grid
        if self.axes not in _CONV or not 0 <= channel_axis <= self.axes:
            raise ValueError(f"a reward head takes latents with one channel axis and one to three others, got shape {tuple(latent_shape)} "
                             f"with channel_axis {channel_axis}")
        conv = _CONV[self.axes]
        channels = [latent_shape[channel_axis], *[width] * depth]
        self.convolutions = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels))
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.prompt = nn.Sequential(nn.LayerNorm(prompt_dim), nn.Linear(prompt_dim, width)) if prompt_dim else None
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.out = nn.Sequential(nn.Linear(width * grid**self.axes, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Rewards (B,) of states x (B, *latent_shape) at levels (B,) each, float32; ``prompt`` is (B, prompt_dim).

        Raises:
            ValueError: latents of another shape, or a prompt embedding where none is taken or of another length.
        """
        if tuple(x.shape[1:]) != self.latent_shape:
            raise ValueError(f"this reward head takes latents {self.latent_shape}, got {tuple(x.shape[1:])}; train one at this resolution")
        if (0 if prompt is None else prompt.shape[-1]) != self.prompt_dim:
            raise ValueError(f"this reward head takes prompt embeddings of length {self.prompt_dim}, got "
                             f"{'none' if prompt is None else prompt.shape[-1]}; embed prompts as in training")
        alpha, sigma = alpha.to(x.device, torch.float32), sigma.to(x.device, torch.float32)
        scale = (alpha.square() + sigma.square()).rsqrt().reshape(-1, *[1] * (x.ndim - 1))
        hidden = (x.float() * scale).movedim(1 + self.channel_axis, 1)
        context = self.level(_features(sigma / (alpha + sigma)))
        if self.prompt is not None and prompt is not None:
            context = context + self.prompt(prompt.to(x.device, torch.float32))
        for convolution, modulation in zip(self.convolutions, self.modulations, strict=True):
            gain, shift = (part.reshape(*part.shape, *[1] * self.axes) for part in modulation(silu(context)).chunk(2, dim=1))
            hidden = silu(convolution(hidden) * (1 + gain) + shift)
        pooled: Tensor = _POOL[self.axes](hidden, self.grid)  # type: ignore[operator]
        return self.out(pooled.flatten(1)).squeeze(-1)

    def save(self, file: Path) -> None:
        """Weights and configuration in one safetensors file."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, file, metadata={"reward_head": json.dumps(self._arguments)})

    @classmethod
    def load(cls, file: Path) -> RewardHead:
        """What `save` wrote.

        Raises:
            ValueError: the file is missing or holds something else.
        """
        try:
            with safe_open(file, framework="pt") as handle:
                arguments = (handle.metadata() or {}).get("reward_head")
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
        if arguments is None:
            raise ValueError(f"{file} holds no reward head; RewardHead.save writes one")
        head = cls(**json.loads(arguments))
        head.load_state_dict(tensors)
        return head.requires_grad_(False).eval()


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


def _features(share: Tensor) -> Tensor:
    """Sines and cosines of the noise share in [0, 1], (B, 16)."""
    angles = share[:, None] * (math.pi * 2.0 ** torch.arange(8, device=share.device) / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
