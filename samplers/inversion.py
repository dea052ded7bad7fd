"""Which noise leads to this sample? DDIM inversion with ReNoise, per row, up to exactly the timestep that is asked for.

Write a state as ``x = alpha x0 + sigma noise`` with the known clean sample ``x0``. The sampler's deterministic step from level a up to
level b, ``x_b = alpha_b x0_pred + sigma_b x1_pred`` for flow, epsilon and v models alike, then moves the noise alone:

    noise_b = (1 - r) x1_pred + r noise_a,    r = (sigma_a / alpha_a) / (sigma_b / alpha_b)

so ``x_b = alpha_b x0 + sigma_b noise_b`` holds by construction, without dividing by a small sigma. ReNoise corrects a step: the
prediction becomes the mean of that at the source and that at the destination just found, each asked at its own timestep. Published code
ends at a level of its grid that is not the sampled timestep, and asks about the destination at the source's timestep.

Sources: DDIM, arXiv:2010.02502; ReNoise, arXiv:2403.14602; SmPO-Diffusion, arXiv:2506.02698, which trains on these noises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from visalign.maths.renoise import training_fraction
from visalign.protocols import Policy, TrainingTimes
from visalign.types import Prediction

Predict = Callable[[Tensor, Tensor], Prediction]


@dataclass(frozen=True)
class Inversion:
    """From clean samples to the noise that the current policy would denoise into them.

    Attributes:
        num_steps: network steps between data and each row's own timestep; SmPO's paper takes 9.
        renoise: corrections per step, one network call each. 1 is SmPO's and makes the inversion second order; more approach the
            implicit trapezoidal rule.
    Raises:
        ValueError: no step, or a negative number of corrections.
    """

    num_steps: int = 9
    renoise: int = 1

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.renoise < 0:
            raise ValueError(f"an inversion needs num_steps >= 1 and renoise >= 0, got {self.num_steps} and {self.renoise}")

    @torch.no_grad()
    def __call__(self, policy: Policy, x0: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        """Noise such that ``alpha x0 + sigma noise`` is the policy's own state at ``timesteps`` on the way to ``x0``.

        Args:
            policy: asked in the role "policy", as it is now. Guidance is whatever it was captured with; give one without
                (``guidance_scale=1``): the inverse of a guided step is unstable.
            x0: clean latents (n, ...).
            timesteps: float64 (n,), the scheduler's own, any of the training range and one per row.
            conditioning: n rows of what ``policy.encode`` returned.
        Returns:
            Noise (n, ...), float32 or the wider type of x0.
        Raises:
            ValueError: not one timestep per sample, or one outside the training range.
        """
        if timesteps.shape != x0.shape[:1]:
            raise ValueError(f"inversion takes one timestep per sample, got timesteps {tuple(timesteps.shape)} for {x0.shape[0]} samples")
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))

        def predict(x: Tensor, at: Tensor) -> Prediction:
            return policy.predict_at(x, at, conditioning, "policy")

        grid = inversion_grid(policy.times, timesteps, self.num_steps)
        noise: Tensor | None = None
        for source, target in pairwise(grid):
            noise = carry_noise(predict, policy.times, x0, noise, source, target, self.renoise)
        assert noise is not None
        return noise


def inversion_grid(times: TrainingTimes, timesteps: Tensor, num_steps: int) -> Tensor:
    """``num_steps + 1`` timesteps per row, float64 (num_steps + 1, n): evenly from the lowest up to exactly ``timesteps`` (n,).

    Between the ends they are timesteps the network was trained on (entries of its table, where it has one).
    """
    last, fraction = timesteps.detach().to("cpu", torch.float64), training_fraction(times, timesteps)
    inner = [times.timestep(fraction * step / num_steps).minimum(last) for step in range(num_steps)]
    return torch.stack([*inner, last])


def carry_noise(predict: Predict, times: TrainingTimes, x0: Tensor, noise: Tensor | None, source: Tensor, target: Tensor,
                renoise: int) -> Tensor:
    """One inversion step of ``x = alpha x0 + sigma noise``: the noise at ``target``, (n, ...).

    A correction averages what the process' sampler holds constant over a step: the velocity for flow, the noise otherwise.

    Args:
        predict: the network's answer to states (n, ...) at timesteps (n,).
        noise: at ``source``; ``None``: the source is the clean sample as it is, and the network says which noise it sees in it.
        source, target: timesteps (n,), float64.
        renoise: how often to correct.
    """
    flow = times.process == "flow"
    (alpha_a, sigma_a), (alpha_b, sigma_b) = ([_rows(level, x0) for level in times.level(at)] for at in (source, target))
    # At the lowest flow timestep the target has no noise either: any noise is right, and the network's is as good.
    kept = torch.where(sigma_b > 0, alpha_b * sigma_a / (alpha_a * sigma_b), 0.0)

    def held(x: Tensor, at: Tensor) -> Tensor:
        prediction = predict(x, at)
        return prediction.velocity if flow else prediction.x1

    def noise_of(value: Tensor) -> Tensor:
        return x_a + alpha_a * value if flow else value

    x_a = alpha_a * x0 if noise is None else alpha_a * x0 + sigma_a * noise
    at_source = held(x_a, source)
    noise_a = noise_of(at_source) if noise is None else noise
    result = (1 - kept) * noise_of(at_source) + kept * noise_a
    for _ in range(renoise):
        mean = (at_source + held(alpha_b * x0 + sigma_b * result, target)) / 2
        result = (1 - kept) * noise_of(mean) + kept * noise_a
    return result


def _rows(level: Tensor, like: Tensor) -> Tensor:
    """(n,) to (n, 1, ..., 1), where ``like`` (n, ...) is and in its precision."""
    return level.to(like).reshape(-1, *[1] * (like.dim() - 1))
