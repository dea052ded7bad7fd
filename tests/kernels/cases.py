"""Random steps for the operators' tests: shapes with odd sizes, all dtypes, guidance of every kind that is fused."""

from __future__ import annotations

import torch
from torch import Tensor

from visalign.maths.combination import Combination
from visalign.maths.outputs import GradientTerm, Outputs, Readout
from visalign.maths.process import to_prediction
from visalign.types import NoiseLevel, Prediction, PredictionKind, Transition

SHAPES = [(5, 123), (1, 1), (3, 16, 9, 7), (2, 64, 65), (2, 4096, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS: tuple[PredictionKind, ...] = ("epsilon", "sample", "v_prediction", "flow", "edm")
COMBINATIONS = {
    1: Combination((1.0,)),
    2: Combination((-3.5, 4.5)),
    3: Combination((-6.5, 4.5, 3.0), state_weight=0.25),
    "rescale": Combination((-3.5, 4.5), correction="rescale", conditional=1, strength=0.7),
    "rescale, idle row": Combination((0.0, -2.0, 3.0), 0.1, correction="rescale", conditional=2, strength=0.3),
}
LEVEL, STEP = NoiseLevel(0.6, 0.8), Transition(A=0.75, B=0.5, std=0.3)
ODE_STEP = Transition(A=0.8, B=0.6, std=0.0)
EPS = 2.0**-24


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs(shape: tuple[int, ...], combination: Combination, kind: PredictionKind = "flow", dtype: torch.dtype = torch.float32,
            num_terms: int = 0, seed: int = 1) -> Outputs:
    """Random network outputs, read at `LEVEL`, tilted by random gradients."""
    tensors = tuple(normal(shape, seed + k, dtype) for k in range(len(combination.weights)))
    terms = tuple(GradientTerm(normal(shape, seed + 50 + j), max_ratio=(0.5, 9.0)[j]) for j in range(num_terms))
    return Outputs(tensors, LEVEL.alpha, LEVEL.sigma, Readout(combination, kind, sigma_data=0.7), terms)


def end_points(shape: tuple[int, ...], x: Tensor, seed: int = 1) -> Outputs:
    """The prediction of a policy that has no raw outputs; its end points determine x."""
    prediction: Prediction = to_prediction(normal(shape, seed), x, LEVEL.alpha, LEVEL.sigma, "flow")
    return Outputs.of(prediction, LEVEL.alpha, LEVEL.sigma)


def double(value: Outputs) -> Outputs:
    """The same numbers in float64."""
    terms = tuple(GradientTerm(term.gradient.double(), term.max_ratio) for term in value.terms)
    return Outputs(tuple(tensor.double() for tensor in value.tensors), value.alpha, value.sigma, value.readout, terms)


def magnitude(value: Outputs, x: Tensor) -> float:
    """Size of the largest term of a linear combination: what rounding is relative to."""
    weights = [1.0] if value.readout is None else [abs(weight) for weight in value.readout.combination.weights]
    largest = max(float(tensor.float().abs().max()) for tensor in value.tensors)
    tilt = sum(10.0 * float(term.gradient.abs().max()) for term in value.terms)
    return 4.0 * (float(x.float().abs().max()) + sum(weights) * largest + tilt)
