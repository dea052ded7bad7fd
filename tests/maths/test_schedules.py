"""Published schedules, number by number."""

import itertools

import pytest

from visalign.maths.schedules import (
    dance_sigmas,
    edm_levels,
    exponential_shift_sigmas,
    flow_levels,
    flow_schedule,
    flux_mu,
    karras_sigmas,
    scaled_linear_alphas_cumprod,
    shift_sigma,
    static_shift_sigmas,
    vp_levels,
)


def test_sd35_schedule_of_ten_steps():
    expected = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
    assert [round(sigma, 6) for sigma in static_shift_sigmas(10, shift=3.0)] == expected


def test_static_shift_is_what_diffusers_visits():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas.tolist() == pytest.approx(static_shift_sigmas(10, shift=3.0), abs=1e-6)


def test_flux_schedule_is_what_diffusers_visits():
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    mu = flux_mu(1024)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist(), mu=mu)
    assert scheduler.sigmas.tolist() == pytest.approx(exponential_shift_sigmas(8, mu), abs=1e-6)


def test_dance_schedule():
    sigmas = dance_sigmas(16, shift=3.0)
    assert len(sigmas) == 17
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert round(sigmas[-2], 4) == 0.1667


def test_sd15_alphas_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    ours = scaled_linear_alphas_cumprod()
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert theirs.tolist() == pytest.approx(ours, rel=1e-4)


def test_flux_mu_at_its_anchors():
    assert flux_mu(256) == 0.5
    assert flux_mu(4096) == pytest.approx(1.15, abs=1e-15)


def test_karras_ends():
    sigmas = karras_sigmas(18)
    assert sigmas[0] == pytest.approx(80.0, rel=1e-14)
    assert sigmas[-2] == pytest.approx(0.002, rel=1e-12)
    assert all(a > b for a, b in itertools.pairwise(sigmas))


def test_levels_and_schedule():
    assert [(level.alpha, level.sigma) for level in flow_levels([1.0, 0.25])] == [(0.0, 1.0), (0.75, 0.25)]
    assert [level.alpha for level in edm_levels([80.0, 0.0])] == [1.0, 1.0]
    vp = vp_levels([0.36])[0]
    assert (vp.alpha, vp.sigma) == pytest.approx((0.6, 0.8), abs=1e-15)
    schedule = flow_schedule((1.0, 0.5, 0.0))
    assert schedule.num_steps == 2
    assert schedule.timesteps == (1000.0, 500.0)


def test_shift_one_is_the_identity_and_no_steps_are_refused():
    assert shift_sigma(0.37, 1.0) == 0.37
    with pytest.raises(ValueError, match="at least one step"):
        static_shift_sigmas(0, 3.0)
