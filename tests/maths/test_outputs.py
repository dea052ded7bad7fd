"""Outputs read as a prediction: the chain of formulas spelled out, bit for bit."""

import math

import pytest
import torch

from visalign.maths.combination import Combination
from visalign.maths.outputs import GradientTerm, Outputs, Readout, tilted
from visalign.maths.process import to_prediction
from visalign.types import NoiseLevel, Prediction

LEVEL = NoiseLevel(0.6, 0.8)


def tensors(count, dtype=torch.float32, shape=(3, 2, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow", "edm"])
def test_outputs_become_what_the_formulas_make_of_them(kind, dtype):
    x, first, second = tensors(3, dtype)
    combination = Combination((-2.5, 3.5), state_weight=0.1, correction="rescale", conditional=1, strength=0.7)
    found = Outputs((first, second), LEVEL.alpha, LEVEL.sigma, Readout(combination, kind, sigma_data=0.7)).prediction(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    output = combination([first.to(wide), second.to(wide)], x.to(wide))
    expected = to_prediction(output, x.to(wide), 0.6, 0.8, kind, 0.7)
    assert torch.equal(found.x0, expected.x0)
    assert torch.equal(found.x1, expected.x1)


def test_levels_may_differ_between_samples():
    x, output = tensors(2)
    alpha, sigma = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.8, 0.5, 0.1])
    found = Outputs((output,), alpha, sigma, Readout(Combination((1.0,)), "flow")).prediction(x)
    for row in range(3):
        alone = to_prediction(output[row:row + 1], x[row:row + 1], alpha[row:row + 1], sigma[row:row + 1], "flow")
        assert torch.equal(found.x0[row:row + 1], alone.x0)
    with pytest.raises(ValueError, match="one level for all samples"):
        Outputs((output,), alpha, sigma, Readout(Combination((1.0,)), "flow"), (GradientTerm(x),)).prediction(x)


def test_end_points_are_outputs_too_and_gradients_tilt_them():
    x0, x1, first, second = tensors(4)
    x = LEVEL.alpha * x0 + LEVEL.sigma * x1
    plain = Outputs.of(Prediction(x0, x1), LEVEL.alpha, LEVEL.sigma)
    assert plain.prediction(x).x0 is x0
    both = Outputs(plain.tensors, LEVEL.alpha, LEVEL.sigma, None, (GradientTerm(first, 0.5), GradientTerm(second))).prediction(x)
    once = tilted(Prediction(x0, x1), x, LEVEL, first, 0.5)
    assert torch.equal(both.x0, tilted(once, x, LEVEL, second, math.inf).x0)
    torch.testing.assert_close(both.velocity, x1 - x0 - 1.4 * 0.5 * first - 1.4 * (0.8 / 0.6) * second, rtol=1e-5, atol=1e-5)


def test_the_number_of_tensors_is_checked():
    with pytest.raises(ValueError, match="takes 2 tensors, got 1"):
        Outputs((torch.zeros(1, 2),), 0.5, 0.5, Readout(Combination((1.0, 2.0)), "flow"))
    with pytest.raises(ValueError, match="infinite at sigma 1, alpha 0"):
        Outputs(tuple(tensors(2)), 0.0, 1.0, None, (GradientTerm(tensors(1)[0]),)).prediction(tensors(1)[0])
