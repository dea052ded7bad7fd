"""``transition_log_prob``: forward and every gradient against float64 autograd, and the density of a sampled step bit for bit."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import (
    COMBINATIONS,
    DTYPES,
    EPS,
    KINDS,
    LEVEL,
    ODE_STEP,
    SHAPES,
    STEP,
    double,
    end_points,
    magnitude,
    normal,
    outputs,
)
from tests.kernels.host_engine import HostEngine
from tests.kernels.test_guided_step import fused as sample
from tests.kernels.test_guided_step import select, spread
from visalign.kernels.formula import StepFormula
from visalign.kernels.transition_log_prob import transition_log_prob
from visalign.kernels.transition_log_prob.fused import Inputs, Slopes, run, run_backward
from visalign.kernels.transition_log_prob.reference import backward, reference, relative_gap
from visalign.maths.gaussian import kl_divergence_per_dim, log_prob_per_dim, state_coefficients, transition_mean
from visalign.maths.outputs import Outputs
from visalign.maths.process import to_prediction

PARTS = ("log_prob", "kl_reference", "kl_old", "output_gap")


def stored(shape, found, dtype=torch.float32, near=0.05):
    """x, x_next, outputs of a reference and an old velocity that lie near the policy's, as in training."""
    x = normal(shape, 0)
    mean = transition_mean(found.prediction(x), STEP)
    held = replace(found, tensors=tuple((tensor.float() + near * normal(shape, 30 + k)).to(tensor.dtype)
                                        for k, tensor in enumerate(found.tensors)))
    velocity = (found.prediction(x).velocity + near * normal(shape, 40)).float()
    return x.to(dtype), (mean + STEP.std * normal(shape, 9)).to(dtype), held, velocity


def fused(engine, found, x, x_next, held=None, velocity=None, slopes=None):
    """The kernels' answer, and with ``slopes`` the gradients of the outputs."""
    given, formula = Inputs(x, x_next, found.tensors, held.tensors if held else (), velocity), StepFormula.of(found, STEP)
    got = run(engine, given, formula)
    return got if slopes is None else (got, run_backward(engine, given, formula, got, slopes))


def slopes_of(batch, seed=3):
    return Slopes(*(normal((batch,), seed + k) for k in range(3)))


def exact(found, x, x_next, held, velocity, slopes):
    """Terms and gradients in float64, by autograd."""
    wide = double(found)
    leaves = [tensor.requires_grad_() for tensor in wide.tensors]
    terms = reference(replace(wide, tensors=tuple(leaves)), x.double(), x_next.double(), STEP, None if held is None else double(held),
                      None if velocity is None else velocity.double())
    loss = (slopes.log_prob.double() * terms.log_prob).sum()
    if held is not None:
        loss = loss + (slopes.kl_reference.double() * terms.kl_reference).sum()
    if velocity is not None:
        loss = loss + (slopes.kl_old.double() * terms.kl_old).sum()
    return terms, [torch.zeros_like(leaf) if grad is None else grad
                   for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)]


def check(engine, found, shape, dtype=torch.float32, with_held=True, with_old=True, tolerance=2e-5):
    x, x_next, held, velocity = stored(shape, found, dtype)
    held, velocity = held if with_held else None, velocity if with_old else None
    slopes = slopes_of(shape[0])
    got, grads = fused(engine, found, x, x_next, held, velocity, slopes)
    terms, expected = exact(found, x, x_next, held, velocity, slopes)
    dims = x[0].numel()
    mean = transition_mean(double(found).prediction(x.double()), STEP)
    deviation = (x_next.double() - mean).abs().flatten(1).sum(1) / STEP.std**2
    slack = 32 * EPS * magnitude(found, x) * deviation + 4e-7 * terms.log_prob.abs() + 1e-6 * dims
    assert bool(((got.log_prob.double() - terms.log_prob).abs() <= slack).all())
    for name, wanted in zip(PARTS[1:], (with_held, with_old, with_old), strict=True):
        if wanted:
            torch.testing.assert_close(getattr(got, name).double(), getattr(terms, name), rtol=1e-3, atol=1e-6 * dims)
        else:
            assert getattr(got, name).shape == (0,)
    for grad, wanted in zip(grads, expected, strict=True):
        assert grad.dtype == found.tensors[0].dtype
        step = torch.finfo(grad.dtype).eps  # of the stored gradient itself
        assert (grad.double() - wanted).norm() <= (tolerance + step) * wanted.norm() + 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(engine, shape, dtype):
    check(engine, outputs(shape, COMBINATIONS[2], dtype=dtype), shape, dtype)


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name != 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guidance(engine, name, dtype):
    """The gradient of a rescaled combination goes through its factor too."""
    check(engine, outputs((3, 4, 1031), COMBINATIONS[name], dtype=dtype), (3, 4, 1031), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_kinds(engine, kind):
    check(engine, outputs((4, 77), COMBINATIONS[2], kind), (4, 77))


@pytest.mark.parametrize(("with_held", "with_old"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", [1, "rescale"])
def test_terms_that_are_not_asked_for(engine, with_held, with_old, name):
    check(engine, outputs((3, 200), COMBINATIONS[name], "epsilon"), (3, 200), with_held=with_held, with_old=with_old)


def test_end_points_of_a_policy_without_raw_outputs(engine):
    x = normal((3, 50), 0)
    check(engine, end_points((3, 50), x), (3, 50))


@pytest.mark.parametrize("name", [1, 3, "rescale", "rescale, idle row"])
def test_the_written_out_gradient_is_that_of_autograd(name):
    found = double(outputs((3, 4, 11), COMBINATIONS[name], "v_prediction"))
    x, x_next, held, velocity = (value if isinstance(value, Outputs) else value.double() for value in stored((3, 4, 11), found))
    slopes = slopes_of(3)
    _, expected = exact(found, x, x_next, held, velocity, slopes)
    how = COMBINATIONS[name]
    from visalign.kernels.guidance_rescale.reference import moments

    both = [moments(one.tensors, how) for one in (found, held)]
    factors = tuple(how.strength * one[:, 3] / one[:, 1] + 1 - how.strength for one in both)
    tensors = [tensor.detach() for tensor in found.tensors]
    got = backward(StepFormula.of(found, STEP), x, x_next, tensors, held.tensors, velocity, slopes.log_prob, slopes.kl_reference,
                   slopes.kl_old, both[0].detach(), tuple(factor.detach() for factor in factors))
    for grad, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("storage", DTYPES, ids=str)
@pytest.mark.parametrize("name", [1, 2, 3, "rescale"])
@pytest.mark.parametrize("noise_from", ["given", "philox"])
def test_the_density_of_a_sampled_step_is_the_same_bits(engine, storage, name, noise_from):
    """Ratio 1 by construction: what guided_step said of x_next, transition_log_prob says again, from what was stored, in other batches; and
    the velocity that was stored has distance 0."""
    shape = (4, 9001)
    found, x = outputs(shape, COMBINATIONS[name], "v_prediction", torch.bfloat16), normal(shape, 0).to(storage)
    noise, seeds = (normal(shape, 9), None) if noise_from == "given" else (None, torch.tensor([3, 2**62, 5, 7]))
    drawn = sample(engine, found, x.float(), STEP, noise, seeds, storage, mean=False)
    for blocks, rows in ((1, slice(0, 4)), (5, slice(0, 1)), (1000, slice(1, 4))):
        got = fused(HostEngine(engine.folder, resident_blocks=blocks), select(found, rows), x[rows], drawn["x_next"][rows],
                    select(found, rows), drawn["velocity"][rows])
        assert torch.equal(got.log_prob, drawn["log_prob"][rows])
        for part in (got.kl_old, got.kl_reference, got.output_gap):
            assert torch.equal(part, torch.zeros_like(part))


def test_addresses_and_strides_change_no_bit(engine):
    shape = (3, 5, 824)
    found = outputs(shape, COMBINATIONS["rescale"], "epsilon", torch.float16)
    x, x_next, held, velocity = stored(shape, found, torch.bfloat16)
    slopes = slopes_of(3)
    plain, plain_grads = fused(engine, found, x, x_next, held, velocity, slopes)
    apart = [replace(one, tensors=tuple(spread(tensor, 3, k + 1) for k, tensor in enumerate(one.tensors))) for one in (found, held)]
    moved, moved_grads = fused(engine, apart[0], spread(x, 1, 1), spread(x_next, 5, 3), apart[1], spread(velocity, 2, 3), slopes)
    for name in PARTS:
        assert torch.equal(getattr(plain, name), getattr(moved, name)), name
    assert all(torch.equal(one, other) for one, other in zip(plain_grads, moved_grads, strict=True))


def test_an_empty_batch_is_empty(engine):
    found = outputs((0, 7), COMBINATIONS[2])
    got, grads = fused(engine, found, normal((0, 7), 0), normal((0, 7), 0), None, None, slopes_of(0))
    assert got.log_prob.shape == (0,)
    assert [grad.shape for grad in grads] == [(0, 7)] * 2


def test_the_torch_backend_is_the_old_chain_bit_for_bit():
    """Density, KL and gap as GRPO computed them before there were operators, and the gradient that autograd gives of their sum."""
    shape = (3, 16, 9, 7)
    found = outputs(shape, COMBINATIONS[2], "v_prediction", torch.bfloat16)
    x, x_next, held, velocity = stored(shape, found)

    def gradient(terms):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in found.tensors]
        return torch.autograd.grad(terms(replace(found, tensors=tuple(leaves))), leaves)

    def old(with_leaves):
        prediction = with_leaves.prediction(x)
        density = log_prob_per_dim(x_next.to(prediction.x0), transition_mean(prediction, STEP), STEP.std)
        _, c_v = state_coefficients(LEVEL, STEP)
        kl_old = kl_divergence_per_dim(c_v * prediction.velocity, c_v * velocity, STEP.std)
        kl = kl_divergence_per_dim(c_v * prediction.velocity, c_v * held.prediction(x).velocity, STEP.std)
        return density, kl_old, kl

    def new(with_leaves):
        terms = transition_log_prob(with_leaves, x, x_next, STEP, reference_outputs=held, velocity_old=velocity, backend="torch")
        return tuple(part / x[0].numel() for part in (terms.log_prob, terms.kl_old, terms.kl_reference))

    for one, other in zip(old(found), new(found), strict=True):
        assert torch.equal(one, other)
    found_gap = transition_log_prob(found, x, x_next, STEP, velocity_old=velocity).output_gap
    assert torch.equal(found_gap, relative_gap(found.prediction(x).velocity, velocity))
    for one, other in zip(gradient(lambda o: sum(part.sum() for part in old(o))), gradient(lambda o: sum(part.sum() for part in new(o))),
                          strict=True):
        assert torch.equal(one, other)


def test_wrong_calls_are_refused():
    found = outputs((2, 5), COMBINATIONS[1])
    x = normal((2, 5), 0)
    with pytest.raises(ValueError, match="a deterministic step has no density"):
        transition_log_prob(found, x, x, ODE_STEP)
    with pytest.raises(ValueError, match="differentiated in the policy's outputs alone"):
        transition_log_prob(found, x.clone().requires_grad_(), x, STEP)
    with pytest.raises(ValueError, match="not possible here, guided outputs are not trained on"):
        transition_log_prob(outputs((2, 5), COMBINATIONS[1], num_terms=1), x, x, STEP, backend="cuda")
    other = outputs((2, 5), COMBINATIONS[1], "epsilon")
    with pytest.raises(ValueError, match="not possible here, the reference's outputs are read in another way"):
        transition_log_prob(found, x, x, STEP, reference_outputs=other, backend="cuda")


def test_tensors_of_another_shape_are_refused_before_an_address_is_read(engine):
    shape = (3, 50)
    found = outputs(shape, COMBINATIONS[1])
    x, x_next, held, velocity = stored(shape, found)
    for wrong in ((x, x_next[:2], held, velocity), (x, x_next, select(held, slice(0, 1)), velocity), (x, x_next, held, velocity[:, :1])):
        with pytest.raises(ValueError, match="a fused operator takes tensors of one shape on one device"):
            fused(engine, found, *wrong)


def test_a_level_of_the_reference_may_not_determine_its_end_points():
    found = outputs((2, 5), COMBINATIONS[1], "epsilon")
    with pytest.raises(ValueError, match="does not determine both end points at alpha = 0"):
        transition_log_prob(replace(found, alpha=0.0), normal((2, 5), 0), normal((2, 5), 1), STEP)
    assert to_prediction(found.tensors[0], normal((2, 5), 0), 0.6, 0.8, "epsilon").x1 is found.tensors[0]
