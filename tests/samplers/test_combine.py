"""Guidance weights and nonlinear corrections are recovered from what they did to random predictions."""

import pytest
import torch

from visalign.maths.combination import Combination, factor
from visalign.samplers.combine import fit_combination
from visalign.samplers.observe import CaptureError


def observe(combination, copies=2, shape=(1, 16, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    runs, answers, states = [], [], []
    for _ in range(2):
        rows = [torch.randn(shape, generator=generator) for _ in range(copies)]
        state = torch.randn(shape, generator=generator)
        runs.append(rows)
        states.append(state)
        answers.append(combination(rows, state))
    return runs, answers, states


@pytest.mark.parametrize(
    "true",
    [
        Combination((-3.5, 4.5)),
        Combination((4.5, -3.5)),
        Combination((1.0,)),
        Combination((-1.0,)),
        Combination((-6.5, 4.5, 3.0)),
        Combination((-2.0, 3.0), state_weight=0.25),
    ],
)
def test_linear_guidance_is_recovered_exactly(true):
    found = fit_combination(*observe(true, copies=len(true.weights)), step=0)
    assert found.correction == "none"
    assert found.weights == pytest.approx(true.weights, abs=1e-9)
    assert found.state_weight == pytest.approx(true.state_weight, abs=1e-6)


@pytest.mark.parametrize(
    "true",
    [
        Combination((-4.0, 5.0), correction="rescale", conditional=1, strength=0.7),
        Combination((5.0, -4.0), correction="rescale", conditional=0, strength=0.3),
        Combination((-3.0, 4.0), correction="token norm", conditional=1),
        Combination((4.0, -3.0), correction="token norm", conditional=0),
        Combination((-5.0, 4.0), correction="norm cap", conditional=1, strength=1.0),
    ],
)
def test_named_nonlinear_corrections_are_recovered(true):
    if true.correction == "norm cap":
        true = Combination((-3.0, 4.0), correction="norm cap", conditional=1, strength=1.0)
    runs, answers, states = observe(true)
    found = fit_combination(runs, answers, states, step=3)
    for rows, answer, state in zip(runs, answers, states, strict=True):
        assert torch.allclose(found(rows, state), answer, rtol=1e-4, atol=1e-4)
    assert found.correction == true.correction
    fresh_runs, fresh_answers, fresh_states = observe(true, seed=7)
    assert torch.allclose(found(fresh_runs[0], fresh_states[0]), fresh_answers[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [1, 2])
def test_guidance_that_differs_along_one_axis_is_recovered(axis):
    size = (1, 6, 16, 8)[axis]
    scales = [1.0 + i / 2 for i in range(size)]
    true = Combination((9.0, 9.0), axis=axis, profile=(tuple(1 - s for s in scales), tuple(scales)))
    found = fit_combination(*observe(true, shape=(1, 6, 16, 8)), step=0)
    assert found.axis == axis
    for expected, weights in zip(true.profile, found.profile, strict=True):
        assert weights == pytest.approx(expected, abs=1e-6)
    rows, state = [torch.randn(3, 6, 16, 8) for _ in range(2)], torch.zeros(3, 6, 16, 8)
    assert torch.allclose(found(rows, state), true(rows, state), atol=1e-5)


def test_unknown_nonlinear_guidance_is_refused_with_its_residual_and_a_way_out():
    def adaptive(rows, state):
        return rows[0] + 3.0 * torch.tanh(rows[1] - rows[0])

    runs, answers, states = observe(adaptive)
    with pytest.raises(CaptureError, match=r"step 5: .*relative residual 0\.\d+.*Switch off"):
        fit_combination(runs, answers, states, step=5)


def test_rescale_factor_is_the_published_formula():
    generator = torch.Generator().manual_seed(1)
    combined, conditional = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    expected = 0.7 * conditional.flatten(1).std(1) / combined.flatten(1).std(1) + 0.3
    assert torch.allclose(factor("rescale", combined, conditional, 0.7).flatten(), expected)


def test_combination_passes_gradients_to_every_prediction():
    rows = [torch.randn(1, 4, requires_grad=True) for _ in range(2)]
    Combination((-3.5, 4.5))(rows, torch.zeros(1, 4)).sum().backward()
    assert torch.equal(rows[0].grad, torch.full((1, 4), -3.5))
    assert torch.equal(rows[1].grad, torch.full((1, 4), 4.5))
