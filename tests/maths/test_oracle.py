"""The Gaussian world is right: its denoiser is the posterior mean, its tilt the KL-regularised optimum."""

import pytest
import torch

from visalign.maths.oracle import GaussianWorld, Moments, propagate, shift_response, simulate
from visalign.maths.schedules import dance_sigmas, flow_levels
from visalign.samplers.dynamics import DDIM, ODE, DanceSDE, FlowSDE, Mixed
from visalign.types import NoiseLevel

WORLD = GaussianWorld(mean=1.5, var=0.25)
UNIFORM = flow_levels(dance_sigmas(40, shift=1.0))


def test_flow_velocity_is_the_closed_form():
    """v(x) = k x + k0, k = (s - (1 - s) c2) / V, k0 = -m - k (1 - s) m."""
    x = torch.linspace(-2, 3, 7, dtype=torch.float64)[:, None]
    for s in (0.0, 0.3, 0.9, 1.0):
        v = (1 - s) ** 2 * 0.25 + s**2
        k = (s - (1 - s) * 0.25) / v
        torch.testing.assert_close(WORLD.predict(x, NoiseLevel(1 - s, s)).velocity, k * x - 1.5 - k * (1 - s) * 1.5)


@pytest.mark.parametrize("level", [NoiseLevel(0.4, 0.6), NoiseLevel(0.6, 0.8), NoiseLevel(1.0, 5.0)])
def test_the_prediction_is_consistent_and_the_best_in_mean_square(level):
    """Errors of the posterior mean are uncorrelated with x: 200,000 samples, seed 0, tolerance five standard errors."""
    generator = torch.Generator().manual_seed(0)
    x0 = 1.5 + 0.5 * torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    x = level.alpha * x0 + level.sigma * torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    prediction = WORLD.predict(x, level)
    torch.testing.assert_close(level.alpha * prediction.x0 + level.sigma * prediction.x1, x)
    error = prediction.x0 - x0
    assert abs(float(error.mean())) < 5 * 0.5 / 200_000**0.5
    z = (x - x.mean()) / x.std()
    assert abs(float((error * z).mean())) < 5 * 0.5 / 200_000**0.5


def test_marginal_of_elements():
    world = GaussianWorld(mean=torch.tensor([0.0, 2.0]), var=torch.tensor([1.0, 4.0]))
    moments = world.marginal(NoiseLevel(0.5, 3.0))
    assert moments.mean.tolist() == [0.0, 1.0]
    assert moments.var.tolist() == [0.25 + 9, 1 + 9]


def test_propagation_is_elementwise_and_starts_where_told():
    world = GaussianWorld(mean=torch.tensor([1.5, -1.0], dtype=torch.float64), var=torch.tensor([0.25, 2.0], dtype=torch.float64))
    end = propagate(world, FlowSDE(), UNIFORM)
    alone = propagate(WORLD, FlowSDE(), UNIFORM)
    assert float(end.mean[0]) == pytest.approx(float(alone.mean), abs=1e-14)
    assert float(end.var[0]) == pytest.approx(float(alone.var), abs=1e-14)
    start = Moments(mean=torch.tensor(3.0, dtype=torch.float64), var=torch.tensor(0.0, dtype=torch.float64))
    assert float(propagate(WORLD, ODE(), UNIFORM, start).var) == 0.0


def test_tilted_world_maximises_reward_minus_kl():
    """Among N(mean + d, var): the objective a d - beta d^2 / (2 var) peaks at d = var a / beta."""
    best = WORLD.tilted(slope=0.8, beta=0.1)
    assert (best.mean, best.var) == (pytest.approx(1.5 + 0.25 * 0.8 / 0.1), 0.25)

    def objective(shift):
        p, q = (torch.distributions.Normal(1.5 + d, 0.5) for d in (shift, 0.0))
        return 0.8 * (1.5 + shift) - 0.1 * float(torch.distributions.kl_divergence(p, q))

    shift = best.mean - 1.5
    assert objective(shift) > max(objective(shift - 1e-3), objective(shift + 1e-3))


@pytest.mark.parametrize("dynamics", [ODE(), FlowSDE(), Mixed(DanceSDE(), (2, 5))])
def test_gain_is_the_derivative_of_the_final_mean(dynamics):
    """Believing in mean + 1 at every step moves the final mean by the sum of the gains (the map is linear)."""
    start = WORLD.marginal(UNIFORM[0])
    believed = propagate(GaussianWorld(2.5, 0.25), dynamics, UNIFORM, start).mean
    true = propagate(WORLD, dynamics, UNIFORM, start).mean
    assert float(believed - true) == pytest.approx(float(shift_response(WORLD, dynamics, UNIFORM).gain.sum()), abs=1e-12)


def test_cost_is_the_kl_of_a_shift():
    from visalign.maths.gaussian import kl_divergence, transition_mean

    response, x = shift_response(WORLD, FlowSDE(), UNIFORM), torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    for i in (0, 7, 30):
        step = FlowSDE().transition(UNIFORM, i)
        means = [transition_mean(GaussianWorld(mean, 0.25).predict(x, UNIFORM[i]), step) for mean in (1.5 + 0.2, 1.5)]
        torch.testing.assert_close(kl_divergence(*means, step.std), 0.5 * 0.2**2 * response.cost[i].expand(2), rtol=1e-12, atol=0)


def test_deterministic_steps_cost_nothing_and_are_not_seen():
    response = shift_response(WORLD, Mixed(FlowSDE(), (1, 2)), UNIFORM)
    assert response.stochastic.nonzero().flatten().tolist() == [1, 2]
    assert response.cost[~response.stochastic].eq(0).all()
    assert response.per_step_optimum(1.0, 0.1)[~response.stochastic].eq(0).all()


@pytest.mark.parametrize(("dynamics", "error_at_100"), [(FlowSDE(noise=2**0.5), 3e-4), (DDIM(eta=1.0), 0.04)])
def test_memoryless_paths_have_the_tilted_optimum(dynamics, error_at_100):
    """GRPO's fixed point under exact per-step KL converges to var a / beta = 0.5; with memory (noise 0.7) it does not."""
    optimum = {}
    for num_steps in (100, 1000):
        levels = flow_levels(dance_sigmas(num_steps, shift=1.0))
        optimum[num_steps] = float(shift_response(WORLD, dynamics, levels).shared_optimum(slope=1.0, beta=0.5))
    assert abs(optimum[100] - 0.5) < error_at_100
    assert abs(optimum[1000] - 0.5) < 0.1 * error_at_100
    remembering = shift_response(WORLD, FlowSDE(noise=0.7), flow_levels(dance_sigmas(1000, shift=1.0)))
    assert float(remembering.shared_optimum(slope=1.0, beta=0.5)) == pytest.approx(0.316, abs=1e-3)


def test_per_step_optimum_beats_the_shared_one():
    """Both evaluated exactly: sum_i slope gain_i d_i - beta cost_i d_i^2 / 2 over the stochastic steps."""
    response = shift_response(WORLD, FlowSDE(noise=0.7), UNIFORM)

    def value(shift):
        return float((response.gain * shift - 0.5 * 0.5 * response.cost * shift**2)[response.stochastic].sum())

    per_step, shared = response.per_step_optimum(1.0, 0.5), response.shared_optimum(1.0, 0.5)
    assert value(per_step) > value(shared) > max(value(shared + 1e-3), value(shared - 1e-3))
    bump = torch.zeros_like(per_step)
    bump[5] = 1e-3
    assert value(per_step) > max(value(per_step + bump), value(per_step - bump))


def test_response_is_elementwise():
    world = GaussianWorld(mean=0.0, var=torch.tensor([0.25, 1.0]))
    response = shift_response(world, FlowSDE(), UNIFORM)
    assert response.gain.shape == response.cost.shape == (40, 2)
    assert response.shared_optimum(1.0, 0.5)[0] == pytest.approx(float(shift_response(WORLD, FlowSDE(), UNIFORM).shared_optimum(1.0, 0.5)))


def test_simulation_is_reproducible():
    drawn = [simulate(WORLD, FlowSDE(), UNIFORM, 5, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert drawn[0].shape == (5,)
    assert torch.equal(*drawn)


def test_refusals():
    with pytest.raises(ValueError, match="cannot be negative"):
        GaussianWorld(0.0, -1.0)
    with pytest.raises(ValueError, match="beta must be > 0"):
        WORLD.tilted(1.0, 0.0)
    with pytest.raises(ValueError, match="give the world a variance"):
        GaussianWorld(0.0, 0.0).predict(torch.zeros(1, 1), NoiseLevel(1.0, 0.0))
