"""The kernels on a device. Run once wherever a GPU is at hand: ``scripts/gpu_checks.sh``.

Bits are compared with the same sources on the host, where every other test of this folder has compared them with float64 formulas. What is
left is what only a device has: its instructions, streams, threads, graphs, several cards, tensors of more than 2^31 elements.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import COMBINATIONS, DTYPES, ODE_STEP, SHAPES, STEP, normal, outputs
from tests.kernels.test_paired_error import fused as pair
from tests.kernels.test_paired_error import masks, noised
from tests.kernels.test_transition_log_prob import fused as terms_of
from tests.kernels.test_transition_log_prob import slopes_of, stored
from visalign.kernels.arguments import CHUNK
from visalign.kernels.backend import device_name, resolve
from visalign.kernels.formula import StepFormula
from visalign.kernels.guided_step import guided_step, run
from visalign.kernels.launch import engine_of
from visalign.kernels.paired_error import paired_error
from visalign.kernels.transition_log_prob import transition_log_prob
from visalign.maths.combination import Combination
from visalign.maths.outputs import GradientTerm, Outputs, Readout
from visalign.maths.philox import philox_normal
from visalign.types import Transition

pytestmark = pytest.mark.gpu
SIZES = [*SHAPES, (3, 2 * CHUNK + 8), (300, 41)]


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def move(value, device):
    """Tensors, and what holds them, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Outputs):
        terms = tuple(GradientTerm(term.gradient.to(device), term.max_ratio) for term in value.terms)
        return Outputs(tuple(tensor.to(device) for tensor in value.tensors), value.alpha, value.sigma, value.readout, terms)
    return None if value is None else replace(value, **{name: part.to(device) for name, part in vars(value).items()})


def step(engine, found, x, transition=STEP, noise=None, seeds=None, storage=None):
    return run(engine, x, found.tensors, [term.gradient for term in found.terms], noise, seeds, storage, transition.std > 0, True, True,
               StepFormula.of(found, transition))


def assert_same(on_device, on_host):
    for one, other in zip(on_device, on_host, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_guided_step_has_the_bits_of_the_host(engine, device, shape, dtype, name):
    found, x, noise = outputs(shape, COMBINATIONS[name], "v_prediction", dtype, num_terms=2), normal(shape, 0), normal(shape, 9)
    if name in ("rescale", "rescale, idle row") and shape == (1, 1):
        pytest.skip("one element has no spread")
    assert_same(step(engine_of(device), move(found, device), move(x, device), STEP, move(noise, device), None, dtype),
                step(engine, found, x, STEP, noise, None, dtype))


@pytest.mark.parametrize("shape", [(5, 123), (2, 3 * CHUNK + 5)], ids=str)
def test_noise_has_the_bits_of_the_host_and_is_that_of_the_reference(engine, device, shape):
    found, x = outputs(shape, COMBINATIONS[1]), torch.zeros(shape)
    seeds, pure = torch.arange(shape[0]) * 2**55 + 3, Transition(A=0.0, B=0.0, std=1.0)
    drawn = step(engine_of(device), move(found, device), move(x, device), pure, None, move(seeds, device))
    assert_same(drawn, step(engine, found, x, pure, None, seeds))
    assert (drawn[0].cpu() - philox_normal(seeds, shape[1:])).abs().max() < 4 * 2.0**-22


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", [1, 2, "rescale"])
def test_transition_log_prob_has_the_bits_of_the_host(engine, device, shape, dtype, name):
    found = outputs(shape, COMBINATIONS[name], "epsilon", dtype)
    if name == "rescale" and shape == (1, 1):
        pytest.skip("one element has no spread")
    x, x_next, held, velocity = stored(shape, found, dtype)
    slopes = slopes_of(shape[0])
    given = (found, x, x_next, held, velocity, slopes)
    got, grads = terms_of(engine_of(device), *(move(value, device) for value in given))
    expected, expected_grads = terms_of(engine, *given)
    assert_same(vars(got).values(), vars(expected).values())
    assert_same(grads, expected_grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_paired_error_has_the_bits_of_the_host(engine, device, shape, dtype, masked):
    found, held, _, x0, noise = noised(shape, COMBINATIONS[2], "v_prediction", dtype)
    mask = masks((*shape, 1))["full"].reshape(shape) | (torch.arange(shape[-1]) == 0) if masked else None
    slopes = (normal((shape[0],), 3), normal((shape[0],), 4))
    got, grads = pair(engine_of(device), move(found, device), move(held, device), move(x0, device), move(noise, device), "flow",
                      move(mask, device), tuple(move(slope, device) for slope in slopes))
    expected, expected_grads = pair(engine, found, held, x0, noise, "flow", mask, slopes)
    assert_same(vars(got).values(), vars(expected).values())
    assert_same(grads, expected_grads)


def offset(tensor, by):
    """The same values ``by`` elements into a larger storage."""
    return tensor.new_empty(tensor.numel() + by)[by:].reshape(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_and_strides_change_no_bit(engine, device, dtype):
    """A device faults on a 128-bit access that is not aligned, a host does not: odd offsets, odd rows, rows apart, transposed, masks."""
    shape = (3, 5, 823)
    found, x, noise = outputs(shape, COMBINATIONS[2], dtype=dtype, num_terms=1), normal(shape, 0), normal(shape, 9)
    expected = step(engine, found, x, STEP, noise, None, dtype)
    there = move(found, device)
    apart = replace(there, tensors=tuple(offset(tensor, k + 1) for k, tensor in enumerate(there.tensors)))
    gaps = torch.empty(3, 6, 823, device=device)[:, 1:]
    transposed = replace(there, tensors=tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in there.tensors))
    for given, state in ((apart, offset(x.to(device), 1)), (transposed, gaps.copy_(x))):
        assert_same(step(engine_of(device), given, state, STEP, offset(noise.to(device), 3), None, dtype), expected)
    own, held, _, x0, noise = noised(shape, COMBINATIONS[2], "v_prediction", dtype)
    mask, slopes = masks(shape)["broadcast"], (normal((3,), 3), normal((3,), 4))
    got, grads = pair(engine_of(device), *(replace(move(one, device), tensors=tuple(offset(tensor.to(device), 1) for tensor in one.tensors))
                                           for one in (own, held)), offset(x0.to(device), 2), offset(noise.to(device), 1), "flow",
                      move(mask, device), tuple(slope.to(device) for slope in slopes))
    expected, expected_grads = pair(engine, own, held, x0, noise, "flow", mask, slopes)
    assert_same(vars(got).values(), vars(expected).values())
    assert_same(grads, expected_grads)


def test_auto_takes_the_kernels_and_names_the_device(device, caplog):
    assert resolve("auto", "guided_step", [torch.zeros(1, device=device)]) == "cuda"
    assert f"sm_{engine_of(device).arch}" in device_name(device.index)
    assert resolve("auto", "guided_step", [torch.zeros(1, device=device, dtype=torch.float64)]) == "torch"


@pytest.mark.parametrize("name", [2, "rescale"])
def test_the_wrappers_agree_with_pytorch_on_the_device(device, name):
    """Forward and gradients through autograd, which runs backward on a thread of its own; float32, 1e-4."""
    shape = (4, 16, 32, 32)
    found = move(outputs(shape, COMBINATIONS[name], "v_prediction"), device)
    x, noise = normal(shape, 0).to(device), normal(shape, 9).to(device)
    made = [guided_step(found, x, STEP, noise=noise, log_prob=True, velocity=True, backend=backend) for backend in ("cuda", "torch")]
    torch.testing.assert_close(made[0].x_next, made[1].x_next, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(made[0].log_prob, made[1].log_prob, rtol=1e-5, atol=0)
    held = replace(found, tensors=tuple(tensor + 0.05 for tensor in found.tensors))
    gradients = []
    for backend in ("cuda", "torch"):
        leaves = tuple(tensor.clone().requires_grad_() for tensor in found.tensors)
        terms = transition_log_prob(replace(found, tensors=leaves), x, made[0].x_next, STEP, reference_outputs=held,
                                    velocity_old=made[0].velocity + 0.01, backend=backend)
        (terms.log_prob + terms.kl_reference + terms.kl_old).sum().backward()
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in leaves]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_paired_error_agrees_with_pytorch_on_the_device(device):
    shape = (4, 16, 32, 32)
    found, held, x, x0, noise = (move(value, device) for value in noised(shape, COMBINATIONS[1], "epsilon", torch.bfloat16))
    gradients = []
    for backend in ("cuda", "torch"):
        leaf = found.tensors[0].clone().requires_grad_()
        terms = paired_error(replace(found, tensors=(leaf,)), x, x0, noise, space="flow", reference_outputs=held, gap=True, norms=True,
                             backend=backend)
        (terms.policy - terms.reference + terms.gap).sum().backward()
        gradients.append(leaf.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()  # stored in bfloat16


def test_before_the_first_update_nothing_deviates(device):
    """Ratio 1 and distance 0, exactly, whatever the batch split; twice, for races."""
    shape = (64, 16, 64, 64)
    found, x = move(outputs(shape, COMBINATIONS[2], "flow", torch.bfloat16), device), normal(shape, 0).to(device).bfloat16()
    seeds = torch.arange(64, device=device)
    made = guided_step(found, x.float(), STEP, seeds=seeds, storage_dtype=torch.bfloat16, log_prob=True, velocity=True, backend="cuda")
    for size in (64, 64, 1, 7):
        for rows in torch.arange(64).split(size):
            part = replace(found, tensors=tuple(tensor[rows] for tensor in found.tensors))
            terms = transition_log_prob(part, x[rows], made.x_next[rows], STEP, reference_outputs=part, velocity_old=made.velocity[rows],
                                        backend="cuda")
            assert torch.equal(terms.log_prob, made.log_prob[rows])
            assert not any(bool(value.any()) for value in (terms.kl_reference, terms.kl_old, terms.output_gap))
            again = guided_step(part, x[rows].float(), STEP, seeds=seeds[rows], storage_dtype=torch.bfloat16, backend="cuda")
            assert torch.equal(again.x_next, made.x_next[rows])


def test_work_is_ordered_by_the_current_stream(device):
    """A long product on a side stream delays the inputs; the kernel must wait for it and nothing else."""
    shape, side = (8, 16, 64, 64), torch.cuda.Stream(device)
    found, x = move(outputs(shape, COMBINATIONS[1]), device), normal(shape, 0).to(device)
    expected = guided_step(found, 2 * x, ODE_STEP, backend="cuda").x_next
    big = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side):
        late = 2 * x + 0 * (big @ big)[0, 0]
        made = guided_step(found, late, ODE_STEP, backend="cuda").x_next
        total = made.sum()
    side.synchronize()
    assert torch.equal(made, expected)
    assert bool(torch.isfinite(total))


def test_paired_error_does_not_wait_for_the_device(device):
    """Its scalars are copied behind what is queued: when both passes have been called the stream has not come to them yet."""
    shape = (4, 16, 32, 32)
    found, held, x, x0, noise = (move(value, device) for value in noised(shape, COMBINATIONS[1], "epsilon", torch.bfloat16))
    leaf = found.tensors[0].requires_grad_()
    begun = torch.cuda.Event()
    for spin in (1, 2**31):  # compiled and loaded in the first round
        torch.cuda.synchronize(device)
        torch.cuda._sleep(spin)
        begun.record()
        terms = paired_error(found, x, x0, noise, space="flow", reference_outputs=held, backend="cuda")
        torch.autograd.grad((terms.policy - terms.reference).sum(), leaf)
    assert not begun.query()


def test_a_thread_without_a_context_can_launch(device):
    shape = (2, 4096)
    found, x = move(outputs(shape, COMBINATIONS[1]), device), normal(shape, 0).to(device)
    expected, answers = guided_step(found, x, ODE_STEP, backend="cuda").x_next, []
    thread = threading.Thread(target=lambda: answers.append(guided_step(found, x, ODE_STEP, backend="cuda").x_next.cpu()))
    thread.start()
    thread.join()
    assert torch.equal(answers[0], expected.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_a_device_that_is_not_current():
    shape = (2, 4096)
    found, x = outputs(shape, COMBINATIONS[1]), normal(shape, 0)
    made = [guided_step(move(found, device), x.to(device), ODE_STEP, backend="cuda").x_next for device in ("cuda:1", "cuda:0")]
    assert made[0].device.index == 1
    assert torch.equal(made[0].cpu(), made[1].cpu())
    assert torch.cuda.current_device() == 0


def test_a_captured_graph_replays(device):
    shape = (4, 16, 64, 64)
    found, x = move(outputs(shape, COMBINATIONS[2], dtype=torch.bfloat16), device), normal(shape, 0).to(device)
    seeds = torch.arange(4, device=device)
    guided_step(found, x, STEP, seeds=seeds, log_prob=True, backend="cuda")  # compiled and loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = guided_step(found, x, STEP, seeds=seeds, log_prob=True, backend="cuda")
    x.copy_(normal(shape, 1))
    seeds.add_(100)
    graph.replay()
    expected = guided_step(found, x, STEP, seeds=seeds, log_prob=True, backend="cuda")
    assert torch.equal(made.x_next, expected.x_next)
    assert torch.equal(made.log_prob, expected.log_prob)


def test_more_than_two_to_the_31_elements(device):
    """Row offsets need 64 bits: the last row alone gives the same bits. About 26 GB."""
    rows, dims = 3, 2**30 + 8
    if torch.cuda.mem_get_info(device)[0] < 30 * 2**30:
        pytest.skip("less than 30 GB free")
    x = torch.empty(rows, dims, dtype=torch.bfloat16, device=device).normal_()
    output, seeds = torch.empty_like(x).normal_(), torch.arange(rows, device=device)
    found = Outputs((output,), 0.6, 0.8, Readout(Combination((1.0,)), "flow"))
    made = guided_step(found, x, STEP, seeds=seeds, storage_dtype=torch.bfloat16, log_prob=True, backend="cuda")
    last = guided_step(replace(found, tensors=(output[2:],)), x[2:], STEP, seeds=seeds[2:], storage_dtype=torch.bfloat16, log_prob=True,
                       backend="cuda")
    assert torch.equal(made.x_next[2:], last.x_next)
    assert torch.equal(made.log_prob[2:], last.log_prob)


def test_operators_pass_opcheck_on_the_device(device):
    from tests.kernels.test_operators import guided_step_arguments, log_prob_arguments, pair_arguments

    for operator, arguments in (("guided_step", guided_step_arguments()), ("guided_step", guided_step_arguments("rescale", num_terms=1)),
                                ("transition_log_prob", log_prob_arguments("rescale")), ("paired_error", pair_arguments(masked=True))):
        levels = {"paired_error": (7, 8)}.get(operator, ())  # alpha and sigma stay on the CPU
        moved = [argument if place in levels else on(argument, device) for place, argument in enumerate(arguments)]
        torch.library.opcheck(getattr(torch.ops.visalign, operator).default, tuple(moved))


def on(argument, device):
    if isinstance(argument, list):
        return [on(one, device) for one in argument]
    return argument.detach().to(device).requires_grad_(argument.requires_grad) if isinstance(argument, torch.Tensor) else argument


def test_inductor_keeps_the_operator(device):
    shape = (4, 16, 64, 64)
    found, x, noise = move(outputs(shape, COMBINATIONS[2], dtype=torch.bfloat16), device), normal(shape, 0), normal(shape, 9)
    flat = StepFormula.of(found, STEP).flat()

    def sample(x, first, second, noise):
        made = torch.ops.visalign.guided_step(x * 2, [first, second], [], noise, None, torch.bfloat16, True, False, False, *flat)
        return made[0].float() * 3, made[1]

    inputs = (x.to(device), *found.tensors, noise.to(device))
    for one, other in zip(torch.compile(sample, fullgraph=True)(*inputs), sample(*inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_a_pipeline_trains_on_the_device(device):
    """GRPO on a tiny guided pipeline in bfloat16: the invariants hold at the start, and an update moves the weights."""
    pytest.importorskip("diffusers")
    from scripts.tiny_families import by_name
    from tests.kernels.test_training import PROMPTS, update
    from visalign.algorithms.grpo import GRPO
    from visalign.invariants import check_first_update
    from visalign.samplers.dynamics import FlowSDE
    from visalign.samplers.policy import PipelinePolicy
    from visalign.samplers.rollout import rollout
    from visalign.samplers.steps import AllSteps

    family = by_name("Stable Diffusion 3")
    policy = PipelinePolicy.from_pipeline(family.build().to(device, torch.bfloat16), **{**family.call, "num_inference_steps": 4})
    policy.roles.add_lora(rank=2)
    made = rollout(policy, PROMPTS, 2, FlowSDE(0.3), AllSteps(), seed=0, microbatch=2, storage_dtype=torch.bfloat16, noise="philox",
                   backend="cuda")
    terms, gradient = update(policy, GRPO(clip=0.5, surrogate="guard", kl_weight=0.1, backend="cuda"), made)
    for term in terms:
        check_first_update(term.maxima, iteration=0, dtype="bfloat16", num_dims=made.num_dims)
    assert gradient.norm() > 0
