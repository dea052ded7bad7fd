"""Diffusion-DPO for users who disagree (PPD, arXiv:2501.06655): who ignores the user can only give up, who hears it satisfies both."""

import math
from dataclasses import replace

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
from visalign.samplers.users import UserTable
from visalign.types import Batch, Experience, Prompt
from visalign.users import with_users

LN2 = math.log(2)


def build(family="Stable Diffusion 1.5"):
    found = by_name(family)
    return PipelinePolicy.from_pipeline(found.build(), **{**found.call, "num_inference_steps": 2, "guidance_scale": 1.0})


def contradiction(policy):
    """One pair of samples, judged by two users in opposite ways; both judgements meet the same time and noise."""
    made = rollout(policy, with_users([Prompt("a red circle")], ["ann", "bob"]), 2, ODE(), NoSteps(), seed=0)
    made = replace(made, x_final=made.x_final[:2].repeat(2, 1, 1, 1), sample_index=torch.tensor([0, 1, 0, 1]))
    return Experience(made, torch.zeros(4, 1), torch.ones(4, dtype=torch.bool), 0, torch.tensor([1.0, 0.0, 0.0, 1.0]))


def step(policy, made, kappa, optimizer=None):
    """Loss and the two users' margins u; one optimizer step if there is an optimizer."""
    method = PreferenceOptimisation(bind_loss("dpo"), kappa=kappa, times=Times("uniform", low=0.3, high=0.9))
    loss, margins = 0.0, []
    for part in method.microbatches(policy, Batch(made, torch.arange(4), 4.0), 2, seed=0):
        terms = method.loss(policy, part)
        loss, margins = loss + float(terms.loss.detach()), [*margins, terms.metrics["preference/margin"][0]]
        if optimizer is not None:
            terms.loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss, margins


def test_without_users_opposite_labels_cancel_and_training_returns_to_zero():
    policy = build()
    policy.roles.add_lora(rank=2)
    made = contradiction(policy)
    assert step(policy, made, 20.0)[0] == pytest.approx(LN2, abs=1e-6)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.named_trainable().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    start, margins = step(policy, made, 20.0)
    # The labels are opposite: whatever the model does, one user's gain is the other's loss.
    assert margins[0] == pytest.approx(-margins[1], rel=1e-4)
    assert start > LN2 + 0.02
    optimizer = torch.optim.Adam(policy.named_trainable().values(), lr=1e-2)
    for _ in range(25):
        loss, margins = step(policy, made, 20.0, optimizer)
    assert LN2 - 1e-6 < loss < LN2 + 0.1 * (start - LN2)


@pytest.mark.parametrize("family", ["Stable Diffusion 1.5", "Stable Diffusion 3"])
def test_with_users_both_are_satisfied_and_nobody_sees_the_base(family):
    policy = build(family)
    torch.manual_seed(0)
    policy.add_users(UserTable.random(["ann", "bob"], num_tokens=2, width=8))
    made = contradiction(policy)
    base = policy.predict(made.trajectory.x_final[:1], 0, policy.encode([Prompt("a red circle")]), "reference").velocity
    loss, margins = step(policy, made, 100.0)
    assert (loss, margins) == (pytest.approx(LN2, abs=1e-6), [0.0, 0.0])
    optimizer = torch.optim.Adam(policy.named_trainable().values(), lr=2e-2)
    for _ in range(30):
        loss, margins = step(policy, made, 100.0, optimizer)
    assert loss < 0.35 * LN2
    assert min(margins) > 0
    with torch.no_grad():
        nobody = policy.predict(made.trajectory.x_final[:1], 0, policy.encode([Prompt("a red circle")])).velocity
    assert torch.equal(nobody, base)
