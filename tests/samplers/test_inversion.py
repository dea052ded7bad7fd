"""Inversion: it ends at the timestep asked for, follows the exact ODE of Gaussian data, and ReNoise gives the published numbers."""

from itertools import pairwise

import pytest
import torch

from scripts.tiny_families import by_name
from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import flow_schedule, scaled_linear_alphas_cumprod
from visalign.samplers.inversion import Inversion, carry_noise, inversion_grid
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.times import SchedulerTimes
from visalign.types import Prediction, Prompt

MEAN, VAR = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64), 0.25
FLOW = SchedulerTimes("flow", sigma_data=1.0, process="flow", low=0.0, high=1000.0, whole=False, ratio=lambda t: t / 1000)


def vp_times(bars) -> SchedulerTimes:
    table = torch.as_tensor(bars, dtype=torch.float64)
    ratio = (1 / table - 1).sqrt()
    return SchedulerTimes("epsilon", 1.0, "VP", low=0.0, high=len(table) - 1.0, whole=True, ratio=lambda t: ratio[t.long()])


def fine_vp_times() -> SchedulerTimes:
    """alpha = cos, sigma = sin of a quarter turn in 100,000 entries: no floor from a lowest level or from whole timesteps."""
    return vp_times(torch.linspace(1e-3, 1.55, 100_000, dtype=torch.float64).cos().square())


TIMES = {"flow": FLOW, "VP": vp_times(scaled_linear_alphas_cumprod()), "fine VP": fine_vp_times()}


def gaussian(process="flow", offsets=(0.0, 0.0, 0.0)):
    """A policy, clean samples (n, 1, 3) of its own distribution, and their conditioning."""
    policy = GaussianPolicy(GaussianWorld(MEAN, VAR), flow_schedule([1.0, 0.5, 0.0]), dtype=torch.float64)
    policy.times = TIMES[process]
    conditioning = policy.encode([Prompt(str(k), metadata={"offset": offset}) for k, offset in enumerate(offsets)])
    noise = torch.randn(len(offsets), 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return policy, MEAN + conditioning.offset.reshape(-1, 1, 1) + VAR**0.5 * noise, conditioning


def levels(policy, timesteps):
    return (level.reshape(-1, 1, 1) for level in policy.times.level(timesteps))


def exact_state(policy, x0, timesteps, mean=MEAN):
    """The probability-flow ODE of a Gaussian keeps every sample's quantile: alpha m + sqrt(V_t / var) (x0 - m)."""
    alpha, sigma = levels(policy, timesteps)
    return alpha * mean + ((alpha**2 * VAR + sigma**2) / VAR).sqrt() * (x0 - mean)


def deviation(policy, x0, timesteps, conditioning, **options):
    """Largest distance between the inverted state and the exact one."""
    alpha, sigma = levels(policy, timesteps)
    state = alpha * x0 + sigma * Inversion(**options)(policy, x0, timesteps, conditioning)
    return float((state - exact_state(policy, x0, timesteps)).abs().max())


def test_renoise_gives_the_published_numbers():
    """abar 0.9 -> 0.6, epsilon(x) = 0.2 x from x = 1: 0.8913479 without, 0.8872815 with; undoing the step exactly needs 0.8825572."""
    times, zero, at = vp_times([0.9, 0.6]), torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)

    def predict(x, timesteps):
        assert x.shape == (1, 1)
        return Prediction(x0=x, x1=0.2 * x)

    found = [0.4**0.5 * float(carry_noise(predict, times, zero, zero + 0.1**-0.5, at, at + 1, renoise)) for renoise in (0, 1, 200)]
    assert found[0] == pytest.approx(0.8913479, abs=1e-7)
    assert found[1] == pytest.approx(0.8872815, abs=1e-7)
    kept, moved = (0.6 / 0.9) ** 0.5, 0.4**0.5 - (0.6 * 0.1 / 0.9) ** 0.5
    fixed_point = kept / (1 - 0.2 * moved)
    assert fixed_point == pytest.approx(0.8825572, abs=1e-7)
    assert abs(found[1] - fixed_point) < abs(found[0] - fixed_point)
    assert found[2] == pytest.approx((kept + 0.1 * moved) / (1 - 0.1 * moved), abs=1e-12)  # the implicit trapezoidal rule


def test_the_correction_asks_about_the_destination_at_its_own_timestep():
    asked = []

    def predict(x, timesteps):
        asked.append(timesteps.tolist())
        return Prediction(x0=torch.zeros_like(x), x1=x)

    x0 = torch.zeros(2, 1, dtype=torch.float64)
    carry_noise(predict, FLOW, x0, x0, torch.tensor([100.0, 0.0]), torch.tensor([300.0, 50.0]), renoise=2)
    assert asked == [[100.0, 0.0], [300.0, 50.0], [300.0, 50.0]]


@pytest.mark.parametrize("process", ["flow", "fine VP"])
def test_the_error_falls_by_the_order_of_the_method(process):
    """Euler halves its error with twice the steps, the corrected step quarters it; a correction is worth more than as many steps."""
    policy, x0, conditioning = gaussian(process)
    timesteps = policy.times.timestep(torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64))
    errors = {(steps, renoise): deviation(policy, x0, timesteps, conditioning, num_steps=steps, renoise=renoise)
              for steps in (20, 40, 80) for renoise in (0, 1)}
    for steps in (20, 40):
        assert errors[steps, 0] / errors[2 * steps, 0] == pytest.approx(2, rel=0.2)
        assert errors[steps, 1] / errors[2 * steps, 1] == pytest.approx(4, rel=0.35)
        assert errors[steps, 1] < errors[2 * steps, 0] / 5


@pytest.mark.parametrize("process", ["flow", "VP"])
def test_generation_from_the_inverted_state_returns_the_sample(process):
    """400 Euler steps down from each row's own level, the sampler's own inverse direction."""
    policy, x0, conditioning = gaussian(process)
    timesteps = torch.tensor([250.0, 700.0, 999.0], dtype=torch.float64)
    noise = Inversion(num_steps=80, renoise=1)(policy, x0, timesteps, conditioning)
    alpha, sigma = levels(policy, timesteps)
    x, grid = alpha * x0 + sigma * noise, inversion_grid(policy.times, timesteps, 400).flip(0)
    with torch.no_grad():
        for here, there in pairwise(grid):
            prediction, (alpha, sigma) = policy.predict_at(x, here, conditioning), levels(policy, there)
            x = alpha * prediction.x0 + sigma * prediction.x1
        x = policy.predict_at(x, grid[-1], conditioning).x0 if process == "VP" else x
    assert float((x - x0).abs().max()) < 0.02


@pytest.mark.parametrize("process", ["flow", "VP"])
def test_the_grid_ends_exactly_at_every_rows_own_timestep(process):
    times, asked = TIMES[process], torch.tensor([0.0, 1.0, 37.0, 500.0, 999.0], dtype=torch.float64)
    grid = inversion_grid(times, asked, 9)
    assert grid.shape == (10, 5)
    assert torch.equal(grid[-1], asked)
    assert torch.equal(grid[0], torch.zeros(5, dtype=torch.float64))
    assert bool((grid.diff(dim=0) >= 0).all())
    assert process == "flow" or torch.equal(grid, grid.round())


def test_flow_timesteps_between_whole_numbers_are_kept():
    asked = torch.tensor([0.3, 333.25], dtype=torch.float64)
    assert torch.equal(inversion_grid(FLOW, asked, 3), torch.stack([asked * 0, asked / 3, asked * 2 / 3, asked]))


def test_rows_are_inverted_as_if_alone_under_their_own_prompt():
    policy, x0, conditioning = gaussian(offsets=(0.0, 1.0, -2.0))
    timesteps = torch.tensor([120.0, 840.0, 480.0], dtype=torch.float64)
    together = Inversion()(policy, x0, timesteps, conditioning)
    for row in range(3):
        alone = Inversion()(policy, x0[row:row + 1], timesteps[row:row + 1], conditioning.select([row]))
        torch.testing.assert_close(together[row:row + 1], alone, rtol=1e-12, atol=1e-12)
    alpha, sigma = levels(policy, timesteps)
    exact = exact_state(policy, x0, timesteps, MEAN + conditioning.offset.reshape(-1, 1, 1))
    torch.testing.assert_close(alpha * x0 + sigma * together, exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("timestep", [0.0, 1e-4, 1000.0])
def test_both_ends_of_the_range_have_finite_noise(timestep):
    """No division by a small sigma: at sigma 1e-7 the noise is the one at sigma 0. At sigma 1 it is the state itself."""
    policy, x0, conditioning = gaussian()
    noise = Inversion(num_steps=50)(policy, x0, torch.full((3,), timestep, dtype=torch.float64), conditioning)
    expected = torch.zeros_like(x0) if timestep < 1 else (x0 - MEAN) / VAR**0.5
    torch.testing.assert_close(noise, expected, atol=2e-3, rtol=0)


def test_the_current_policy_is_asked_and_receives_no_gradient():
    policy, x0, conditioning = gaussian()
    timesteps = torch.full((3,), 800.0, dtype=torch.float64)
    before = Inversion()(policy, x0, timesteps, conditioning)
    with torch.no_grad():
        policy.shift.fill_(0.5)
    after = Inversion()(policy, x0, timesteps, conditioning)
    assert not after.requires_grad
    assert float((after - before).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "Stable Diffusion, v-prediction", "Stable Diffusion 3"])
def test_captured_pipelines_are_inverted_at_different_times_per_row(name):
    family = by_name(name)
    policy = PipelinePolicy.from_pipeline(family.build(), **{**family.call, "num_inference_steps": 4, "guidance_scale": 1.0})
    x0 = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps = policy.times.timestep(torch.tensor([0.3, 0.8], dtype=torch.float64))
    conditioning = policy.encode([Prompt("a red circle"), Prompt("a blue square")])
    together = Inversion(num_steps=2)(policy, x0, timesteps, conditioning)
    assert together.shape == x0.shape
    assert bool(together.isfinite().all())
    alone = Inversion(num_steps=2)(policy, x0[1:], timesteps[1:], conditioning.select([1]))
    torch.testing.assert_close(together[1:], alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("options", "message"), [({"num_steps": 0}, "num_steps >= 1"), ({"renoise": -1}, "renoise >= 0")])
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Inversion(**options)


@pytest.mark.parametrize(("timesteps", "message"), [([500.0], "one timestep per sample"),
                                                    ([500.0, 500.0, 1001.0], "leave the training range")])
def test_impossible_timesteps_are_refused(timesteps, message):
    policy, x0, conditioning = gaussian()
    with pytest.raises(ValueError, match=message):
        Inversion()(policy, x0, torch.tensor(timesteps, dtype=torch.float64), conditioning)
