"""``paired_error``: forward and every gradient against float64 autograd, for every kind and space; equal answers have equal errors."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import COMBINATIONS, DTYPES, KINDS, SHAPES, normal
from tests.kernels.host_engine import HostEngine
from tests.kernels.test_guided_step import spread
from visalign.kernels.paired_error import paired_error
from visalign.kernels.paired_error.formula import PairFormula, coefficients
from visalign.kernels.paired_error.fused import Inputs, run, run_backward
from visalign.kernels.paired_error.reference import backward, mean_squared, reference
from visalign.maths.combination import Combination
from visalign.maths.outputs import Outputs, Readout
from visalign.maths.process import from_prediction
from visalign.types import Prediction

NAMES = ("policy", "reference", "gap", "norm_policy", "norm_reference")
SPACES = ("epsilon", "sample", "v_prediction", "flow")


def levels(batch):
    """VP levels between 0.3 and 0.95, another for every sample."""
    alpha = torch.linspace(0.3, 0.95, batch)
    return alpha, (1 - alpha.square()).sqrt()


def noised(shape, combination, kind="flow", dtype=torch.float32, near=0.1):
    """(outputs, reference's outputs, x, x0, noise): answers near the truth, as in training."""
    x0, noise = normal(shape, 0), normal(shape, 1)
    alpha, sigma = levels(shape[0])
    a, s = (level.reshape(-1, *[1] * (len(shape) - 1)) for level in (alpha, sigma))
    readout = Readout(combination, kind, sigma_data=0.7)
    tensors = [tuple(normal(shape, 10 + 10 * who + k).to(dtype) for k in range(len(combination.weights))) for who in (0, 1)]
    held = tuple((own.float() + near * other.float()).to(dtype) for own, other in zip(*tensors, strict=True))
    return Outputs(tensors[0], alpha, sigma, readout), Outputs(held, alpha, sigma, readout), a * x0 + s * noise, x0, noise


def fused(engine, found, held, x0, noise, space, mask=None, slopes=None, norms=True):
    formula = PairFormula(found.alpha, found.sigma, found.readout, space, 0.7)
    given = Inputs(x0, noise, found.tensors, held.tensors if held else (), mask)
    got = run(engine, given, formula, norms)
    return got if slopes is None else (got, run_backward(engine, given, formula, got.count, slopes))


def wide(outputs, leaves=False):
    tensors = tuple(tensor.double().requires_grad_(leaves) for tensor in outputs.tensors)
    return Outputs(tensors, outputs.alpha.double(), outputs.sigma.double(), outputs.readout)


def wide_mean_squared(output, target, mask):
    """The formula once more, in float64, which the one of the library leaves for float32."""
    squared = (output - target).square()
    kept = torch.ones_like(squared) if mask is None else mask.expand(squared.shape).double()
    return (squared * kept).flatten(1).sum(1) / kept.flatten(1).sum(1)


def exact(found, held, x0, noise, space, mask, slopes):
    own = wide(found, leaves=True)
    a, s = (level.reshape(-1, *[1] * (x0.dim() - 1)) for level in (own.alpha, own.sigma))
    x = a * x0.double() + s * noise.double()
    answers = [from_prediction(one.prediction(x), own.alpha, own.sigma, space, 0.7) for one in (own, *([wide(held)] if held else []))]
    target = from_prediction(Prediction(x0.double(), noise.double()), own.alpha, own.sigma, space, 0.7)
    terms = [wide_mean_squared(answers[0], target, mask)]
    loss = (slopes[0].double() * terms[0]).sum()
    if held:
        terms += [wide_mean_squared(answers[1], target, mask), wide_mean_squared(answers[0], answers[1], mask)]
        loss = loss + (slopes[1].double() * terms[2]).sum()
    norms = [answer.flatten(1).norm(dim=1) for answer in answers]
    return terms, norms, torch.autograd.grad(loss, own.tensors, allow_unused=True)


def check(engine, shape, combination, kind="flow", space="flow", dtype=torch.float32, with_held=True, mask=None):
    found, held, _, x0, noise = noised(shape, combination, kind, dtype)
    held = held if with_held else None
    slopes = (normal((shape[0],), 3), normal((shape[0],), 4))
    got, grads = fused(engine, found, held, x0, noise, space, mask, slopes)
    terms, norms, expected = exact(found, held, x0, noise, space, mask, slopes)
    names = ("error", "error_reference", "gap")[:len(terms)]
    for name, term in zip((*names, "norm", "norm_reference"), (*terms, *norms), strict=False):
        torch.testing.assert_close(getattr(got, name).double(), term.detach(), rtol=1e-4 if name == "gap" else 5e-6, atol=1e-7)
    for grad, wanted, tensor in zip(grads, expected, found.tensors, strict=True):
        assert grad.dtype == tensor.dtype
        wanted = torch.zeros_like(tensor).double() if wanted is None else wanted
        step = torch.finfo(grad.dtype).eps
        assert (grad.double() - wanted).norm() <= (2e-5 + step) * wanted.norm() + 1e-12
        assert dtype == torch.float16 or wanted.norm() > 0 or 0 in combination.weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(engine, shape, dtype):
    check(engine, shape, COMBINATIONS[1], dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_every_kind_in_every_space(engine, kind, space):
    check(engine, (4, 3, 29), COMBINATIONS[1], kind, space)


@pytest.mark.parametrize("combination", [COMBINATIONS[2], COMBINATIONS[3], Combination((0.0, 2.0, -1.0))], ids=str)
def test_guidance(engine, combination):
    check(engine, (3, 1031), combination, "epsilon", "epsilon")


def masks(shape):
    return {"full": normal(shape, 5) > 0.3, "broadcast": (normal((shape[0], 1, *shape[2:]), 6) > -0.5)}


@pytest.mark.parametrize("which", ["full", "broadcast"])
@pytest.mark.parametrize("with_held", [True, False])
def test_masks(engine, which, with_held):
    shape = (3, 4, 1031)
    check(engine, shape, COMBINATIONS[1], with_held=with_held, mask=masks(shape)[which])


def test_without_a_reference(engine):
    check(engine, (3, 50), COMBINATIONS[1], with_held=False)


def test_end_points_of_a_policy_without_raw_outputs(engine):
    shape = (3, 50)
    found, held, x, x0, noise = noised(shape, COMBINATIONS[1])
    ends = [Outputs.of(one.prediction(x), one.alpha, one.sigma) for one in (found, held)]
    raw = fused(engine, found, held, x0, noise, "flow")
    got = fused(engine, *ends, x0, noise, "flow")
    for name in ("error", "error_reference", "gap", "norm", "norm_reference"):
        torch.testing.assert_close(getattr(got, name), getattr(raw, name), rtol=2e-5, atol=1e-7)


def test_before_the_first_update_both_errors_are_the_same_bits(engine):
    shape = (4, 9001)
    found, _, _, x0, noise = noised(shape, COMBINATIONS[2], "v_prediction", torch.bfloat16)
    got = fused(engine, found, found, x0, noise, "epsilon")
    assert torch.equal(got.error, got.error_reference)
    assert torch.equal(got.gap, torch.zeros(4))
    assert torch.equal(got.norm, got.norm_reference)


def test_batch_split_grid_address_and_stride_change_no_bit(engine):
    shape = (4, 3, 3003)
    found, held, _, x0, noise = noised(shape, COMBINATIONS[2], "epsilon", torch.bfloat16)
    slopes = (normal((4,), 3), normal((4,), 4))
    whole, grads = fused(engine, found, held, x0, noise, "flow", slopes=slopes)
    apart = [replace(one, tensors=tuple(spread(tensor, 3, k + 1) for k, tensor in enumerate(one.tensors))) for one in (found, held)]
    for blocks, rows in ((1, slice(0, 1)), (1000, slice(1, 4))):
        parts = [Outputs(tuple(tensor[rows] for tensor in one.tensors), one.alpha[rows], one.sigma[rows], one.readout) for one in apart]
        part, part_grads = fused(HostEngine(engine.folder, blocks), *parts, spread(x0, 1, 1)[rows], spread(noise, 8, 2)[rows], "flow",
                                 slopes=tuple(slope[rows] for slope in slopes))
        for name in ("error", "error_reference", "gap", "norm", "norm_reference", "count"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
        assert all(torch.equal(one, other[rows]) for one, other in zip(part_grads, grads, strict=True))


def test_an_empty_batch_is_empty(engine):
    found, held, _, x0, noise = noised((0, 7), COMBINATIONS[1])
    got, grads = fused(engine, found, held, x0, noise, "flow", slopes=(torch.zeros(0), torch.zeros(0)))
    assert got.error.shape == got.gap.shape == (0,)
    assert grads[0].shape == (0, 7)


def test_tensors_of_another_shape_are_refused_before_an_address_is_read(engine):
    found, held, _, x0, noise = noised((3, 50), COMBINATIONS[1])
    for wrong in ((found, held, x0, noise[:, :1]), (found, held, x0[:2], noise[:2])):
        with pytest.raises(ValueError, match="a fused operator takes tensors of one shape on one device"):
            fused(engine, *wrong, "flow")


@pytest.mark.parametrize("mask", [None, "full"])
def test_the_written_out_gradient_is_that_of_autograd(mask):
    shape = (3, 4, 11)
    found, held, _, x0, noise = noised(shape, COMBINATIONS[3], "epsilon")
    kept = None if mask is None else masks(shape)[mask]
    slopes = (normal((3,), 3).double(), normal((3,), 4).double())
    _, _, expected = exact(found, held, x0, noise, "v_prediction", kept, slopes)
    count = torch.full((3,), 44.0) if kept is None else kept.flatten(1).sum(1)
    formula = PairFormula(found.alpha, found.sigma, found.readout, "v_prediction", 0.7)
    got = backward(formula, x0.double(), noise.double(), wide(found).tensors, wide(held).tensors, kept, *slopes, count)
    for grad, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


def test_scalars_have_their_textbook_values():
    """An epsilon network judged in epsilon needs no x0; in flow space f - y = (1 + sigma / alpha)(m - noise)."""
    alpha, sigma = levels(3)
    readout = Readout(Combination((1.0,)), "epsilon")
    table = coefficients(PairFormula(alpha, sigma, readout, "epsilon", 0.5)).table
    assert torch.equal(table, torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0]]).double().expand(3, 5))
    table = coefficients(PairFormula(alpha, sigma, readout, "flow", 0.5)).table
    factor = 1 + sigma.double() / alpha.double()
    torch.testing.assert_close(table[:, 0], factor)
    torch.testing.assert_close(table[:, 1] - table[:, 3], torch.zeros(3).double())
    torch.testing.assert_close(table[:, 2] - table[:, 4], -factor)
    idle = Readout(Combination((0.0, 2.0, 0.0)), "epsilon")
    assert coefficients(PairFormula(alpha, sigma, idle, "epsilon", 0.5)).used == (1,)  # the others are not even read


def test_the_torch_backend_is_the_old_chain_bit_for_bit():
    """The error pass before there were operators: both roles' answers and the target in one space, squares, means; and its gradient."""
    shape = (3, 4, 9, 7)
    found, held, x, x0, noise = noised(shape, COMBINATIONS[2], "v_prediction", torch.bfloat16)

    def old(own):
        answers = [from_prediction(one.prediction(x), one.alpha, one.sigma, "flow", 0.5) for one in (own, held)]
        target = from_prediction(Prediction(x0=x0, x1=noise), own.alpha, own.sigma, "flow", 0.5)
        errors = [(answer.float() - target.float()).square().flatten(1).mean(dim=1) for answer in answers]
        return (*errors, mean_squared(*answers), *(answer.flatten(1).norm(dim=1) for answer in answers))

    def new(own):
        terms = paired_error(own, x, x0, noise, space="flow", reference_outputs=held, gap=True, norms=True)
        return tuple(getattr(terms, name) for name in NAMES)

    def gradient(function):
        leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in found.tensors)
        terms = function(replace(found, tensors=leaves))
        return torch.autograd.grad((terms[0] + terms[2]).sum(), leaves)

    for one, other in zip(old(found), new(found), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradient(old), gradient(new), strict=True):
        assert torch.equal(one, other)


def test_what_is_not_asked_for_is_not_computed():
    found, held, x, x0, noise = noised((2, 5), COMBINATIONS[1])
    alone = paired_error(found, x, x0, noise, space="flow")
    assert [getattr(alone, name) for name in NAMES[1:]] == [None] * 4
    assert paired_error(found, x, x0, noise, space="flow", reference_outputs=held).gap is None


def test_forward_and_backward_share_their_scalars():
    """Worked out once per set of levels, whatever tensors hold these."""
    found = noised((3, 5), COMBINATIONS[1], "epsilon")[0]
    one, other = (coefficients(PairFormula(found.alpha.to(dtype), found.sigma.to(dtype), found.readout, "flow", 0.5))
                  for dtype in (torch.float32, torch.float64))
    assert one is other
    assert coefficients(PairFormula(found.alpha, found.sigma, found.readout, "sample", 0.5)) is not one


def test_a_mask_of_numbers_is_refused_before_its_bytes_are_read(engine):
    found, held, _, x0, noise = noised((3, 50), COMBINATIONS[1])
    with pytest.raises(ValueError, match=r"must be bool, got torch.float32"):
        fused(engine, found, held, x0, noise, "flow", mask=(x0 > 0).float())


def test_a_mask_keeps_padding_out(engine):
    """Even NaN, in the gradient too."""
    found, held, x, x0, noise = noised((2, 3, 8), COMBINATIONS[1])
    mask = torch.arange(8) < 5
    poisoned = replace(found, tensors=(torch.where(mask, found.tensors[0], torch.nan),))
    got = paired_error(poisoned, x, x0, noise, space="flow", mask=mask)
    assert torch.equal(got.policy, reference(found, x, x0, noise, "flow", 0.5, None, mask, False, False).policy)
    slopes = (torch.ones(2), torch.ones(2))
    (one, one_grads), (other, other_grads) = (fused(engine, own, held, x0, noise, "flow", mask, slopes, norms=False)
                                              for own in (poisoned, found))
    assert torch.equal(one.error, other.error)
    assert torch.equal(one.gap, other.gap)
    assert torch.equal(one_grads[0], other_grads[0])


def test_wrong_calls_are_refused():
    found, held, x, x0, noise = noised((2, 5), COMBINATIONS[1])
    with pytest.raises(ValueError, match="sample 1 has no valid element in its mask"):
        paired_error(found, x, x0, noise, space="flow", mask=torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="differentiated in the policy's outputs alone"):
        paired_error(found, x, x0.clone().requires_grad_(), noise, space="flow")
    for combination, why in ((COMBINATIONS["rescale"], "'rescale' is not fused"),
                             (Combination((1.0, 1.0), axis=1, profile=((1.0,) * 5, (0.0,) * 5)), "differ along an axis")):
        other = noised((2, 5), combination)[0]
        with pytest.raises(ValueError, match=why):
            paired_error(other, x, x0, noise, space="flow", backend="cuda")
    with pytest.raises(ValueError, match="read in another way"):
        paired_error(found, x, x0, noise, space="flow", reference_outputs=Outputs.of(held.prediction(x), *levels(2)), backend="cuda")
