"""The average is the formula, and swapping it in and out changes no bit of the weights, on the CPU too."""

import pytest
import torch

from visalign.ema import EMA, decay_at


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(3, 2, generator=generator).to(dtype)) for name in ("a", "b")}


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (1, 2 / 11), (8, 0.5), (80, 0.9), (10_000, 0.9)])
def test_the_decay_warms_up(step, expected):
    assert decay_at(step, 0.9) == pytest.approx(expected)


def test_one_step_is_the_formula():
    parameters = weights()
    ema = EMA(parameters, decay=0.9)
    before = parameters["a"].detach().clone()
    with torch.no_grad():
        parameters["a"] += 1.0
    ema.step(parameters)
    assert torch.allclose(ema.shadow["a"], 0.1 * before + 0.9 * parameters["a"].detach(), rtol=1e-6)
    assert ema.num_steps == 1


def test_the_average_of_a_constant_is_the_constant():
    parameters = weights()
    ema = EMA(parameters, decay=0.99)
    for _ in range(50):
        ema.step(parameters)
    assert all(torch.equal(ema.shadow[name], parameter.detach()) for name, parameter in parameters.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_restores_bit_for_bit_even_after_an_error(dtype):
    parameters = weights(dtype)
    ema = EMA(parameters, decay=0.9)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 1.0
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with ema.swapped(parameters):
        assert torch.equal(parameters["a"].detach(), ema.shadow["a"].to(dtype))
        assert not torch.equal(parameters["a"].detach(), before["a"])
    assert all(torch.equal(parameters[name].detach(), before[name]) for name in before)
    with pytest.raises(KeyError), ema.swapped(parameters):
        raise KeyError
    assert all(torch.equal(parameters[name].detach(), before[name]) for name in before)


def test_small_steps_are_not_lost_in_low_precision():
    """In bfloat16 itself, 1 + 0.01 x (1.01 - 1) would round to 1 for ever."""
    parameters = {"a": torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))}
    ema = EMA(parameters, decay=0.99)
    ema.num_steps = 10_000
    with torch.no_grad():
        parameters["a"] += 0.0078125
    for _ in range(100):
        ema.step(parameters)
    assert float(ema.shadow["a"]) == pytest.approx(1 + 0.0078125 * (1 - 0.99**100), rel=1e-5)


def test_restoring_other_weights_is_refused():
    ema = EMA(weights(), decay=0.9)
    with pytest.raises(ValueError, match="names that differ: \\['b', 'c'\\]"):
        ema.restore({"a": torch.zeros(3, 2), "c": torch.zeros(3, 2)}, 3)
    with pytest.raises(ValueError, match="decay must lie in"):
        EMA(weights(), decay=1.0)
