"""Clamps whose gradient can bring values back."""

import pytest
import torch

from visalign.maths.backprop import ReturningClamps, returning_clamp

VALUES = torch.tensor([-0.5, -0.0, 0.25, 1.0, 1.5], dtype=torch.float64)


def slope(function, of):
    x = VALUES.clone().requires_grad_()
    (function(x) * of).sum().backward()
    return x.grad.tolist()


def test_values_are_those_of_the_plain_clamp():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(returning_clamp(x, -1.0, 1.0), x.clamp(-1, 1))


def test_saturated_values_have_the_gradient_that_brings_them_back_and_no_other():
    assert slope(lambda x: returning_clamp(x, 0.0, 1.0), of=2.0) == [0, 2, 2, 2, 2]  # descent lowers x: good above, not below
    assert slope(lambda x: returning_clamp(x, 0.0, 1.0), of=-2.0) == [-2, -2, -2, -2, 0]


def test_descent_recovers_a_saturated_pixel_and_stops_at_the_edge():
    """max (y - 2)^2 has its minimum at y = 1: a straight-through gradient would push x to infinity."""
    x = torch.tensor([3.0, 0.5], requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        y = returning_clamp(x, 0.0, 1.0)
        (y[0].square() + (y[1] - 2).square()).backward()
        optimizer.step()
    assert abs(float(x[0].detach())) < 1e-3
    assert 1.0 <= float(x[1].detach()) < 1.3


@pytest.mark.parametrize("clamp", [
    lambda x: x.clamp(0, 1), lambda x: torch.clamp(x, 0, 1), lambda x: x.clamp(min=0, max=1), lambda x: torch.clip(x, min=0.0, max=1.0),
    lambda x: 2 * (x / 2).clamp(-1.0, 1.0)[..., :] * 1.0,
])
def test_inside_the_context_clamps_to_pixel_ranges_return(clamp):
    x = VALUES.clone().requires_grad_()
    with ReturningClamps():
        y = clamp(x)
    assert torch.equal(y, clamp(VALUES))
    y.sum().backward()
    assert x.grad[-1] == 1
    assert slope(clamp, of=1.0)[-1] == (0 if float(y.detach().max()) == 1 else 1)


@pytest.mark.parametrize("clamp", [lambda x: x.clamp(min=0), lambda x: x.clamp(max=1), lambda x: x.clamp(-0.25, 0.25), lambda x: x.relu()])
def test_other_clamps_keep_their_own_gradient(clamp):
    x = VALUES.clone().requires_grad_()
    with ReturningClamps():
        clamp(x).sum().backward()
    assert x.grad.tolist() == slope(clamp, of=1.0)
    with ReturningClamps():
        assert torch.arange(5).clamp(0, 1).tolist() == [0, 1, 1, 1, 1]


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="low < high"):
        returning_clamp(VALUES, 1.0, 0.0)
