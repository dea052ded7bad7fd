"""Which noise levels a loss on clean samples visits, and the noise it adds.

Diffusion-DPO's family learns from clean latents: noise them, ask the denoiser, compare with the truth. Here is how often which level is
visited; everything is drawn from the samples' global index, so that neither micro-batches nor processes change a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visalign.maths.seeds import derive_seed
from visalign.protocols import Policy

TIME, NOISE = 0, 1  # what a seed is for: derive_seed(seed, index, draw, TIME) or (..., NOISE)


@dataclass(frozen=True)
class Times:
    """A distribution over the training range, as fractions ``u`` in [0, 1]: 0 is data, 1 is noise (flow: ``u`` is sigma).

        uniform        u ~ U(low, high)
        logit_normal   u = sigmoid(mean + std n), n ~ N(0, 1)         arXiv:2403.03206; mean = 1 leans to noise (DSO, arXiv:2503.22677)
        grid           one of the sampler's own steps, the last ``skip_last`` and first ``skip_first`` left out

    ``shift`` moves mass to noise like the flow schedulers do: ``u -> shift u / (1 + (shift - 1) u)``. Several draws per sample are
    stratified (a grid: without replacement), which lowers the variance and changes no expectation.
    """

    name: Literal["uniform", "logit_normal", "grid"] = "uniform"
    low: float = 0.0
    high: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    skip_first: int = 0
    skip_last: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("uniform", "logit_normal", "grid"):
            raise ValueError(f"unknown times {self.name!r}; use uniform, logit_normal or grid")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"times: 0 <= low < high <= 1, got low {self.low} and high {self.high}")
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"times: std and shift must be positive, got {self.std} and {self.shift}")
        if self.skip_first < 0 or self.skip_last < 0:
            raise ValueError(f"times: skip_first and skip_last must not be negative, got {self.skip_first} and {self.skip_last}")

    def draw(self, policy: Policy, seeds: Sequence[int], num_draws: int) -> Tensor:
        """The scheduler's timesteps, float64 (len(seeds), num_draws); row k depends on ``seeds[k]`` alone.

        Raises:
            ValueError: a grid with fewer steps than draws.
        """
        if not seeds:
            return torch.empty(0, num_draws, dtype=torch.float64)
        if self.name == "grid":
            return self._grid(policy, seeds, num_draws)
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            uniform = (torch.arange(num_draws) + torch.rand(num_draws, generator=generator, dtype=torch.float64)) / num_draws
            rows.append(uniform[torch.randperm(num_draws, generator=generator)])
        quantile = torch.stack(rows)
        if self.name == "uniform":
            fraction = self.low + (self.high - self.low) * quantile
        else:
            normal = torch.special.ndtri(quantile.clamp(1e-9, 1 - 1e-9))
            fraction = torch.sigmoid(self.mean + self.std * normal).clamp(self.low, self.high)
        return policy.times.timestep(self.shift * fraction / (1 + (self.shift - 1) * fraction))

    def _grid(self, policy: Policy, seeds: Sequence[int], num_draws: int) -> Tensor:
        visited = policy.schedule.timesteps
        allowed = torch.tensor(visited[self.skip_first: len(visited) - self.skip_last], dtype=torch.float64)
        if num_draws > len(allowed):
            raise ValueError(f"times: the schedule has {len(visited)} steps, {len(allowed)} without those left out, but {num_draws} draws "
                             "per sample are asked for; use fewer draws, more num_inference_steps, or times: uniform")
        orders = [torch.randperm(len(allowed), generator=torch.Generator().manual_seed(seed))[:num_draws] for seed in seeds]
        return allowed[torch.stack(orders)]


@dataclass(frozen=True)
class Noised:
    """Clean latents at their noise levels.

    Attributes:
        x0, noise: float32 (n, ...), end points.
        x: ``alpha x0 + sigma noise``.
        timesteps: float64 (n,), the scheduler's unit.
        alpha, sigma: float32 (n,).
    """

    x0: Tensor
    noise: Tensor
    x: Tensor
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor


def add_noise(policy: Policy, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
    """``x = alpha x0 + sigma noise`` at the policy's levels; ``x0`` and ``noise`` (n, ...), ``timesteps`` (n,)."""
    alpha, sigma = (level.float().to(x0.device) for level in policy.times.level(timesteps))
    a, s = (level.reshape(-1, *[1] * (x0.dim() - 1)) for level in (alpha, sigma))
    return Noised(x0=x0, noise=noise, x=a * x0 + s * noise, timesteps=timesteps, alpha=alpha, sigma=sigma)


def gaussian_noise(seeds: Sequence[int], like: Tensor) -> Tensor:
    """N(0, I) shaped and placed like ``like`` (n, ...): row k depends on ``seeds[k]`` alone, on every kind of device."""
    drawn = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(like.device)


def draw_seeds(seed: int, index: Sequence[int], draw: int, purpose: int) -> list[int]:
    """One seed per global index; samples of one group that share a draw pass the same index."""
    return [derive_seed(seed, one, draw, purpose) for one in index]
