"""Conversions are identities: every kind there and back, at every level of every process."""

import math

import pytest
import torch

from visalign.maths.process import broadcast_level, flow_coordinates, from_prediction, from_velocity, to_prediction
from visalign.types import NoiseLevel, Prediction

KINDS = ["epsilon", "sample", "v_prediction", "flow", "edm"]
LEVELS = [
    (0.7, 0.3), (0.02, 0.98),  # flow
    (math.sqrt(0.3), math.sqrt(0.7)), (math.sqrt(0.999), math.sqrt(0.001)),  # VP
    (1.0, 80.0), (1.0, 0.002),  # EDM
]


def points(shape=(4, 3, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_every_kind_round_trips(kind, alpha, sigma):
    x0, x1 = points()
    x = alpha * x0 + sigma * x1
    back = to_prediction(from_prediction(Prediction(x0, x1), alpha, sigma, kind), x, alpha, sigma, kind)
    # Dividing by a small alpha or sigma amplifies rounding of x by its inverse, at most 1 / 0.001 here.
    torch.testing.assert_close(back.x0, x0, atol=1e-11, rtol=0)
    torch.testing.assert_close(back.x1, x1, atol=1e-11, rtol=0)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_the_family_is_closed(source, target):
    alpha, sigma = 0.6, 0.8
    x, output = points(seed=1)
    prediction = to_prediction(output, x, alpha, sigma, source)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.x1, x, atol=1e-13, rtol=0)
    through = to_prediction(from_prediction(prediction, alpha, sigma, target), x, alpha, sigma, target)
    torch.testing.assert_close(from_prediction(through, alpha, sigma, source), output, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("alpha", "sigma", "kind"), [
    (0.0, 1.0, "flow"), (1.0, 0.0, "flow"), (0.0, 1.0, "v_prediction"), (1.0, 0.0, "v_prediction"),
    (1.0, 0.0, "edm"), (0.0, 1.0, "edm"), (1.0, 0.0, "epsilon"), (0.0, 1.0, "sample"),
])
def test_the_ends_are_exact_where_they_are_defined(alpha, sigma, kind):
    x0, x1 = points(seed=2)
    x = alpha * x0 + sigma * x1
    back = to_prediction(from_prediction(Prediction(x0, x1), alpha, sigma, kind), x, alpha, sigma, kind)
    torch.testing.assert_close(back.x0, x0, atol=1e-14, rtol=0)
    torch.testing.assert_close(back.x1, x1, atol=1e-14, rtol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("alpha", "sigma", "kind", "name"), [(0.0, 1.0, "epsilon", "alpha = 0"), (1.0, 0.0, "sample", "sigma = 0")])
def test_undefined_ends_are_refused(alpha, sigma, kind, name, as_tensor):
    x, output = points()
    level = [torch.full((4,), value) if as_tensor else value for value in (alpha, sigma)]
    with pytest.raises(ValueError, match=name):
        to_prediction(output, x, *level, kind)


def test_vp_conversions_are_the_published_ones():
    ab = 0.37
    alpha, sigma = math.sqrt(ab), math.sqrt(1 - ab)
    x, m = points(seed=3)
    epsilon, sample, v = (to_prediction(m, x, alpha, sigma, kind) for kind in ("epsilon", "sample", "v_prediction"))
    torch.testing.assert_close(epsilon.x0, (x - sigma * m) / alpha)
    torch.testing.assert_close(sample.x1, (x - alpha * m) / sigma)
    torch.testing.assert_close(v.x0, alpha * x - sigma * m)
    torch.testing.assert_close(v.x1, alpha * m + sigma * x)


def test_sigma_space_v_prediction_is_the_one_of_diffusers_euler():
    sigma = 3.7
    x, m = points(seed=4)
    expected = m * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
    torch.testing.assert_close(to_prediction(m, x, 1.0, sigma, "v_prediction").x0, expected)


def test_edm_preconditioning_is_the_published_one():
    sigma, d = 2.3, 0.5
    x, m = points(seed=5)
    skip, out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2) ** 0.5
    torch.testing.assert_close(to_prediction(m, x, 1.0, sigma, "edm", sigma_data=d).x0, skip * x + out * m)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_the_process_leaves_the_end_points_alone(kind):
    x0, x1 = points(seed=6)
    output = from_prediction(Prediction(x0, x1), 0.6, 0.8, kind)
    for c in (0.1, 1.0, 50.0):
        scaled = to_prediction(output, c * (0.6 * x0 + 0.8 * x1), 0.6 * c, 0.8 * c, kind)
        torch.testing.assert_close(scaled.x0, x0, atol=1e-13, rtol=0)
        torch.testing.assert_close(scaled.x1, x1, atol=1e-13, rtol=0)


def test_levels_per_sample_equal_one_float_per_sample():
    x, output = points(seed=7)
    sigma = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    together = to_prediction(output, x, 1 - sigma, sigma, "epsilon")
    for k in range(4):
        alone = to_prediction(output[k:k + 1], x[k:k + 1], 1 - float(sigma[k]), float(sigma[k]), "epsilon")
        torch.testing.assert_close(together.x0[k:k + 1], alone.x0)


def test_half_precision_is_converted_in_float32():
    x, output = (t.bfloat16() for t in points())
    prediction = to_prediction(output, x, 0.5, 0.5, "flow")
    assert prediction.x0.dtype == prediction.x1.dtype == torch.float32
    torch.testing.assert_close(prediction.x0, x.float() - 0.5 * output.float())


def test_from_velocity_restores_a_stored_prediction():
    x0, x1 = points(seed=8)
    back = from_velocity(x1 - x0, 0.3 * x0 + 4 * x1, 0.3, 4.0)
    torch.testing.assert_close(back.x0, x0, atol=1e-13, rtol=0)
    torch.testing.assert_close(back.velocity, x1 - x0, atol=1e-13, rtol=0)


def test_flow_coordinates():
    assert flow_coordinates(NoiseLevel(0.25, 0.75)).s == 0.75
    assert flow_coordinates(NoiseLevel(1.0, 3.0)).scale == 4.0


def test_errors_say_what_to_do():
    x, output = points()
    with pytest.raises(ValueError, match="unknown prediction kind 'eps'; use one of epsilon"):
        to_prediction(output, x, 0.5, 0.5, "eps")
    with pytest.raises(ValueError, match="unknown prediction kind"):
        from_prediction(Prediction(x, x), 0.5, 0.5, "eps")
    with pytest.raises(ValueError, match="differ in shape"):
        to_prediction(output[:, :1], x, 0.5, 0.5, "flow")
    with pytest.raises(ValueError, match=r"one scalar per sample, \(4,\)"):
        broadcast_level(torch.zeros(3), x)
    with pytest.raises(ValueError, match="alpha >= 0"):
        flow_coordinates(NoiseLevel(-0.1, 1.0))
    with pytest.raises(ValueError, match="alpha \\+ sigma > 0"):
        flow_coordinates(NoiseLevel(0.0, 0.0))
