"""Noise levels and predictions at timesteps that no schedule visits."""

import pytest
import torch

from scripts.tiny_families import by_name
from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.samplers.observe import CaptureError
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.times import fit_times
from visalign.types import Prompt

FAMILIES = ["Stable Diffusion 1.5", "Stable Diffusion, v-prediction", "Stable Diffusion, zero SNR", "Stable Diffusion XL",
            "Stable Diffusion, Euler ancestral", "Stable Diffusion 3", "Flux", "Wan 2.1", "Wan 2.2", "Wan 2.2 TI2V", "Stable Audio",
            "CogVideoX", "Z-Image"]


@pytest.fixture(scope="module")
def policies():
    return {}


def policy_of(name, policies):
    if name not in policies:
        family = by_name(name)
        policies[name] = PipelinePolicy.from_pipeline(family.build(), **{**family.call, "num_inference_steps": 4})
    return policies[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_at_the_schedules_own_timesteps_levels_and_predictions_agree(name, policies):
    policy = policy_of(name, policies)
    t = torch.tensor(policy.schedule.timesteps, dtype=torch.float64)
    alpha, sigma = policy.times.level(t)
    for step, level in enumerate(policy.schedule.levels[:-1]):
        assert float(sigma[step] / (alpha + sigma)[step]) == pytest.approx(level.sigma / (level.alpha + level.sigma), abs=2e-3)
    conditioning = policy.encode([Prompt("a red circle"), Prompt("a blue square")])
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)) * policy.schedule.levels[1].sigma
    with torch.no_grad():
        known = policy.predict(x, 1, conditioning)
        found = policy.predict_at(x, t[1].expand(2), conditioning)
    assert (found.x0 - known.x0).norm() / known.x0.norm() < 5e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_at_different_times_are_those_of_separate_calls(name, policies):
    policy = policy_of(name, policies)
    times = policy.times.timestep(torch.tensor([0.25, 0.85, 0.85], dtype=torch.float64))
    alpha, sigma = policy.times.level(times)
    conditioning = policy.encode([Prompt("a red circle"), Prompt("a blue square"), Prompt("a red circle")])
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    x = x * (alpha**2 + sigma**2).sqrt().float().reshape(-1, *[1] * (x.dim() - 1))
    with torch.no_grad():
        together = policy.predict_at(x, times, conditioning)
        for row in range(3):
            alone = policy.predict_at(x[row:row + 1], times[row:row + 1], conditioning.select([row]))
            torch.testing.assert_close(together.velocity[row:row + 1], alone.velocity, rtol=2e-3, atol=2e-3)
    a, s = (level.float().reshape(-1, *[1] * (x.dim() - 1)) for level in (alpha, sigma))
    torch.testing.assert_close(a * together.x0 + s * together.x1, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_fractions_run_from_data_to_noise(name, policies):
    times = policy_of(name, policies).times
    alpha, sigma = times.level(times.timestep(torch.linspace(0.01, 0.99, 9, dtype=torch.float64)))
    share = sigma / (alpha + sigma)
    assert bool((share.diff() > 0).all())
    assert share[0] < 0.3 < 0.7 < share[-1]


def test_vp_timesteps_are_the_entries_of_the_table(policies):
    policy = policy_of("Stable Diffusion 1.5", policies)
    bars = policy.pipe.scheduler.alphas_cumprod.double()
    alpha, sigma = policy.times.level(torch.arange(len(bars), dtype=torch.float64))
    torch.testing.assert_close(alpha, bars.sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sigma, (1 - bars).sqrt(), rtol=1e-9, atol=1e-12)
    assert policy.times.timestep(torch.tensor([0.0, 0.5, 0.9999, 1.0])).tolist() == [0, 500, 999, 999]


def test_the_gaussian_policy_agrees_with_itself():
    policy = GaussianPolicy(GaussianWorld(mean=torch.full((2, 3), 0.3), var=0.2), flow_schedule(dance_sigmas(5, 3.0)))
    x, conditioning = torch.randn(2, 2, 3), policy.encode([Prompt("a"), Prompt("b", metadata={"offset": 0.5})])
    t = torch.full((2,), 1000 * policy.schedule.levels[2].sigma, dtype=torch.float64)
    torch.testing.assert_close(policy.predict_at(x, t, conditioning).x0, policy.predict(x, 2, conditioning).x0)


def test_bad_times(policies):
    policy = policy_of("Stable Diffusion 3", policies)
    with pytest.raises(ValueError, match=r"leave the training range 0\.\.1000"):
        policy.times.level(torch.tensor([1001.0]))
    with pytest.raises(ValueError, match="one per row"):
        policy.predict_at(torch.zeros(2, *policy.latent_shape), torch.tensor([500.0]), policy.encode([Prompt("a")]).select([0, 0]))
    unreadable = policy_of("Stable Diffusion 1.5", policies)
    scheduler = unreadable.capture.scheduler.__class__.from_config(unreadable.capture.scheduler.config, beta_start=0.5, beta_end=0.9)
    with pytest.raises(CaptureError, match="alphas_cumprod off by"):
        fit_times(scheduler, unreadable.capture.fit)
