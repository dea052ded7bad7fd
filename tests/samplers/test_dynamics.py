"""Transitions against closed forms, published numbers and the exact Gaussian world."""

import math

import pytest
import torch

from visalign.maths.gaussian import state_coefficients, transition_mean
from visalign.maths.oracle import GaussianWorld, propagate, simulate
from visalign.maths.schedules import (
    dance_sigmas,
    edm_levels,
    flow_levels,
    karras_sigmas,
    scaled_linear_alphas_cumprod,
    static_shift_sigmas,
    vp_levels,
)
from visalign.samplers.dynamics import (
    CPS,
    DDIM,
    DYNAMICS,
    ODE,
    DanceSDE,
    FlowSDE,
    Mixed,
    build_dynamics,
)
from visalign.types import NoiseLevel, Prediction, Transition

SD35 = flow_levels(static_shift_sigmas(10, shift=3.0))
_ab = scaled_linear_alphas_cumprod()
VP = vp_levels([*(_ab[t] for t in range(981, 0, -20)), _ab[0]])
EDM = edm_levels(karras_sigmas(40))
WORLD = GaussianWorld(mean=1.5, var=0.25)
EVERY = [ODE(), FlowSDE(), DanceSDE(), CPS(), DDIM()]
STOCHASTIC = EVERY[1:]


# --- published numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("levels", [SD35, flow_levels(dance_sigmas(16, 3.0)), flow_levels([1.0, 0.9, 0.5, 0.0])])
def test_flow_sde_first_step_is_independent_of_the_schedule(noise, levels):
    """(c_x, c_v, std) = (1 - a^2/2, dt, a)."""
    step = FlowSDE(noise=noise).transition(levels, 0)
    c_x, c_v = state_coefficients(levels[0], step)
    assert (c_x, c_v, step.std) == pytest.approx((1 - noise**2 / 2, levels[1].sigma - 1, noise), abs=1e-15)


@pytest.mark.parametrize("index", range(1, 9))
@pytest.mark.parametrize(("dynamics", "g"), [
    (FlowSDE(noise=0.7), lambda s: 0.7 * math.sqrt(s / (1 - s))), (DanceSDE(eta=0.3), lambda s: 0.3),
])
def test_sde_coefficients_in_the_papers_form(dynamics, g, index):
    """c_x = 1 + g^2 dt / (2 s), c_v = dt (1 + g^2 (1 - s) / (2 s)), std = g sqrt(-dt)."""
    s, s_next = SD35[index].sigma, SD35[index + 1].sigma
    dt, g = s_next - s, g(s)
    step = dynamics.transition(SD35, index)
    expected = (1 + g**2 * dt / (2 * s), dt * (1 + g**2 * (1 - s) / (2 * s)), g * math.sqrt(-dt))
    assert (*state_coefficients(SD35[index], step), step.std) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("dynamics", "published"), [
    (FlowSDE(noise=0.7), [0.0796, 0.1095, 0.0423, 0.0290, 0.0256, 0.0262, 0.0304, 0.0393, 0.0575]),
    (DanceSDE(eta=0.3), [0.0001, 0.0002, 0.0003, 0.0005, 0.0008, 0.0015, 0.0029, 0.0071, 0.0253]),
])
def test_noise_beyond_the_schedule(dynamics, published):
    """For an exact per-sample predictor the noise variance after a step is s'^2 + E, E = g^2 h^2 / s + g^4 h^2 / (4 s^2)."""
    for i, expected in enumerate(published):
        step = dynamics.transition(SD35, i)
        excess = step.B**2 + step.std**2 - SD35[i + 1].sigma ** 2
        s, h = SD35[i].sigma, SD35[i].sigma - SD35[i + 1].sigma
        g = step.std / math.sqrt(h)
        assert abs(excess - (g**2 * h**2 / s + g**4 * h**2 / (4 * s**2))) < 1e-12
        assert round(excess, 4) == expected
        assert 1 - SD35[i + 1].sigma == step.A


def test_policy_gradient_weights_of_sd35():
    """|c_v| / std: the plain loss weights the last stochastic step 26 times the first."""
    weights = []
    for i in range(9):
        step = FlowSDE(noise=0.7).transition(SD35, i)
        weights.append(abs(state_coefficients(SD35[i], step)[1]) / step.std)
    assert [round(w, 3) for w in weights[:8]] == [0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825]
    assert round(weights[8], 2) == 1.49
    assert round(weights[8] / weights[0]) == 26


def test_guards_weight_with_one_over_h():
    """|c_v| / h = 1 + g^2 (1 - s) / (2 s), which for FlowSDE is 1 + a^2 / 2 at every step after the first."""
    for i in range(1, 9):
        step = FlowSDE(noise=0.7).transition(SD35, i)
        assert abs(state_coefficients(SD35[i], step)[1]) / (SD35[i].sigma - SD35[i + 1].sigma) == pytest.approx(1 + 0.49 / 2, abs=1e-12)


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), DanceSDE(0.3)])
def test_kl_of_a_velocity_difference(dynamics):
    """c_v^2 / (2 std^2) = (h / 2) (1 / g + g (1 - s) / (2 s))^2."""
    for i in range(9):
        step, s = dynamics.transition(SD35, i), SD35[i].sigma
        h = s - SD35[i + 1].sigma
        g = step.std / math.sqrt(h)
        c_v = state_coefficients(SD35[i], step)[1]
        assert c_v**2 / (2 * step.std**2) == pytest.approx(h / 2 * (1 / g + g * (1 - s) / (2 * s)) ** 2, rel=1e-12)


@pytest.mark.parametrize(("num_steps", "ode", "flow", "dance"), [
    (10, 0.1367, 0.1754, 0.1424), (100, 0.2358, 0.2424, 0.2373), (1000, 0.2485, 0.2497, 0.2487),
])
def test_marginals_of_gaussian_data_converge_to_the_data(num_steps, ode, flow, dance):
    """Exact propagation, shift 3, data N(1.5, 0.25), last step ODE; any sign error in the drift diverges."""
    levels = flow_levels(dance_sigmas(num_steps, shift=3.0))
    for dynamics, expected in [(ODE(), ode), (FlowSDE(noise=0.7), flow), (DanceSDE(eta=0.3), dance)]:
        end = propagate(WORLD, dynamics, levels)
        assert abs(float(end.mean) - 1.5) < 1e-12
        assert round(float(end.var), 4) == expected


def test_cps_keeps_the_marginal_only_if_eta_shrinks_with_the_steps():
    levels = flow_levels(dance_sigmas(1000, shift=3.0))
    assert round(float(propagate(WORLD, CPS(eta=0.7), levels).var), 4) == 0.1787
    assert round(float(propagate(WORLD, CPS(eta=0.7 * math.sqrt(10 / 1000)), levels).var), 4) == 0.2476


def test_ddpm_posterior_of_stable_diffusion():
    """t = 501 -> 481, x0 = 1.3, e = -0.4: mu = 0.402142047388, std = 0.294784540277, the DDPM posterior mean."""
    ab, ab_next = _ab[501], _ab[481]
    step = DDIM(eta=1.0).transition(vp_levels([ab, ab_next, 1.0]), 0)
    mu = step.A * 1.3 + step.B * -0.4
    assert abs(mu - 0.402142047388) < 1e-12
    assert abs(step.std - 0.294784540277) < 1e-12
    a = ab / ab_next
    x = math.sqrt(ab) * 1.3 + math.sqrt(1 - ab) * -0.4
    posterior = math.sqrt(ab_next) * (1 - a) / (1 - ab) * 1.3 + math.sqrt(a) * (1 - ab_next) / (1 - ab) * x
    assert abs(mu - posterior) < 1e-14


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_is_formula_16_on_vp_levels(eta):
    for i in range(len(VP) - 2):
        ab, ab_next = VP[i].alpha ** 2, VP[i + 1].alpha ** 2
        variance = eta**2 * (1 - ab_next) / (1 - ab) * (1 - ab / ab_next)
        step = DDIM(eta).transition(VP, i)
        assert step.std == pytest.approx(math.sqrt(variance), rel=1e-11)
        assert pytest.approx(math.sqrt(1 - ab_next - variance), rel=1e-11) == step.B


def test_ddim_matches_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(50)
    x, epsilon, noise = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    for i in (0, 20, 48):
        # Index i of VP is timestep 981 - 20 i, the scheduler's own.
        theirs = scheduler.step(epsilon, int(scheduler.timesteps[i]), x, eta=1.0, variance_noise=noise).prev_sample
        x0 = (x - VP[i].sigma * epsilon) / VP[i].alpha
        step = DDIM(eta=1.0).transition(VP, i)
        torch.testing.assert_close(transition_mean(Prediction(x0, epsilon), step) + step.std * noise, theirs, rtol=2e-4, atol=2e-4)


def test_ddim_is_ancestral_euler_on_sigma_levels():
    for i in range(len(EDM) - 2):
        now, after = EDM[i].sigma, EDM[i + 1].sigma
        up = math.sqrt(after**2 * (now**2 - after**2) / now**2)
        step = DDIM(eta=1.0).transition(EDM, i)
        assert (step.A, step.B, step.std) == pytest.approx((1.0, math.sqrt(after**2 - up**2), up), rel=1e-12)


# --- identities -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [SD35, VP, EDM])
@pytest.mark.parametrize("dynamics", [FlowSDE(noise=0.0), FlowSDE(noise=0.0, guard=0.98), DanceSDE(eta=0.0), CPS(eta=0.0), DDIM(eta=0.0)])
def test_without_noise_every_dynamics_is_the_ode_bit_for_bit(dynamics, levels):
    for i in range(len(levels) - 1):
        assert dynamics.transition(levels, i) == ODE().transition(levels, i)


def test_ode_is_euler():
    x, v = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind(0)
    for i in range(10):
        s, s_next = SD35[i].sigma, SD35[i + 1].sigma
        mean = transition_mean(Prediction(x - s * v, x + (1 - s) * v), ODE().transition(SD35, i))
        torch.testing.assert_close(mean, x + (s_next - s) * v, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("levels", [SD35, VP, EDM])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_cps_preserves_both_coefficients(eta, levels):
    for i in range(len(levels) - 1):
        step, after = CPS(eta).transition(levels, i), levels[i + 1]
        assert after.alpha == step.A
        assert abs(step.B**2 + step.std**2 - after.sigma**2) <= 1e-15 * max(1.0, after.sigma**2)


def test_cps_at_one_replaces_all_noise():
    step = CPS(eta=1.0).transition(SD35, 3)
    assert abs(step.B) < 1e-16
    assert step.std == SD35[4].sigma


@pytest.mark.parametrize("dynamics", STOCHASTIC)
@pytest.mark.parametrize("levels", [SD35, VP, EDM])
def test_the_signal_coefficient_is_exactly_that_of_the_next_level(dynamics, levels):
    for i in range(len(levels) - 1):
        assert levels[i + 1].alpha == dynamics.transition(levels, i).A


@pytest.mark.parametrize("dynamics", EVERY)
@pytest.mark.parametrize("levels", [SD35, VP, EDM])
def test_rescaling_a_process_rescales_its_transitions(dynamics, levels):
    """Scale level i by c_i: (A, B, std) of step i become c_{i+1} times those of the unscaled process."""
    scale = [1 + 0.5 * math.sin(i) for i in range(len(levels))]
    scaled = [NoiseLevel(c * level.alpha, c * level.sigma) for c, level in zip(scale, levels, strict=True)]
    for i in range(len(levels) - 1):
        plain, other = dynamics.transition(levels, i), dynamics.transition(scaled, i)
        expected = [scale[i + 1] * value for value in (plain.A, plain.B, plain.std)]
        assert [other.A, other.B, other.std] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dynamics", EVERY)
@pytest.mark.parametrize("levels", [SD35, VP, EDM, flow_levels([0.9, 0.5, 0.1])])
def test_the_last_step_is_always_deterministic(dynamics, levels):
    assert dynamics.transition(levels, len(levels) - 2) == Transition(A=levels[-1].alpha, B=levels[-1].sigma, std=0.0)


@pytest.mark.parametrize("dynamics", STOCHASTIC)
@pytest.mark.parametrize("levels", [SD35, VP, EDM])
def test_all_other_steps_are_stochastic(dynamics, levels):
    assert all(dynamics.transition(levels, i).std > 0 for i in range(len(levels) - 2))


# --- marginals under every process ------------------------------------------------------------------------------------------------


def flow_grid(num_steps):
    """Starts inside: at s = 1 itself FlowSDE's g is singular and its order lower; the published table above covers that start."""
    return flow_levels([0.95 * (1 - i / num_steps) for i in range(num_steps + 1)])


def vp_grid(num_steps):
    """A cosine schedule from ab = 0.001 to 1."""
    start = math.acos(math.sqrt(0.001))
    return [NoiseLevel(math.cos(start * (1 - i / num_steps)), math.sin(start * (1 - i / num_steps))) for i in range(num_steps + 1)]


def edm_grid(num_steps):
    return edm_levels([10 * (1 - i / num_steps) ** 2 for i in range(num_steps + 1)])


@pytest.mark.parametrize("grid", [flow_grid, vp_grid, edm_grid])
@pytest.mark.parametrize("dynamics", [ODE(), FlowSDE(), DanceSDE(), DDIM(eta=0.5), DDIM(eta=1.0)])
def test_marginals_converge_at_first_order_under_every_process(grid, dynamics):
    """Exact propagation from the exact marginal: the mean is kept, the variance error halves with the step."""
    errors = []
    for num_steps in (400, 800):
        end = propagate(WORLD, dynamics, grid(num_steps))
        assert abs(float(end.mean) - 1.5) < 1e-9
        errors.append(abs(float(end.var) - 0.25))
    assert errors[1] < 0.01
    assert 1.7 < errors[0] / errors[1] < 2.3


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.7])
def test_simulation_agrees_with_exact_propagation(noise):
    """20,000 samples, seed 0: standard errors 0.0035 (mean) and 0.0025 (variance); four of them allowed."""
    levels = flow_levels(dance_sigmas(100, shift=3.0))
    x0 = simulate(WORLD, FlowSDE(noise=noise), levels, 20_000, torch.Generator().manual_seed(0))
    exact = propagate(WORLD, FlowSDE(noise=noise), levels)
    assert abs(float(x0.mean() - exact.mean)) < 0.014
    assert abs(float(x0.var() - exact.var)) < 0.01


# --- the guard at s = 1 -----------------------------------------------------------------------------------------------------------


def test_a_schedule_that_starts_just_below_one_is_guarded_too():
    """An exact comparison with 1 would give g = 0.7 * 100 here."""
    step = FlowSDE(noise=0.7).transition(flow_levels([0.9999, 0.96, 0.5, 0.0]), 0)
    assert 0.69 < step.std < 0.71
    assert step.std == pytest.approx(0.7 * math.sqrt(0.9999 / 0.04) * math.sqrt(0.0399), rel=1e-12)


def test_a_numeric_guard_is_a_ceiling():
    """1 - min(s, 0.98): g = a sqrt(50) at s = 1, so c_x = 1 - 25 a^2 h."""
    levels = flow_levels([1.0, 0.95, 0.5, 0.0])
    step = FlowSDE(noise=0.7, guard=0.98).transition(levels, 0)
    assert step.std == pytest.approx(0.7 * math.sqrt(50) * math.sqrt(0.05), rel=1e-12)
    assert state_coefficients(levels[0], step)[0] == pytest.approx(1 - 25 * 0.49 * 0.05, abs=1e-12)
    assert FlowSDE(noise=0.7, guard=0.98).transition(SD35, 1) == FlowSDE(noise=0.7).transition(SD35, 1)


def test_a_guard_that_makes_the_coefficient_of_x_negative_is_refused():
    """Published a = 0.7 with 0.98 goes negative once h > 0.082."""
    FlowSDE(noise=0.7, guard=0.98).transition(flow_levels([1.0, 1 - 0.081, 0.0]), 0)
    with pytest.raises(ValueError, match=r"overshoots at step 0.*at most 0\.99.*guard='next'"):
        FlowSDE(noise=0.7, guard=0.98).transition(flow_levels([1.0, 1 - 0.083, 0.0]), 0)


@pytest.mark.parametrize("dynamics", [FlowSDE(noise=1.5), DanceSDE(eta=5.0)])
def test_too_much_noise_is_refused_with_the_factor_that_fits(dynamics):
    levels = flow_levels([1.0, 0.9, 0.5, 0.0])
    with pytest.raises(ValueError, match="overshoots at step") as error:
        [dynamics.transition(levels, i) for i in range(3)]
    assert "use more steps" in str(error.value)


def test_the_memoryless_noise_is_allowed():
    """noise = sqrt(2) forgets x entirely in the first step."""
    levels = flow_levels([1.0, 0.9, 0.5, 0.0])
    step = FlowSDE(noise=math.sqrt(2)).transition(levels, 0)
    assert abs(state_coefficients(levels[0], step)[0]) < 1e-15


# --- refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_levels_must_descend(dynamics):
    with pytest.raises(ValueError, match="step 1 does not reduce the noise"):
        dynamics.transition(flow_levels([1.0, 0.5, 0.5, 0.0]), 1)


def test_the_ode_runs_backwards_for_inversion():
    assert ODE().transition(flow_levels([0.0, 0.5, 1.0]), 0) == Transition(A=0.5, B=0.5, std=0.0)


@pytest.mark.parametrize("dynamics", [*EVERY, Mixed(CPS(), (0,))])
@pytest.mark.parametrize("index", [-1, 10])
def test_steps_outside_the_schedule_are_refused(dynamics, index):
    with pytest.raises(ValueError, match="11 levels have the steps 0 to 9"):
        dynamics.transition(SD35, index)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: FlowSDE(noise=-0.1), "FlowSDE.noise must be a finite number >= 0"),
    (lambda: FlowSDE(noise=math.nan), "FlowSDE.noise"),
    (lambda: FlowSDE(guard=1.0), "FlowSDE.guard must be 'next' or a number"),
    (lambda: FlowSDE(guard="first"), "FlowSDE.guard"),
    (lambda: DanceSDE(eta=math.inf), "DanceSDE.eta"),
    (lambda: CPS(eta=1.1), r"CPS.eta must be in \[0, 1\], got 1.1"),
    (lambda: DDIM(eta=-1.0), "DDIM.eta"),
])
def test_parameters_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- mixed ------------------------------------------------------------------------------------------------------------------------


def test_mixed_follows_the_dynamics_on_the_selected_steps_only():
    mixed = Mixed(FlowSDE(), steps=(2, 3))
    for i in range(10):
        assert mixed.transition(SD35, i) == (FlowSDE() if i in (2, 3) else ODE()).transition(SD35, i)


def test_mixed_never_makes_the_last_step_stochastic():
    assert Mixed(CPS(), steps=(9,)).transition(SD35, 9).std == 0


# --- by name ----------------------------------------------------------------------------------------------------------------------


def test_building_by_name():
    assert [type(build_dynamics(name)) for name in DYNAMICS] == [ODE, FlowSDE, DanceSDE, CPS, DDIM]
    assert build_dynamics("flow_sde", noise=0.5, guard=0.98) == FlowSDE(0.5, 0.98)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: build_dynamics("sde"), "unknown dynamics 'sde'; use one of ode, flow_sde"),
    (lambda: build_dynamics("flow_sde", eta=0.7), "'flow_sde' has no parameter eta; it takes noise, guard"),
    (lambda: build_dynamics("ode", eta=0.7), "it takes none"),
    (lambda: build_dynamics("cps", eta=2.0), "CPS.eta must be in"),
])
def test_building_errors_teach(build, message):
    with pytest.raises(ValueError, match=message):
        build()
