"""The ``torch.library`` operators: schema, fake kernels and autograd are consistent, and ``torch.compile`` keeps them whole."""

import pytest
import torch

from tests.kernels.cases import COMBINATIONS, ODE_STEP, STEP, normal, outputs
from visalign.kernels.formula import StepFormula
from visalign.kernels.guided_step import guided_step

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
