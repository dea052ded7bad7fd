"""What a denoiser returned at one noise level, before anything is made of it.

A captured network's outputs ``m_k``, its state ``x`` and the gradients ``g_j`` of guiding rewards become the prediction in three steps:

    m         = combination(m_1 .. m_K, x)                                            guidance, `maths.combination`
    x0, x1    = to_prediction(m, x, alpha, sigma, kind)                               `maths.process`
    velocity -= (alpha + sigma) min(sigma / alpha, max_ratio_j) g_j                   for every gradient, `tilted`

Up to the factor of a nonlinear correction each step is linear, so everything a sampler or a loss makes of a prediction (a mean, a velocity,
an error's residual) is one weighted sum of x, m_k and g_j. `visalign.kernels` computes it without the steps in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.maths.combination import Combination
from visalign.maths.process import from_velocity, to_prediction
from visalign.types import NoiseLevel, Prediction, PredictionKind


@dataclass(frozen=True)
class Readout:
    """How a network's outputs are read.

    Attributes:
        combination: of the K outputs.
        kind: what the combined output estimates.
        sigma_data: EDM's standard deviation of the data; read by "edm" only.
    """

    combination: Combination
    kind: PredictionKind
    sigma_data: float = 0.5


@dataclass(frozen=True)
class GradientTerm:
    """Gradient of a weighted reward with respect to x, (B, ...), and the bound of its factor ``sigma / alpha``."""

    gradient: Tensor
    max_ratio: float = math.inf


@dataclass(frozen=True)
class Outputs:
    """K tensors that determine a prediction at one noise level.

    Attributes:
        tensors: each (B, ...); a network's outputs in its own dtype, or (x0_pred, x1_pred) if there is no ``readout``.
        alpha, sigma: the level, floats or one scalar per sample (B,).
        readout: how a network's outputs are read; ``None`` for the end points themselves.
        terms: gradients that tilt the prediction, in this order.
    Raises:
        ValueError: another number of tensors than the readout takes.
    """

    tensors: tuple[Tensor, ...]
    alpha: float | Tensor
    sigma: float | Tensor
    readout: Readout | None = None
    terms: tuple[GradientTerm, ...] = ()

    def __post_init__(self) -> None:
        expected = 2 if self.readout is None else len(self.readout.combination.weights)
        if len(self.tensors) != expected:
            raise ValueError(f"the readout takes {expected} tensors, got {len(self.tensors)}")

    @staticmethod
    def of(prediction: Prediction, alpha: float | Tensor, sigma: float | Tensor) -> Outputs:
        """End points as outputs, for a policy that has no others."""
        return Outputs((prediction.x0, prediction.x1), alpha, sigma)

    def prediction(self, x: Tensor) -> Prediction:
        """End points at state x (B, ...), in float32, or float64 if a tensor is; differentiable.

        Raises:
            ValueError: the level does not determine both end points, or a term's factor is infinite.
        """
        if self.readout is None:
            found = Prediction(x0=self.tensors[0], x1=self.tensors[1])
        else:
            state = _wide(x)
            output = self.readout.combination([_wide(tensor) for tensor in self.tensors], state)
            found = to_prediction(output, state, self.alpha, self.sigma, self.readout.kind, self.readout.sigma_data)
        for term in self.terms:
            if isinstance(self.alpha, Tensor) or isinstance(self.sigma, Tensor):
                raise ValueError("a gradient term belongs to a sampler step, which has one level for all samples, not one per sample")
            found = tilted(found, x, NoiseLevel(self.alpha, self.sigma), term.gradient, term.max_ratio)
        return found

    def detach(self) -> Outputs:
        """The same without gradients."""
        return Outputs(tuple(tensor.detach() for tensor in self.tensors), self.alpha, self.sigma, self.readout, self.terms)


def tilted(prediction: Prediction, x: Tensor, level: NoiseLevel, gradient: Tensor, max_ratio: float = math.inf) -> Prediction:
    """The prediction of the tilted density: ``velocity - (alpha + sigma) min(sigma / alpha, max_ratio) gradient``.

    Args:
        prediction, x: at ``level``, (B, ...).
        gradient: of the weighted reward with respect to x, (B, ...).
    Raises:
        ValueError: an unbounded factor in pure noise (alpha = 0).
    Source: Flow-NRG, arXiv:2501.13918; see `visalign.samplers.guidance`.
    """
    ratio = min(level.sigma / level.alpha, max_ratio) if level.alpha > 0 else max_ratio
    if math.isinf(ratio):
        raise ValueError(f"the factor sigma / alpha of guidance is infinite at sigma {level.sigma:.4g}, alpha 0; give max_ratio, or skip "
                         "the first step (skip_first=1)")
    return from_velocity(prediction.velocity - (level.alpha + level.sigma) * ratio * gradient, x, level.alpha, level.sigma)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
