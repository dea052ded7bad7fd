"""Drift against the densities of whole transitions, computed the long way round."""

import pytest
import torch

from visalign.guards.drift import Drift, measure_drift
from visalign.maths.gaussian import kl_divergence_per_dim, transition_mean
from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.samplers.dynamics import ODE, FlowSDE
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.types import Prompt

PROMPTS = [Prompt(f"{i}", metadata={"offset": 0.1 * i}) for i in range(5)]
SEEDS = [11, 12, 13, 14, 15]


def policy(shift=0.0):
    made = GaussianPolicy(GaussianWorld(mean=torch.full((2, 3), 0.1), var=0.25), flow_schedule(dance_sigmas(6, 3.0)))
    with torch.no_grad():
        made.shift += shift
    return made


def test_before_the_first_update_there_is_none():
    assert measure_drift(policy(), PROMPTS, SEEDS, FlowSDE(), batch=2).metrics() == {"velocity_gap": 0.0, "kl_per_dim": 0.0}


def test_it_is_the_kl_of_every_transition_on_the_policys_own_path():
    made, ruler = policy(0.3), FlowSDE()
    levels, conditioning = made.schedule.levels, made.encode(PROMPTS)
    x, kl, gap, norm = made.initial_latents(SEEDS), 0.0, 0.0, 0.0
    with torch.no_grad():
        for step in range(made.schedule.num_steps):
            own, reference = (made.predict(x, step, conditioning, role) for role in ("policy", "reference"))
            transition = ruler.transition(levels, step)
            if transition.std > 0:
                means = (transition_mean(prediction, transition) for prediction in (own, reference))
                kl += float(kl_divergence_per_dim(*means, transition.std).mean())
            gap += float((own.velocity - reference.velocity).square().sum())
            norm += float(reference.velocity.square().sum())
            x = transition_mean(own, ODE().transition(levels, step))
    found = measure_drift(made, PROMPTS, SEEDS, ruler, batch=5).metrics()
    assert found["kl_per_dim"] == pytest.approx(kl, rel=1e-4)
    assert found["velocity_gap"] == pytest.approx((gap / norm) ** 0.5, rel=1e-4)


def test_it_does_not_depend_on_batches_or_on_who_measures_what():
    made, ruler = policy(0.3), FlowSDE()
    whole = measure_drift(made, PROMPTS, SEEDS, ruler, batch=5).metrics()
    parts = [measure_drift(made, PROMPTS[k::2], SEEDS[k::2], ruler, batch=2) for k in range(2)]
    assert sum([*parts, measure_drift(made, [], [], ruler, batch=2)], Drift()).metrics() == pytest.approx(whole, rel=1e-5)


def test_a_small_step_costs_its_square():
    one, two = (measure_drift(policy(shift), PROMPTS, SEEDS, FlowSDE(), batch=5).metrics() for shift in (1e-3, 2e-3))
    assert two["kl_per_dim"] == pytest.approx(4 * one["kl_per_dim"], rel=0.02)


def test_a_deterministic_ruler_measures_no_kl():
    assert measure_drift(policy(0.3), PROMPTS, SEEDS, ODE(), batch=5).metrics()["kl_per_dim"] == 0
    assert Drift().metrics() == {}
