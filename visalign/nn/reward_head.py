"""A small reward of noisy latents, r(x, level, prompt).

The head sees ``x / sqrt(alpha^2 + sigma^2)`` and ``s = sigma / (alpha + sigma)``, the same for every process, so a head trained on the
levels of one scheduler can guide under another. Published heads sit on the first blocks of the video transformer; this one is a network
of its own, which needs no denoiser in its gradient.
Source: Flow-NRG and its VideoReward, arXiv:2501.13918.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d, silu

from visalign.tensorfile import read_tensors

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
    Attributes:
        convention: which latents it was trained on (``protocols.LatentSource``); empty where nobody said. Kept in its file.
    Raises:
        ValueError: a shape without one channel axis and one to three others.
    """

    def __init__(self, latent_shape: Sequence[int], channel_axis: int = 0, prompt_dim: int = 0, width: int = 64, depth: int = 2,
                 grid: int = 4) -> None:
        super().__init__()
        self.convention = ""
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
        """Weights, configuration and ``convention`` in one safetensors file."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, file, metadata={"reward_head": json.dumps(self._arguments), "convention": self.convention})

    @classmethod
    def load(cls, file: Path) -> RewardHead:
        """What `save` wrote.

        Raises:
            ValueError: the file is missing or holds something else.
        """
        tensors, metadata = read_tensors(file)
        if "reward_head" not in metadata:
            raise ValueError(f"{file} holds no reward head; RewardHead.save writes one")
        head = cls(**json.loads(metadata["reward_head"]))
        head.convention = metadata.get("convention", "")
        head.load_state_dict(tensors)
        return head.requires_grad_(False).eval()


def _features(share: Tensor) -> Tensor:
    """Sines and cosines of the noise share in [0, 1], (B, 16)."""
    angles = share[:, None] * (math.pi * 2.0 ** torch.arange(8, device=share.device) / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
