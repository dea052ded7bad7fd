"""Ask a policy for what operators take: its network's own outputs where it gives them, its prediction's end points where it does not."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from visalign.maths.outputs import Outputs
from visalign.protocols import Policy
from visalign.types import Role


@runtime_checkable
class GivesOutputs(Protocol):
    """A policy that hands out its network's outputs; ``predict(...)`` is then ``outputs(...).prediction(x)``."""

    def outputs(self, x: Tensor, step: int, conditioning: Any, role: Role = "policy") -> Outputs:
        """As ``Policy.predict``, before anything is made of the outputs."""


@runtime_checkable
class GivesOutputsAt(Protocol):
    """The same at any timesteps; ``predict_at(...)`` is then ``outputs_at(...).prediction(x)``."""

    def outputs_at(self, x: Tensor, timesteps: Tensor, conditioning: Any, role: Role = "policy") -> Outputs:
        """As ``Policy.predict_at``, before anything is made of the outputs."""


def outputs_of(policy: Policy, x: Tensor, step: int, conditioning: Any, role: Role = "policy") -> Outputs:
    """What ``policy.predict`` is made of, for x (B, *latent_shape)."""
    if isinstance(policy, GivesOutputs):
        return policy.outputs(x, step, conditioning, role)
    level = policy.schedule.levels[step]
    return Outputs.of(policy.predict(x, step, conditioning, role), level.alpha, level.sigma)


def outputs_at(policy: Policy, x: Tensor, timesteps: Tensor, conditioning: Any, role: Role = "policy") -> Outputs:
    """What ``policy.predict_at`` is made of; levels float32 (B,), on the CPU."""
    if isinstance(policy, GivesOutputsAt):
        return policy.outputs_at(x, timesteps, conditioning, role)
    alpha, sigma = (level.float().cpu() for level in policy.times.level(timesteps))
    return Outputs.of(policy.predict_at(x, timesteps, conditioning, role), alpha, sigma)
