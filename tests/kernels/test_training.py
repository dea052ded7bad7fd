"""Sampling and updates through the operators: the old formulas bit for bit on PyTorch, and the CUDA sources in a whole run on the host."""

import json
import math
from dataclasses import replace

import pytest
import torch

from scripts.tiny_families import by_name
from tests import gaussian_run
from visalign.algorithms import grpo
from visalign.algorithms.grpo import GRPO
from visalign.algorithms.noising import Times
from visalign.algorithms.preference import PreferenceOptimisation
from visalign.kernels.ask import outputs_of
from visalign.kernels.guided_step.reference import Step
from visalign.kernels.transition_log_prob.reference import StepTerms
from visalign.maths.preference import bind_loss
from visalign.samplers import rollout as sampling
from visalign.samplers.dynamics import ODE, FlowSDE
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import generate, rollout
from visalign.samplers.steps import AllSteps, NoSteps
from visalign.types import Batch, Experience, Prompt

PROMPTS = [Prompt("a red circle"), Prompt("a blue square")]


def plain_step(outputs, x, transition, *, noise=None, seeds=None, storage_dtype=None, log_prob=False, velocity=False, mean=False, backend):
    """The rollout's formulas as they stood in the rollout, operation by operation."""
    x0, x1 = outputs.tensors
    middle = after = transition.A * x0 + transition.B * x1
    density = None
    if noise is not None:
        after = middle + transition.std * noise.to(middle)
        after = after if storage_dtype is None else after.to(storage_dtype)
    if log_prob:
        z = (after.float() - middle) / transition.std
        density = (-0.5 * z.square() - math.log(transition.std) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(dim=1)
    return Step(after, density, x1 - x0 if velocity else None)


def plain_terms(outputs, x, x_next, transition, *, reference_outputs=None, velocity_old=None, backend):
    """GRPO's density and divergences as they stood in its loss."""
    def c_v_of(tensors):
        c_v = (outputs.alpha * transition.B - outputs.sigma * transition.A) / (outputs.alpha + outputs.sigma)
        return c_v * (tensors[1] - tensors[0])

    def kl(first, second):
        return 0.5 * ((first - second) / transition.std).square().flatten(1).sum(dim=1)

    x0, x1 = outputs.tensors
    z = (x_next.to(x0) - (transition.A * x0 + transition.B * x1)) / transition.std
    density = (-0.5 * z.square() - math.log(transition.std) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(dim=1)
    c_v = (outputs.alpha * transition.B - outputs.sigma * transition.A) / (outputs.alpha + outputs.sigma)
    velocity = x1 - x0
    kl_old = kl(c_v_of(outputs.tensors), c_v * velocity_old)
    gap = (velocity.detach() - velocity_old).flatten(1).norm(dim=1) / velocity_old.flatten(1).norm(dim=1).clamp(min=1e-12)
    held = None if reference_outputs is None else kl(c_v_of(outputs.tensors), c_v_of(reference_outputs.tensors))
    return StepTerms(density, held, kl_old, gap)


@pytest.mark.parametrize("surrogate", ["clip", "guard"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_run_on_the_torch_backend_is_what_it_was_before_there_were_operators(tmp_path, monkeypatch, surrogate, storage):
    """Six iterations of GRPO on the Gaussian policy with KL: metrics equal to the last bit, and so are the weights."""
    settings = gaussian_run.config(f"algorithm.surrogate={surrogate}")
    sampler = replace(gaussian_run.parts(settings).sampler, storage_dtype=getattr(torch, storage), backend="torch")
    ours = gaussian_run.go(tmp_path / "operators", settings, sampler=sampler)
    monkeypatch.setattr(sampling, "guided_step", plain_step)
    monkeypatch.setattr(grpo, "transition_log_prob", plain_terms)
    plain = gaussian_run.go(tmp_path / "plain", settings, sampler=sampler)
    assert torch.equal(ours.policy.shift, plain.policy.shift)
    first, second = ([{key: value for key, value in json.loads(line).items() if not key.startswith("time")}
                      for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("operators", "plain"))
    assert first == second
    assert len(first) > 6


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", ["generator", "philox"])
def test_a_run_on_the_kernels_trains_as_on_torch(tmp_path, kernels_on_cpu, storage, noise):
    """Through loop, invariants and checkpoints; equal to 1e-4 after six iterations, because rounding differs."""
    settings = gaussian_run.config()
    common = {"storage_dtype": storage, "noise": noise}
    found = {}
    for backend in ("torch", "cuda"):
        parts = gaussian_run.parts(settings)
        found[backend] = gaussian_run.go(tmp_path / backend, settings, sampler=replace(parts.sampler, backend=backend, **common),
                                         algorithm=replace(parts.algorithm, backend=backend)).policy.shift.detach()
    assert {"guided_step", "transition_log_prob", "transition_log_prob_backward"} <= set(kernels_on_cpu)
    torch.testing.assert_close(found["cuda"], found["torch"], rtol=2e-3, atol=1e-4)
    assert found["torch"].abs().max() > 1e-2


@pytest.fixture(scope="module", params=["Stable Diffusion 3", "Stable Diffusion, zero SNR", "Flux, true CFG"])
def trained(request):
    """Guided pipelines (linear, with rescale, with two calls) with an adapter that has moved away from its reference."""
    family = by_name(request.param)
    policy = PipelinePolicy.from_pipeline(family.build(), **{**family.call, "num_inference_steps": 4})
    policy.roles.add_lora(rank=2)
    return policy


def move(policy, by):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.named_trainable().values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def update(policy, algorithm, made):
    """Losses, maxima and gradients of one optimizer step."""
    policy.train(True)
    for parameter in policy.named_trainable().values():
        parameter.grad = None
    advantage = torch.randn(made.num_samples, 1, generator=torch.Generator().manual_seed(5)).expand(-1, max(1, len(made.transitions)))
    experience = Experience(made, advantage, torch.ones(made.num_samples, dtype=torch.bool), 0, advantage[:, 0])
    terms = []
    for part in algorithm.microbatches(policy, Batch(experience, torch.arange(made.num_samples), float(made.num_samples)), 2, 0):
        terms.append(algorithm.loss(policy, part))
        terms[-1].loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.named_trainable().values() if parameter.grad is not None])
    return terms, gradient


def test_grpo_on_a_guided_pipeline(trained, kernels_on_cpu):
    """Before the first update nothing deviates, exactly; afterwards the gradient is that of the formulas, to rounding."""
    made = rollout(trained, PROMPTS, 2, FlowSDE(0.3), AllSteps(), seed=0, microbatch=2, storage_dtype=torch.bfloat16, backend="cuda")
    algorithm = GRPO(clip=0.5, surrogate="guard", kl_weight=0.1, backend="cuda")
    terms, _ = update(trained, algorithm, made)
    for term in terms:
        assert term.maxima == {"policy/ratio_deviation": 0.0, "policy/output_gap": 0.0, "policy/kl_reference": 0.0}
    again = GRPO(old_log_prob="recomputed", backend="cuda").prepare(
        trained, Experience(made, torch.zeros(4, 3), torch.ones(4, dtype=torch.bool), 0, torch.zeros(4)), 2).trajectory
    assert torch.equal(again.log_prob, made.log_prob)
    assert torch.equal(again.prediction, made.prediction)
    move(trained, 0.02)
    losses, gradients = zip(*((terms, gradient) for terms, gradient in (update(trained, replace(algorithm, backend=backend), made)
                                                                        for backend in ("cuda", "torch"))), strict=True)
    move(trained, -0.02)
    for one, other in zip(*losses, strict=True):
        assert float(one.loss.detach()) == pytest.approx(float(other.loss.detach()), rel=1e-4, abs=1e-7)
        assert one.maxima["policy/kl_reference"] == pytest.approx(other.maxima["policy/kl_reference"], rel=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()
    assert set(kernels_on_cpu) >= {"guided_step", "transition_log_prob", "transition_log_prob_backward"}


def test_preference_optimisation_on_a_pipeline(trained, kernels_on_cpu):
    if trained.capture.plans[0].combination.correction != "none":
        pytest.skip("errors of a rescaled combination are not fused")
    made = rollout(trained, PROMPTS, 2, ODE(), NoSteps(), seed=0, microbatch=2)
    method = PreferenceOptimisation(bind_loss("dpo"), kappa=100.0, reference_weight=0.1, times=Times("uniform", low=0.2, high=0.9),
                                    backend="cuda")
    terms, _ = update(trained, method, made)
    assert all(term.maxima["policy/error_gap"] == 0.0 for term in terms)
    move(trained, 0.02)
    (one, first), (other, second) = (update(trained, replace(method, backend=backend), made) for backend in ("cuda", "torch"))
    move(trained, -0.02)
    for term, expected in zip(one, other, strict=True):
        for name, (total, _) in term.metrics.items():
            assert total == pytest.approx(expected.metrics[name][0], rel=2e-3, abs=1e-5), name
    assert (first - second).norm() < 1e-3 * second.norm()
    assert set(kernels_on_cpu) >= {"paired_error", "paired_error_backward"}


def test_sampling_a_guided_pipeline(trained, kernels_on_cpu):
    one, other = (generate(trained, PROMPTS, [1, 2], backend=backend) for backend in ("cuda", "torch"))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert "guided_step" in kernels_on_cpu
    assert "guided_step_finish" not in kernels_on_cpu  # no density was asked for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_the_networks_own_and_determine_the_prediction(dtype):
    family = by_name("Stable Diffusion 3")
    policy = PipelinePolicy.from_pipeline(family.build().to(dtype=dtype), **family.call)
    x, conditioning = policy.initial_latents([1, 2]), policy.encode(PROMPTS)
    with torch.no_grad():
        found, prediction = outputs_of(policy, x, 1, conditioning), policy.predict(x, 1, conditioning)
    assert [tensor.dtype for tensor in found.tensors] == [dtype] * 2
    assert found.readout.combination.weights == policy.capture.plans[1].combination.weights
    assert torch.equal(found.prediction(x).x0, prediction.x0)
    assert prediction.x0.dtype == torch.float32
