"""Losses on clean samples through real captured pipelines of every kind: image, video and audio; UNets, transformers; eps, v, flow."""

import pytest
import torch

from scripts.tiny_families import by_name
from visalign.algorithms.noising import Times
from visalign.algorithms.preference import PreferenceOptimisation
from visalign.maths.preference import bind_loss
from visalign.samplers.dynamics import ODE
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import NoSteps
from visalign.types import Batch, Experience, Prompt

FAMILIES = ["Stable Diffusion 1.5", "Stable Diffusion, v-prediction", "Stable Diffusion XL", "Stable Diffusion 3", "Flux", "Wan 2.1",
            "Stable Audio"]
PROMPTS = [Prompt("a red circle"), Prompt("a blue square")]


@pytest.fixture(scope="module", params=FAMILIES)
def sampled(request):
    """A policy with an adapter, sampled with its family's guidance, and the same weights without guidance for the update."""
    family = by_name(request.param)
    policy = PipelinePolicy.from_pipeline(family.build(), **{**family.call, "num_inference_steps": 3})
    policy.roles.add_lora(rank=2)
    guided = any(plan.combination.weights != (1.0,) for plan in policy.capture.plans)
    train_policy = policy.with_call(guidance_scale=1.0) if guided and policy.subtracts(0) else policy
    made = rollout(policy, PROMPTS, 2, ODE(), NoSteps(), seed=0, microbatch=2)
    reward = torch.tensor([0.0, 1.0, 1.0, 0.0])
    return train_policy, Experience(made, torch.zeros(4, 1), torch.ones(4, dtype=torch.bool), 0, reward)


def run(policy, experience, name, **changes):
    method = PreferenceOptimisation(bind_loss(name, **({"temperature": 1.0} if name == "rwr" else {})), kappa=100.0, **changes)
    policy.train(True)
    terms = []
    for parameter in policy.named_trainable().values():
        parameter.grad = None
    for part in method.microbatches(policy, Batch(experience, torch.arange(4), 4.0), 4, 0):
        terms.append(method.loss(policy, part))
        terms[-1].loss.backward()
    gradients = [parameter.grad for parameter in policy.named_trainable().values() if parameter.grad is not None]
    return terms, float(torch.stack([gradient.norm() for gradient in gradients]).norm())


@pytest.mark.parametrize("name", ["dpo", "kto", "rwr"])
@pytest.mark.parametrize("space", ["native", "velocity"])
def test_the_margin_is_exactly_zero_at_the_start_and_the_gradient_is_not(sampled, name, space):
    policy, experience = sampled
    terms, gradient = run(policy, experience, name, space=space, times=Times("uniform", low=0.1, high=0.9))
    assert all(term.maxima.get("policy/error_gap", 0.0) == 0.0 for term in terms)
    assert all(bool(torch.isfinite(term.loss)) for term in terms)
    assert gradient > 0
    if name == "dpo":
        assert sum(float(term.loss.detach()) for term in terms) == pytest.approx(0.6931472, abs=1e-6)


def test_one_small_step_lowers_the_chosen_error_against_the_rejected_one(sampled):
    policy, experience = sampled
    settings = {"times": Times("uniform", low=0.1, high=0.9), "draws": 2}
    run(policy, experience, "dpo", **settings)
    trained = dict(policy.named_trainable())
    before = {key: parameter.detach().clone() for key, parameter in trained.items()}
    norm = torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None]).norm()
    with torch.no_grad():
        for parameter in trained.values():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad / norm
    terms, _ = run(policy, experience, "dpo", **settings)
    assert sum(term.metrics["preference/margin"][0] for term in terms) > 0
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(before[key])
