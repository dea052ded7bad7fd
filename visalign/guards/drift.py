"""How far the policy has moved from its reference, measured on states that the policy itself visits.

    velocity_gap    sqrt( mean |v_policy - v_reference|^2 / mean |v_reference|^2 )          relative, 0 before the first update
    kl_per_dim      sum over steps of (1 - s) / s h |v_policy - v_reference|^2 / D          nats per latent dimension

with ``s = sigma / (alpha + sigma)`` and h its decrease. The KL is that of paths under the memoryless SDE ``g^2 = 2 s / (1 - s)``, in
continuous time (Girsanov) and summed over the run's steps: one ruler for all runs, whatever they sample with. It is taken on the
deterministic path, where evaluations are made too. Source of the SDE: adjoint matching, arXiv:2409.08861.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from visalign.maths.process import flow_coordinates
from visalign.protocols import Policy
from visalign.types import Prompt


@dataclass(frozen=True)
class Drift:
    """Sums over samples and steps, so that the parts of several processes add up.

    Attributes:
        gap, norm: squared norms of the velocity difference and of the reference's velocity.
        kl: nats per latent dimension, summed over samples.
        count: samples.
    """

    gap: float = 0.0
    norm: float = 0.0
    kl: float = 0.0
    count: int = 0

    def __add__(self, other: Drift) -> Drift:
        return Drift(self.gap + other.gap, self.norm + other.norm, self.kl + other.kl, self.count + other.count)

    def metrics(self) -> dict[str, float]:
        """``velocity_gap`` and ``kl_per_dim``; empty without a sample."""
        return {"velocity_gap": (self.gap / self.norm) ** 0.5, "kl_per_dim": self.kl / self.count} if self.count and self.norm else {}


@torch.no_grad()
def measure_drift(policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], *, batch: int,
                  autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Drift:
    """Drift over one deterministic path per prompt and seed; twice the denoiser calls of sampling them.

    Args:
        batch: samples per denoiser call.
    """
    levels, total = policy.schedule.levels, Drift()
    policy.train(False)
    for start in range(0, len(prompts), batch):
        at = slice(start, start + batch)
        x, gap, norm, kl = policy.initial_latents(seeds[at]), 0.0, 0.0, 0.0
        with autocast():
            conditioning = policy.encode(prompts[at])
            for step in range(policy.schedule.num_steps):
                own, other = (policy.predict(x, step, conditioning, role) for role in ("policy", "reference"))
                difference = float((own.velocity - other.velocity).double().square().sum())
                gap, norm = gap + difference, norm + float(other.velocity.double().square().sum())
                here, there = flow_coordinates(levels[step]).s, flow_coordinates(levels[step + 1]).s
                kl += (1 - here) / here * (here - there) * difference / x[0].numel()
                x = levels[step + 1].alpha * own.x0 + levels[step + 1].sigma * own.x1
        total += Drift(gap, norm, kl, len(x))
    return total
