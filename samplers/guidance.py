"""Guidance by rewards while sampling: every noise level's density is tilted by ``exp(w r)``, no weight is trained.

Tilting ``p_t`` adds ``w grad r`` to its score. With ``score = -x1_pred / sigma`` that is, for any process ``x = alpha x0 + sigma x1``,

    x1_pred -= sigma w grad r,    x0_pred += sigma^2 / alpha w grad r,    velocity -= (alpha + sigma) sigma / alpha w grad r

the last (`maths.outputs.tilted`) with ``t / (1 - t)`` for rectified flow (Flow-NRG) and the first what classifier guidance does to epsilon
(arXiv:2105.05233).

Which reward r(x, t) belongs to a reward r(x0) of clean samples? Exactly ``log E[exp(w r(x0)) | x] / w``. Two approximations are here:
`MediaReward` takes r at the denoised prediction, exact for linear rewards of Gaussian data; `visalign.samplers.reward_head` learns it.
Source: Flow-NRG, arXiv:2501.13918 (derivation for all processes: ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from visalign.kernels.ask import outputs_of
from visalign.maths.outputs import GradientTerm, Outputs
from visalign.maths.process import from_velocity
from visalign.protocols import DifferentiableReward, Policy, TrainingTimes
from visalign.types import Media, NoiseLevel, Prediction, Prompt, Role

Ask = Callable[[Tensor, int, Any, Role], Outputs]


class GuidanceReward(Protocol):
    """A reward of noisy states."""

    @property
    def through_denoiser(self) -> bool:
        """Whether ``x0`` must carry the network's own gradient with respect to ``x``."""

    def __call__(self, x: Tensor, x0: Tensor, level: NoiseLevel, prompts: Sequence[Prompt]) -> Tensor:
        """Values (B,), larger is better, differentiable in the state ``x`` or its denoised prediction ``x0``, both (B, ...)."""


@dataclass(frozen=True)
class MediaReward:
    """A reward of finished media, asked about the decoded prediction of x0.

    Attributes:
        decode: latents (B, ...) and their prompts to media as tensors, such as ``PipelinePolicy.decode_tensor``.
        through_denoiser: differentiate the prediction through the network, which costs a backward pass per step. Without, the velocity
            counts as constant in x, ``d x0 / d x = 1 / (alpha + sigma)``: right at low noise, too strong at high noise.
    """

    reward: DifferentiableReward
    decode: Callable[[Tensor, Sequence[Prompt]], Tensor]
    through_denoiser: bool = False

    def __call__(self, x: Tensor, x0: Tensor, level: NoiseLevel, prompts: Sequence[Prompt]) -> Tensor:
        return self.reward.score_tensor(self.decode(x0, prompts), prompts)


@dataclass(frozen=True)
class Tilt:
    """Rewards with their weights, and where guidance is held back.

    Attributes:
        rewards: (reward, weight) pairs; a weight is in nats per unit of reward, ``1 / beta`` of a KL-regularised objective.
        max_ratio: upper bound of ``sigma / alpha``, the published ``t / (1 - t)``, which is infinite in pure noise.
        skip_first: first steps without guidance.
    Raises:
        ValueError: no reward, or a number out of range.
    """

    rewards: Sequence[tuple[GuidanceReward, float]]
    max_ratio: float = 4.0
    skip_first: int = 0

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("guidance needs at least one (reward, weight)")
        if wrong := [weight for _, weight in self.rewards if not math.isfinite(weight)]:
            raise ValueError(f"guidance weights must be finite, got {wrong}")
        if not self.max_ratio > 0 or self.skip_first < 0:
            raise ValueError(f"guidance needs max_ratio > 0 and skip_first >= 0, got {self.max_ratio} and {self.skip_first}")


@dataclass(frozen=True)
class GuidedConditioning:
    """Encoded prompts together with their texts, which rewards read."""

    rows: Any
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> GuidedConditioning:
        return GuidedConditioning(self.rows.select(rows), tuple(self.prompts[row] for row in rows))


class GuidedPolicy:
    """A policy whose predictions are tilted by rewards: what `rollout.generate` samples. Its conditioning is its own, so updates of
    weights cannot use it.

    Args:
        policy: what samples; none of its weights receives a gradient.
        tilt: rewards, weights, limits; ``None`` changes nothing.
        ask: what stands in the place of the policy's own outputs (`visalign.samplers.negative.ask_against`).
    """

    def __init__(self, policy: Policy, tilt: Tilt | None = None, ask: Ask | None = None) -> None:
        self.policy, self.tilt, self._ask = policy, tilt, ask or partial(outputs_of, policy)
        self.schedule, self.latent_shape, self.device = policy.schedule, policy.latent_shape, policy.device

    def encode(self, prompts: Sequence[Prompt]) -> GuidedConditioning:
        return GuidedConditioning(self.policy.encode(prompts), tuple(prompts))

    def predict(self, x: Tensor, step: int, conditioning: GuidedConditioning, role: Role = "policy") -> Prediction:
        """The tilted prediction for x (B, *latent_shape), without gradients."""
        with torch.no_grad():
            return self.outputs(x, step, conditioning, role).prediction(x)

    def outputs(self, x: Tensor, step: int, conditioning: GuidedConditioning, role: Role = "policy") -> Outputs:
        """The policy's outputs together with the gradient that tilts them."""
        tilt = self.tilt
        if tilt is None or step < tilt.skip_first:
            with torch.no_grad():
                return self._ask(x, step, conditioning.rows, role)
        level = self.schedule.levels[step]
        through = any(reward.through_denoiser for reward, _ in tilt.rewards)
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            with torch.set_grad_enabled(through):
                found = self._ask(state, step, conditioning.rows, role)
                own = found.prediction(state)
            held = from_velocity(own.velocity.detach(), state, level.alpha, level.sigma).x0
            values = [weight * reward(state, own.x0 if reward.through_denoiser else held, level, conditioning.prompts)
                      for reward, weight in tilt.rewards if weight != 0]
            if not values:
                return found.detach()
            (gradient,) = torch.autograd.grad(torch.stack([value.sum().to(x.device) for value in values]).sum(), state)
        return replace(found.detach(), terms=(GradientTerm(gradient, tilt.max_ratio),))

    def predict_at(self, x: Tensor, timesteps: Tensor, conditioning: GuidedConditioning, role: Role = "policy") -> Prediction:
        """Refused: guidance belongs to sampling, losses at other timesteps ask the policy itself."""
        raise ValueError("a guided policy predicts at the steps of its schedule only; give losses the policy without guidance")

    @property
    def times(self) -> TrainingTimes:
        return self.policy.times

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        return self.policy.initial_latents(seeds)

    def decode(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> list[Media]:
        return self.policy.decode(latents, prompts)

    def named_trainable(self) -> Mapping[str, nn.Parameter]:
        return self.policy.named_trainable()

    def has_role(self, role: Role) -> bool:
        return self.policy.has_role(role)

    def snapshot(self, role: Role, values: Mapping[str, Tensor] | None = None) -> None:
        self.policy.snapshot(role, values)

    def snapshots(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self.policy.snapshots()

    def train(self, mode: bool = True) -> None:
        self.policy.train(mode)
