"""The noise schedules that published recipes use, as plain float64 numbers, and the noise levels they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from visalign.types import NoiseLevel, Schedule


def shift_sigma(sigma: float, shift: float) -> float:
    """``shift s / (1 + (shift - 1) s)``: the static resolution shift. Source: Stable Diffusion 3, arXiv:2403.03206, eq. 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def static_shift_sigmas(num_steps: int, shift: float, num_train_timesteps: int = 1000) -> tuple[float, ...]:
    """The schedule diffusers' FlowMatchEulerDiscreteScheduler really visits, ``num_steps + 1`` sigmas from 1 to 0.

    It shifts twice: the constructor shifts the training sigmas (the smallest becomes ``sigma_min``), and ``set_timesteps`` shifts
    ``linspace(1, sigma_min, num_steps)`` again.
    """
    sigma_min = shift_sigma(1 / num_train_timesteps, shift)
    return (*(shift_sigma(sigma, shift) for sigma in _linspace(1.0, sigma_min, num_steps)), 0.0)


def dance_sigmas(num_steps: int, shift: float) -> tuple[float, ...]:
    """``linspace(1, 0, num_steps + 1)`` shifted once. Source: DanceGRPO, arXiv:2505.07818; MixGRPO and Pref-GRPO use it too."""
    return tuple(shift_sigma(sigma, shift) for sigma in _linspace(1.0, 0.0, num_steps + 1))


def flux_mu(image_seq_len: int) -> float:
    """FLUX's resolution-dependent shift: linear from 0.5 at 256 image tokens to 1.15 at 4096."""
    return 0.5 + (image_seq_len - 256) * (1.15 - 0.5) / (4096 - 256)


def exponential_shift_sigmas(num_steps: int, mu: float) -> tuple[float, ...]:
    """``e^mu / (e^mu + 1/s - 1)`` of ``linspace(1, 1/num_steps, num_steps)``, then 0: FLUX in diffusers."""
    return (*(math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in _linspace(1.0, 1 / num_steps, num_steps)), 0.0)


def karras_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> tuple[float, ...]:
    """EDM's levels, ``num_steps`` from ``sigma_max`` to ``sigma_min``, then 0. Source: EDM, arXiv:2206.00364, eq. 5."""
    return (*(r**rho for r in _linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps)), 0.0)


def scaled_linear_alphas_cumprod(
    num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> tuple[float, ...]:
    """``prod (1 - beta_i)`` with sqrt(beta) linear: Stable Diffusion 1 and 2. Source: latent diffusion, arXiv:2112.10752."""
    product, result = 1.0, []
    for root in _linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps):
        product *= 1 - root * root
        result.append(product)
    return tuple(result)


def flow_levels(sigmas: Sequence[float]) -> tuple[NoiseLevel, ...]:
    """Rectified flow: ``alpha = 1 - sigma``."""
    return tuple(NoiseLevel(alpha=1 - sigma, sigma=sigma) for sigma in sigmas)


def vp_levels(alphas_cumprod: Sequence[float]) -> tuple[NoiseLevel, ...]:
    """Variance preserving: ``alpha = sqrt(ab)``, ``sigma = sqrt(1 - ab)``."""
    return tuple(NoiseLevel(alpha=math.sqrt(ab), sigma=math.sqrt(1 - ab)) for ab in alphas_cumprod)


def edm_levels(sigmas: Sequence[float]) -> tuple[NoiseLevel, ...]:
    """Variance exploding: ``alpha = 1``."""
    return tuple(NoiseLevel(alpha=1.0, sigma=sigma) for sigma in sigmas)


def flow_schedule(sigmas: Sequence[float]) -> Schedule:
    """A flow model's schedule with diffusers' timesteps, ``1000 sigma``."""
    return Schedule(levels=flow_levels(sigmas), timesteps=tuple(1000 * sigma for sigma in sigmas[:-1]))


def _linspace(start: float, end: float, num: int) -> tuple[float, ...]:
    if num < 1:
        raise ValueError(f"a schedule needs at least one step, got {num}")
    return tuple(start + (end - start) * i / (num - 1) if num > 1 else start for i in range(num))
