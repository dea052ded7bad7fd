"""The scalars of ``paired_error``: one set per sample, read off the formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from visalign.kernels.formula import END_POINTS
from visalign.maths.combination import Combination
from visalign.maths.outputs import Outputs, Readout
from visalign.maths.process import from_prediction
from visalign.types import Prediction, PredictionKind

# The formula in the arguments of a torch.library operator; see PairFormula.flat.
SCHEMA = "Tensor alpha, Tensor sigma, str kind, float[] weights, float state_weight, float readout_sigma_data, str space, float sigma_data"


@dataclass(frozen=True)
class PairFormula:
    """Errors on noised samples without their tensors.

    Attributes:
        alpha, sigma: (B,), on the CPU best.
        readout: of the outputs, without a nonlinear correction.
        space, sigma_data: in which the error is taken.
    """

    alpha: Tensor
    sigma: Tensor
    readout: Readout | None
    space: PredictionKind
    sigma_data: float

    def outputs(self, tensors: Sequence[Tensor]) -> Outputs:
        """With tensors again."""
        return Outputs(tuple(tensors), self.alpha, self.sigma, self.readout)

    def flat(self) -> tuple[Any, ...]:
        """The arguments that `SCHEMA` names."""
        kind, weights, state_weight, own = END_POINTS, [1.0, 1.0], 0.0, 0.5
        if self.readout is not None:
            how = self.readout.combination
            kind, weights, state_weight, own = self.readout.kind, list(how.weights), how.state_weight, self.readout.sigma_data
        return self.alpha, self.sigma, kind, weights, state_weight, own, self.space, self.sigma_data

    @staticmethod
    def from_flat(alpha: Tensor, sigma: Tensor, kind: Any, weights: Sequence[float], state_weight: float, readout_sigma_data: float,
                  space: Any, sigma_data: float) -> PairFormula:
        readout = None if kind == END_POINTS else Readout(Combination(tuple(weights), state_weight), kind, readout_sigma_data)
        return PairFormula(alpha, sigma, readout, space, sigma_data)


@dataclass(frozen=True)
class PairCoefficients:
    """``f = sum a_k m_k + a_x0 x0 + a_noise noise`` and ``y = b_x0 x0 + b_noise noise``, the state written as x0 and noise.

    Attributes:
        used: the outputs with a weight.
        table: a_k of these, a_x0, a_noise, b_x0, b_noise, float64 (B, len(used) + 4), on the CPU.
        uses_x0, uses_noise: whether any sample needs them.
    """

    used: tuple[int, ...]
    table: Tensor
    uses_x0: bool
    uses_noise: bool


def coefficients(formula: PairFormula) -> PairCoefficients:
    """The formulas at the unit vectors of (m_1 .. m_K, x0, noise); a backward pass finds those of its forward pass again."""
    return _coefficients(*(tuple(level.tolist()) for level in (formula.alpha, formula.sigma)), formula.readout, formula.space,
                         formula.sigma_data)


@lru_cache(maxsize=256)
def _coefficients(alphas: tuple[float, ...], sigmas: tuple[float, ...], readout: Readout | None, space: PredictionKind,
                  sigma_data: float) -> PairCoefficients:
    weights = (1.0, 1.0) if readout is None else readout.combination.weights
    alpha, sigma = (torch.tensor(levels, dtype=torch.float64) for levels in (alphas, sigmas))
    unit = torch.eye(len(weights) + 2, dtype=torch.float64).expand(len(alpha), -1, -1).unbind(dim=1)
    *tensors, x0, noise = unit
    x = alpha.unsqueeze(1) * x0 + sigma.unsqueeze(1) * noise

    def in_space(prediction: Prediction) -> Tensor:
        return from_prediction(prediction, alpha, sigma, space, sigma_data)

    answer = in_space(Outputs(tuple(tensors), alpha, sigma, readout).prediction(x))
    target = in_space(Prediction(x0=x0, x1=noise))
    used = tuple(k for k, weight in enumerate(weights) if weight != 0)
    table = torch.cat([answer[:, list(used)], answer[:, -2:], target[:, -2:]], dim=1)
    by_x0, by_noise = (bool((table[:, columns] != 0).any()) for columns in ([-4, -2], [-3, -1]))
    return PairCoefficients(used, table, by_x0, by_noise)
