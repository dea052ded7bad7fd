"""The scalars of a fused operator, read off the reference formula.

What a sampler or a loss makes of a network's outputs is linear in them, up to the factor of a guidance correction. So the formula
itself, evaluated in float64 at unit vectors, gives its coefficients: the kernels never state a parametrisation of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from visalign.maths.combination import Combination
from visalign.maths.gaussian import transition_mean
from visalign.maths.outputs import GradientTerm, Outputs, Readout
from visalign.types import Prediction, Transition

MAX_OUTPUTS = 8
END_POINTS = "end points"

# A step in the arguments of a torch.library operator; see StepFormula.flat.
SCHEMA = ("str kind, float[] weights, float state_weight, str correction, int conditional, float strength, float sigma_data, "
          "float alpha, float sigma, float[] max_ratios, float A, float B, float std")


@dataclass(frozen=True)
class Coefficients:
    """One quantity as ``x * x_value + sum_k outputs[k] m_k + sum_j terms[j] g_j``, the factor of a correction left out of ``outputs``."""

    x: float
    outputs: tuple[float, ...]
    terms: tuple[float, ...]


@dataclass(frozen=True)
class StepFormula:
    """A sampler step without its tensors.

    Attributes:
        alpha, sigma, readout: of `Outputs`.
        max_ratios: of its gradient terms.
        transition: the step's scalars.
    """

    alpha: float
    sigma: float
    readout: Readout | None
    max_ratios: tuple[float, ...]
    transition: Transition

    @staticmethod
    def of(outputs: Outputs, transition: Transition) -> StepFormula:
        return StepFormula(float(outputs.alpha), float(outputs.sigma), outputs.readout, tuple(term.max_ratio for term in outputs.terms),
                           transition)

    def outputs(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor] = ()) -> Outputs:
        """With tensors again."""
        terms = tuple(GradientTerm(gradient, ratio) for gradient, ratio in zip(gradients, self.max_ratios, strict=True))
        return Outputs(tuple(tensors), self.alpha, self.sigma, self.readout, terms)

    def flat(self) -> tuple[Any, ...]:
        """The arguments that `SCHEMA` names."""
        readout, step = self.readout, self.transition
        ends = (self.alpha, self.sigma, list(self.max_ratios), step.A, step.B, step.std)
        if readout is None:
            return (END_POINTS, [1.0, 1.0], 0.0, "none", 0, 0.0, 0.5, *ends)
        how = readout.combination
        return (readout.kind, list(how.weights), how.state_weight, how.correction, how.conditional, how.strength, readout.sigma_data, *ends)

    @staticmethod
    def from_flat(kind: Any, weights: Sequence[float], state_weight: float, correction: Any, conditional: int, strength: float,
                  sigma_data: float, alpha: float, sigma: float, max_ratios: Sequence[float], A: float, B: float,
                  std: float) -> StepFormula:
        combination = Combination(tuple(weights), state_weight, correction, conditional, strength)
        readout = None if kind == END_POINTS else Readout(combination, kind, sigma_data)
        return StepFormula(alpha, sigma, readout, tuple(max_ratios), Transition(A, B, std))

    @property
    def used(self) -> tuple[int, ...]:
        """The outputs that matter: those with a weight, and the one a correction compares with."""
        if self.readout is None:
            return (0, 1)
        how = self.readout.combination
        return tuple(k for k, weight in enumerate(how.weights) if weight != 0 or (how.correction != "none" and k == how.conditional))


def obstacle(outputs: Outputs) -> str | None:
    """Why outputs cannot be combined inside a kernel, ``None`` if they can."""
    if len({tensor.dtype for tensor in (*outputs.tensors,)}) > 1:
        return "the network's outputs have several dtypes"
    if outputs.readout is None:
        return None
    how = outputs.readout.combination
    if how.axis is not None:
        return "guidance weights differ along an axis of the state"
    if how.correction not in ("none", "rescale"):
        return f"the guidance correction '{how.correction}' is not fused"
    if len(how.weights) > MAX_OUTPUTS:
        return f"guidance combines {len(how.weights)} outputs, kernels up to {MAX_OUTPUTS}"
    return None


def training_obstacle(outputs: Outputs, reference: Outputs | None) -> str | None:
    """The same for outputs that are trained, and those of a reference at the same state."""
    if outputs.terms:
        return "guided outputs are not trained on"
    if reference is not None and reference.readout != outputs.readout:
        return "the reference's outputs are read in another way"
    if reference is not None and {tensor.dtype for tensor in reference.tensors} != {tensor.dtype for tensor in outputs.tensors}:
        return "policy and reference have several dtypes"
    return obstacle(outputs)


@lru_cache(maxsize=4096)
def mean_and_velocity(formula: StepFormula) -> tuple[Coefficients, Coefficients]:
    """Of the transition's mean and of ``velocity = x1 - x0``, for the outputs that are ``used``."""
    prediction = at_unit_vectors(formula)
    return (_of(transition_mean(prediction, formula.transition), formula), _of(prediction.velocity, formula))


def at_unit_vectors(formula: StepFormula) -> Prediction:
    """The prediction as a function of (x, outputs, gradients): its end points at the unit vectors, float64 (1, 1 + K + J)."""
    num_outputs = 2 if formula.readout is None else len(formula.readout.combination.weights)
    unit = torch.eye(1 + num_outputs + len(formula.max_ratios), dtype=torch.float64).unsqueeze(1)
    linear = replace(formula, readout=without_correction(formula.readout))
    return linear.outputs(list(unit[1:1 + num_outputs]), list(unit[1 + num_outputs:])).prediction(unit[0])


def without_correction(readout: Readout | None) -> Readout | None:
    """The linear part of a readout."""
    if readout is None:
        return None
    return replace(readout, combination=replace(readout.combination, correction="none"))


def _of(values: Tensor, formula: StepFormula) -> Coefficients:
    first, *rest = values[0].tolist()
    num_outputs = len(rest) - len(formula.max_ratios)
    return Coefficients(first, tuple(rest[k] for k in formula.used), tuple(rest[num_outputs:]))


