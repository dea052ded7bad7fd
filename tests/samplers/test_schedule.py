"""The process behind every common scheduler is found from its own step, and used for its own x0 prediction."""

import diffusers
import pytest
import torch

from visalign.samplers.observe import CaptureError
from visalign.samplers.schedule import first_order_step, fit_schedule, trim

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = [
    ("DDIMScheduler", {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, "VP", "epsilon", True),
    ("DDIMScheduler", {**SD, "clip_sample": False, "prediction_type": "v_prediction"}, "VP", "v_prediction", True),
    ("DDIMScheduler", {**SD, "clip_sample": False, "prediction_type": "sample"}, "VP", "sample", True),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}, "VP", "epsilon", False),
    ("DDPMScheduler", {**SD, "clip_sample": False}, "VP", "epsilon", False),
    ("EulerDiscreteScheduler", SD, "sigma", "epsilon", True),
    ("EulerDiscreteScheduler", {**SD, "prediction_type": "v_prediction"}, "sigma", "v_prediction", True),
    ("EulerAncestralDiscreteScheduler", SD, "sigma", "epsilon", False),
    ("HeunDiscreteScheduler", SD, "sigma", "epsilon", False),
    ("LMSDiscreteScheduler", SD, "sigma", "epsilon", False),
    ("DPMSolverMultistepScheduler", SD, "VP", "epsilon", False),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 1}, "VP", "epsilon", True),
    ("DPMSolverMultistepScheduler", FLOW, "flow", "flow", False),
    ("UniPCMultistepScheduler", SD, "VP", "epsilon", False),
    ("UniPCMultistepScheduler", FLOW, "flow", "flow", False),
    ("DEISMultistepScheduler", SD, "VP", "epsilon", False),
    ("LCMScheduler", SD, "VP", "epsilon", False),
    ("CogVideoXDDIMScheduler", {}, "VP", "epsilon", True),
    ("CogVideoXDPMScheduler", {}, "VP", "epsilon", False),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "flow", "flow", True),
    ("FlowMatchHeunDiscreteScheduler", {}, "flow", "flow", False),
    ("EDMEulerScheduler", {}, "sigma", "edm", True),
    ("EDMDPMSolverMultistepScheduler", {}, "sigma", "edm", False),
    ("CosineDPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0}, "sigma", "v_prediction", False),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options", "process", "kind", "first_order"), SCHEDULERS)
def test_process_and_prediction_kind_are_found(name, options, process, kind, first_order):
    if name.startswith("Cosine"):
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(6)
    fit = fit_schedule(scheduler, [float(t) for t in scheduler.timesteps])
    assert (fit.process, fit.kind, fit.first_order) == (process, kind, first_order)
    assert fit.schedule.num_steps == 6
    sigmas = [level.sigma / (level.alpha + level.sigma) for level in fit.schedule.levels]
    assert sigmas == sorted(sigmas, reverse=True)
    assert fit.error < 1e-5


def test_a_first_order_schedulers_run_is_our_chain_of_steps():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(8)
    fit = fit_schedule(scheduler, [float(t) for t in scheduler.timesteps])
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, 8, 8, generator=generator)
    for index, t in enumerate(scheduler.timesteps):
        output = torch.randn(ours.shape, generator=generator)
        ours, theirs = first_order_step(fit, index, ours, output), scheduler.step(output, t, theirs).prev_sample
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_probing_leaves_the_scheduler_as_it_was():
    scheduler = diffusers.UniPCMultistepScheduler(**SD)
    scheduler.set_timesteps(6)
    before = {key: repr(value) for key, value in vars(scheduler).items()}
    fit_schedule(scheduler, [float(t) for t in scheduler.timesteps])
    assert {key: repr(value) for key, value in vars(scheduler).items()} == before


def test_a_clipping_scheduler_is_refused_with_the_way_out():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=True)
    scheduler.set_timesteps(6)
    with pytest.raises(CaptureError, match=r"clips its x0 prediction.*register_to_config\(clip_sample=False"):
        fit_schedule(scheduler, [float(t) for t in scheduler.timesteps])


def test_an_unknown_process_is_refused_with_distances_and_the_way_out():
    scheduler = diffusers.TCDScheduler(**SD)
    scheduler.set_timesteps(6)
    with pytest.raises(CaptureError, match=r"VP/epsilon off by 0\.\d+.*from_config"):
        fit_schedule(scheduler, [float(t) for t in scheduler.timesteps])


def test_learned_variance_channels_are_dropped():
    sample, output = torch.zeros(1, 4, 8, 8), torch.randn(1, 8, 8, 8)
    assert torch.equal(trim(output, sample), output[:, :4])
    assert trim(sample, sample) is sample
