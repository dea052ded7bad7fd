"""The factor of guidance rescale: moments far from zero mean, and their gradient."""

import pytest
import torch

from tests.kernels.cases import DTYPES, normal
from visalign.kernels.guidance_rescale import rescale
from visalign.kernels.guidance_rescale.reference import factor_gradients, moments
from visalign.maths.combination import Combination, factor

COMBINATION = Combination((-3.5, 4.5), correction="rescale", conditional=1, strength=0.7)


def rows(shape, dtype=torch.float32, shift=0.0):
    return [(normal(shape, k) * (1 + k) + shift).to(dtype) for k in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 2), (3, 7, 59), (2, 4096), (2, 9001)], ids=str)
def test_moments_and_factor(engine, shape, dtype):
    """Means of 50 standard deviations: a difference of squares would lose three digits. Float64, 1e-5."""
    tensors = rows(shape, dtype, shift=50.0)
    found = rescale(engine, tensors, (0, 1), COMBINATION)
    wide = [tensor.double() for tensor in tensors]
    torch.testing.assert_close(found.moments.double(), moments(wide, COMBINATION), rtol=1e-5, atol=0)
    combined = -3.5 * wide[0] + 4.5 * wide[1]
    exact = factor("rescale", combined, wide[1], 0.7).flatten()
    torch.testing.assert_close(found.factor.double(), exact, rtol=1e-5, atol=0)


def test_gradients_of_the_factor_are_those_of_autograd():
    tensors = [tensor.double().requires_grad_() for tensor in rows((3, 4, 11), shift=0.5)]
    exact = factor("rescale", -3.5 * tensors[0] + 4.5 * tensors[1], tensors[1], 0.7)
    expected = torch.autograd.grad(exact.sum(), tensors)
    values = [tensor.detach() for tensor in tensors]
    for got, wanted in zip(factor_gradients(values, COMBINATION, moments(values, COMBINATION)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_one_element_has_no_spread(engine):
    assert bool(rescale(engine, rows((2, 1)), (0, 1), COMBINATION).factor.isnan().all())
