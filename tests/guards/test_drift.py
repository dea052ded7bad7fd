"""Drift against closed forms and against the densities of whole transitions, computed the long way round."""

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


def policy(shift=0.0, num_steps=6, var=0.25):
    made = GaussianPolicy(GaussianWorld(mean=torch.full((2, 3), 0.1), var=var), flow_schedule(dance_sigmas(num_steps, 3.0)))
    with torch.no_grad():
        made.shift += shift
    return made


def drift(made, batch=5):
    return measure_drift(made, PROMPTS, SEEDS, batch=batch).metrics()


def test_before_the_first_update_there_is_none():
    assert drift(policy()) == {"velocity_gap": 0.0, "kl_per_dim": 0.0}


def test_it_is_the_limit_of_the_kl_of_many_small_transitions():
    """Flow-SDE with noise a has (1 + a^2 / 2)^2 / (2 a^2) times the KL of the memoryless SDE, a^2 = 2."""
    made, ruler, ratio = policy(0.3, num_steps=400), FlowSDE(noise=0.7), (1 + 0.7**2 / 2) ** 2 / (2 * 0.7**2)
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
    found = drift(made)
    assert ratio * found["kl_per_dim"] == pytest.approx(kl, rel=0.02)
    assert found["velocity_gap"] == pytest.approx((gap / norm) ** 0.5, rel=1e-4)


def test_memoryless_paths_diverge_by_no_less_than_their_ends():
    """For a shifted Gaussian the KL of the samples is shift^2 / (2 var) per dimension; that of memoryless paths is the same number."""
    assert drift(policy(0.3, num_steps=1000))["kl_per_dim"] == pytest.approx(0.3**2 / (2 * 0.25), rel=0.01)


def test_it_does_not_depend_on_batches_or_on_who_measures_what():
    made = policy(0.3)
    parts = [measure_drift(made, PROMPTS[k::2], SEEDS[k::2], batch=2) for k in range(2)]
    assert sum([*parts, measure_drift(made, [], [], batch=2)], Drift()).metrics() == pytest.approx(drift(made), rel=1e-5)


def test_a_small_step_costs_its_square():
    one, two = (drift(policy(shift)) for shift in (1e-3, 2e-3))
    assert two["kl_per_dim"] == pytest.approx(4 * one["kl_per_dim"], rel=0.02)


def test_nobody_has_no_drift():
    assert Drift().metrics() == {}
