"""A world in which everything is known: Gaussian data, the exact denoiser, exact propagation, the exact aligned optimum.

Data are ``N(mean, var)`` element by element, so the denoiser's answer is affine in ``x``:

    V       = alpha^2 var + sigma^2
    x0_pred = E[x0 | x] = mean + alpha var / V (x - alpha mean)
    x1_pred = E[x1 | x] = sigma / V (x - alpha mean)

and a sampler keeps Gaussians Gaussian. For the reward ``a . x0`` the optimum of ``E[reward] - beta KL(p || data)`` is the same
Gaussian with its mean moved by ``var a / beta``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.maths.gaussian import transition_mean
from visalign.protocols import Dynamics
from visalign.types import NoiseLevel, Prediction


@dataclass(frozen=True)
class Moments:
    """Mean and variance per element, float64, any shape."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class GaussianWorld:
    """Data ``N(mean, var)``, independent elements.

    Attributes:
        mean: floats or a tensor of the latent's shape (or one that broadcasts with states).
        var: > 0, or 0 for data that are one point.
    """

    mean: float | Tensor
    var: float | Tensor

    def __post_init__(self) -> None:
        if bool((torch.as_tensor(self.var) < 0).any()):
            raise ValueError(f"a variance cannot be negative, got {self.var}")

    def marginal(self, level: NoiseLevel) -> Moments:
        """Exact moments of ``x`` at a noise level: ``alpha mean`` and ``alpha^2 var + sigma^2``."""
        mean, var = torch.as_tensor(self.mean, dtype=torch.float64), torch.as_tensor(self.var, dtype=torch.float64)
        return Moments(mean=level.alpha * mean, var=level.alpha**2 * var + level.sigma**2)

    def predict(self, x: Tensor, level: NoiseLevel) -> Prediction:
        """What a perfect network answers for ``x`` (B, ...) at ``level``: the posterior means of both end points.

        Raises:
            ValueError: zero variance at sigma = 0, where ``x`` carries no information.
        """
        return self.predict_at(x, level.alpha, level.sigma)

    def predict_at(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Prediction:
        """As ``predict``, with levels that broadcast against ``x``."""
        total = alpha**2 * self.var + sigma**2
        if bool((torch.as_tensor(total) == 0).any()):
            raise ValueError("the posterior is undefined for data of zero variance at sigma = 0; give the world a variance")
        centred = x - alpha * self.mean
        return Prediction(x0=self.mean + alpha * self.var / total * centred, x1=sigma / total * centred)

    def tilted(self, slope: float | Tensor, beta: float) -> GaussianWorld:
        """The optimum of ``E[slope . x0] - beta KL(p || data)``: the density times ``exp(slope . x0 / beta)``.

        Raises:
            ValueError: ``beta`` is not positive (the optimum is at infinity).
        """
        if beta <= 0:
            raise ValueError(f"beta must be > 0, got {beta}: without a KL term a linear reward has no optimum")
        return GaussianWorld(mean=self.mean + self.var * slope / beta, var=self.var)


def propagate(world: GaussianWorld, dynamics: Dynamics, levels: Sequence[NoiseLevel], start: Moments | None = None) -> Moments:
    """Exact moments after sampling with the perfect network, no Monte Carlo.

        mean' = A x0_pred(mean) + B x1_pred(mean),    var' = slope^2 var + std^2

    Args:
        world, dynamics: what is sampled, and how.
        levels: T + 1 noise levels.
        start: moments at ``levels[0]``; ``None`` means the exact marginal there (for a flow at sigma = 1: the unit Gaussian).
    """
    state = start or world.marginal(levels[0])
    for index, level in enumerate(levels[:-1]):
        transition = dynamics.transition(levels, index)
        mean = transition_mean(world.predict(state.mean, level), transition)
        slope = transition_mean(world.predict(state.mean + 1, level), transition) - mean
        state = Moments(mean=mean, var=slope.square() * state.var + transition.std**2)
    return state


def simulate(
    world: GaussianWorld, dynamics: Dynamics, levels: Sequence[NoiseLevel], num_samples: int, generator: torch.Generator
) -> Tensor:
    """Samples of the same sampler, float64, (num_samples, *latent shape); starts from the exact marginal."""
    start = world.marginal(levels[0])
    shape = (num_samples, *torch.broadcast_shapes(start.mean.shape, start.var.shape))
    x = start.mean + start.var.sqrt() * torch.randn(shape, generator=generator, dtype=torch.float64)
    for index, level in enumerate(levels[:-1]):
        transition = dynamics.transition(levels, index)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = transition_mean(world.predict(x, level), transition) + transition.std * noise
    return x


@dataclass(frozen=True)
class ShiftResponse:
    """What believing in a shifted data mean does, step by step; all float64, (T, *latent shape).

    Attributes:
        gain: d(final mean) / d(shift believed at step i).
        cost: d^2(KL of step i, nats) / d(shift)^2, so the KL of a shift is ``cost shift^2 / 2``; 0 on deterministic steps.
        stochastic: bool (T,), the steps a policy gradient can see.
    """

    gain: Tensor
    cost: Tensor
    stochastic: Tensor

    def per_step_optimum(self, slope: float | Tensor, beta: float) -> Tensor:
        """Shift per step that maximises ``E[slope . x_final] - beta sum_i KL_i`` over the stochastic steps; 0 elsewhere."""
        safe = torch.where(self.cost > 0, self.cost, torch.ones_like(self.cost))
        return torch.where(self.cost > 0, slope * self.gain / (beta * safe), torch.zeros_like(self.gain))

    def shared_optimum(self, slope: float | Tensor, beta: float) -> Tensor:
        """The one shift for all steps at which the policy gradient (stochastic steps only) and the KL gradient cancel."""
        return slope * self.gain[self.stochastic].sum(0) / (beta * self.cost.sum(0))


def shift_response(world: GaussianWorld, dynamics: Dynamics, levels: Sequence[NoiseLevel]) -> ShiftResponse:
    """Linear response of a sampler to a network that believes the data mean is ``mean + shift``.

    A shift moves ``x0_pred`` by ``sigma^2 / V`` and ``x1_pred`` by ``-alpha sigma / V`` times itself, whatever ``x`` is. So the
    step's KL does not depend on ``x``, and policy-gradient methods with an exact per-step KL have a closed-form fixed point. It
    equals the tilted optimum ``var a / beta`` in the limit of small steps if the path is memoryless (DDIM with eta 1, FlowSDE with
    noise sqrt(2)).
    Source: Adjoint Matching, arXiv:2409.08861 (why the path must be memoryless).
    """
    var = torch.as_tensor(world.var, dtype=torch.float64) + torch.as_tensor(world.mean, dtype=torch.float64) * 0
    zero = torch.zeros_like(var)
    moves, slopes, costs, stochastic = [], [], [], []
    for index, level in enumerate(levels[:-1]):
        transition = dynamics.transition(levels, index)
        total = level.alpha**2 * var + level.sigma**2
        move = (transition.A * level.sigma**2 - transition.B * level.alpha * level.sigma) / total
        moves.append(move)
        slopes.append((transition.A * level.alpha * var + transition.B * level.sigma) / total)
        costs.append(move.square() / transition.std**2 if transition.std > 0 else zero)
        stochastic.append(transition.std > 0)
    gains, carried = [], zero + 1
    for move, slope in zip(reversed(moves), reversed(slopes), strict=True):
        gains.append(carried * move)
        carried = carried * slope
    return ShiftResponse(gain=torch.stack(gains[::-1]), cost=torch.stack(costs), stochastic=torch.tensor(stochastic))
