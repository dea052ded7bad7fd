"""The ``torch.library`` operators: schema, fake kernels and autograd are consistent, and ``torch.compile`` keeps them whole."""

import pytest
import torch

from tests.kernels.cases import COMBINATIONS, ODE_STEP, STEP, normal, outputs
from visalign.kernels.formula import StepFormula
from visalign.kernels.guided_step import guided_step
from visalign.kernels.paired_error import paired_error
from visalign.kernels.paired_error.formula import PairFormula
from visalign.kernels.transition_log_prob import transition_log_prob
from visalign.maths.outputs import Outputs

SHAPE = (3, 4, 5)


def guided_step_arguments(name=2, dtype=torch.bfloat16, num_terms=0, step=STEP, seeds=None, storage=torch.bfloat16):
    found = outputs(SHAPE, COMBINATIONS[name], "v_prediction", dtype, num_terms)
    noise = normal(SHAPE, 9) if step.std > 0 and seeds is None else None
    gradients = [term.gradient for term in found.terms]
    return (normal(SHAPE, 0), list(found.tensors), gradients, noise, seeds, storage, step.std > 0, True, False,
            *StepFormula.of(found, step).flat())


GUIDED_STEPS = [guided_step_arguments(), guided_step_arguments("rescale", torch.float32, 2, storage=None),
                guided_step_arguments(1, step=ODE_STEP), guided_step_arguments(seeds=torch.tensor([1, 2, 3]))]


@pytest.mark.parametrize("arguments", GUIDED_STEPS)
def test_guided_step_passes_opcheck(arguments):
    torch.library.opcheck(torch.ops.visalign.guided_step.default, arguments)


def test_guided_step_on_the_cpu_is_the_reference():
    found, x, noise = outputs(SHAPE, COMBINATIONS["rescale"], "epsilon", torch.bfloat16, 1), normal(SHAPE, 0), normal(SHAPE, 9)
    plain = guided_step(found, x, STEP, noise=noise, storage_dtype=torch.bfloat16, log_prob=True, velocity=True, mean=True)
    op = torch.ops.visalign.guided_step(x, list(found.tensors), [found.terms[0].gradient], noise, None, torch.bfloat16, True, True, True,
                                        *StepFormula.of(found, STEP).flat())
    for value, expected in zip(op, (plain.x_next, plain.log_prob, plain.velocity, plain.mean), strict=True):
        assert torch.equal(value, expected)


def test_compile_keeps_guided_step_in_one_graph():
    graphs = []

    def backend(module, inputs):
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    def step(x, first, second, noise):
        made = torch.ops.visalign.guided_step(x * 1.0, [first, second], [], noise, None, torch.bfloat16, True, False, False, *flat)
        return made[0].float() + 1, made[1]

    found = outputs(SHAPE, COMBINATIONS[2])
    flat = StepFormula.of(found, STEP).flat()
    inputs = (normal(SHAPE, 0), *found.tensors, normal(SHAPE, 9))
    compiled = torch.compile(step, fullgraph=True, backend=backend)(*inputs)
    assert [torch.equal(a, b) for a, b in zip(compiled, step(*inputs), strict=True)] == [True, True]
    assert len(graphs) == 1
    assert torch.ops.visalign.guided_step in graphs[0] or torch.ops.visalign.guided_step.default in graphs[0]
    aot = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(aot[0], compiled[0])


def log_prob_arguments(name=2, dtype=torch.float32, with_held=True, with_old=True, grad=True):
    found = outputs(SHAPE, COMBINATIONS[name], "v_prediction", dtype)
    held = [tensor + 0.1 for tensor in found.tensors] if with_held else []
    return (normal(SHAPE, 0), normal(SHAPE, 7), [tensor.requires_grad_(grad) for tensor in found.tensors], held,
            normal(SHAPE, 8) if with_old else None, *StepFormula.of(found, STEP).flat())


@pytest.mark.parametrize("arguments", [
    log_prob_arguments(), log_prob_arguments(1, with_held=False, with_old=False), log_prob_arguments("rescale", with_old=False),
    log_prob_arguments(3, torch.bfloat16, with_held=False)])
def test_transition_log_prob_passes_opcheck(arguments):
    torch.library.opcheck(torch.ops.visalign.transition_log_prob.default, arguments)


@pytest.mark.parametrize("name", [2, "rescale"])
def test_transition_log_prob_backward_passes_opcheck(name):
    x, x_next, tensors, held, velocity, *flat = log_prob_arguments(name, grad=False)
    *_, moments, factor, held_factor = torch.ops.visalign.transition_log_prob(x, x_next, tensors, held, velocity, *flat)
    slopes = [normal((3,), 20 + k) for k in range(3)]
    torch.library.opcheck(torch.ops.visalign.transition_log_prob_backward.default,
                          (*slopes, moments, factor, held_factor, x, x_next, tensors, held, velocity, *flat))


@pytest.mark.parametrize("name", [2, "rescale", "rescale, idle row"])
def test_the_operators_gradient_is_that_of_the_reference(name):
    """The registered backward against autograd through the formula, float32."""
    x, x_next, tensors, held, velocity, *flat = log_prob_arguments(name)
    made = torch.ops.visalign.transition_log_prob(x, x_next, tensors, held, velocity, *flat)
    found = outputs(SHAPE, COMBINATIONS[name], "v_prediction")
    leaves = Outputs(tuple(tensor.detach().requires_grad_() for tensor in tensors), found.alpha, found.sigma, found.readout)
    terms = transition_log_prob(leaves, x, x_next, STEP, reference_outputs=Outputs(tuple(held), found.alpha, found.sigma, found.readout),
                                velocity_old=velocity, backend="torch")
    weights = [normal((3,), 20 + k) for k in range(3)]
    operator = sum((weight * part).sum() for weight, part in zip(weights, made[:3], strict=True))
    plain = sum((weight * part).sum() for weight, part in zip(weights, (terms.log_prob, terms.kl_reference, terms.kl_old), strict=True))
    assert torch.equal(operator.detach(), plain.detach())
    got = torch.autograd.grad(operator, list(tensors), allow_unused=True)
    for grad, wanted in zip(got, torch.autograd.grad(plain, leaves.tensors, allow_unused=True), strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if wanted is None else wanted, rtol=1e-5, atol=1e-5)


def test_compile_keeps_transition_log_prob_and_its_gradient():
    x, x_next, tensors, held, velocity, *flat = log_prob_arguments()

    def loss(first, second):
        made = torch.ops.visalign.transition_log_prob(x, x_next, [first * 2, second], held, velocity, *flat)
        return (made[0] + made[1] + made[2]).sum()

    def gradient(function):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(*leaves), leaves)

    for one, other in zip(gradient(torch.compile(loss, fullgraph=True, backend="aot_eager")), gradient(loss), strict=True):
        assert torch.equal(one, other)


def pair_arguments(name=1, kind="epsilon", space="flow", with_held=True, masked=False, norms=True, grad=True):
    found = outputs(SHAPE, COMBINATIONS[name], kind)
    alpha, sigma = torch.tensor([0.3, 0.5, 0.9]), torch.tensor([0.8, 0.5, 0.1])
    x0, noise = normal(SHAPE, 5), normal(SHAPE, 6)
    x = alpha.reshape(3, 1, 1) * x0 + sigma.reshape(3, 1, 1) * noise
    held = [tensor + 0.1 for tensor in found.tensors] if with_held else []
    return (x, x0, noise, [tensor.requires_grad_(grad) for tensor in found.tensors], held, x > 0 if masked else None, norms,
            *PairFormula(alpha, sigma, found.readout, space, 0.5).flat())


@pytest.mark.parametrize("arguments", [pair_arguments(), pair_arguments(2, "flow", "epsilon", with_held=False, norms=False),
                                       pair_arguments(3, masked=True)])
def test_paired_error_passes_opcheck(arguments):
    torch.library.opcheck(torch.ops.visalign.paired_error.default, arguments)


def test_paired_error_backward_passes_opcheck():
    _, x0, noise, tensors, held, mask, _, *flat = pair_arguments(2, masked=True, grad=False)
    slopes, count = (normal((3,), 20), normal((3,), 21)), mask.flatten(1).sum(1).float()
    torch.library.opcheck(torch.ops.visalign.paired_error_backward.default, (*slopes, count, x0, noise, tensors, held, mask, *flat))


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_paired_error_is_that_of_the_reference(masked):
    x, x0, noise, tensors, held, mask, norms, *flat = pair_arguments(3, masked=masked)
    made = torch.ops.visalign.paired_error(x, x0, noise, tensors, held, mask, norms, *flat)
    formula = PairFormula.from_flat(*flat)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    terms = paired_error(formula.outputs(leaves), x, x0, noise, space=formula.space, reference_outputs=formula.outputs(held), mask=mask,
                         gap=True, norms=True)
    assert [torch.equal(a, b) for a, b in zip(made, (terms.policy, terms.reference, terms.gap, terms.norm_policy, terms.norm_reference),
                                              strict=False)] == [True] * 5
    weights = normal((3,), 20), normal((3,), 21)
    operator = (weights[0] * made[0] + weights[1] * made[2]).sum()
    plain = (weights[0] * terms.policy + weights[1] * terms.gap).sum()
    for grad, wanted in zip(torch.autograd.grad(operator, tensors), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_compile_keeps_paired_error_and_its_gradient():
    x, x0, noise, tensors, held, mask, norms, *flat = pair_arguments()

    def loss(output):
        made = torch.ops.visalign.paired_error(x, x0, noise, [output * 2], held, mask, norms, *flat)
        return (made[0] + made[2]).sum()

    def gradient(function):
        leaf = tensors[0].detach().clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    assert torch.equal(gradient(torch.compile(loss, fullgraph=True, backend="aot_eager")), gradient(loss))


@pytest.mark.parametrize("operator", ["transition_log_prob", "paired_error"])
def test_a_second_derivative_is_refused(operator):
    """Their backward is a kernel: autograd cannot see into it, and would take the gradient for a constant."""
    arguments = log_prob_arguments() if operator == "transition_log_prob" else pair_arguments()
    tensors = next(argument for argument in arguments if isinstance(argument, list))
    made = getattr(torch.ops.visalign, operator)(*arguments)[0]
    (gradient, *_) = torch.autograd.grad(made.sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again; use kernels: torch for second derivatives"):
        torch.autograd.grad(gradient.square().sum(), tensors)
