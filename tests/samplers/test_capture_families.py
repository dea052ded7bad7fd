"""Capture is exact, family by family: every tiny pipeline of the registry that is quick to build, and those that must be refused.

`scripts/capture_families.py` runs the same checks over the whole registry at two step counts; here each family runs once.
"""

import pytest
import torch

from scripts.capture_families import compare, plain_scheduler, prompts_of, roundtrip
from scripts.tiny_families import FAMILIES, Family, by_name
from visalign.samplers.observe import CaptureError
from visalign.samplers.policy import PipelinePolicy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PASSED = (
    "Stable Diffusion 1.5", "Stable Diffusion, v-prediction", "Stable Diffusion, zero SNR", "Stable Diffusion, DDPM", "Stable Diffusion XL",
    "Stable Diffusion 3", "Flux", "Flux, true CFG", "Flux Kontext", "Flux Fill", "Flux 2 Klein", "PixArt-alpha", "Qwen-Image", "Z-Image",
    "Wan 2.1", "Wan 2.2", "Wan 2.2 TI2V", "Wan 2.1 image to video", "CogVideoX", "CogVideoX, dynamic CFG", "LTX-Video", "Stable Audio",
    "InstructPix2Pix", "DDIM", "Lumina 2", "CogView 4")
REFUSED = {
    "Stable Diffusion, image to image": "does not start from pure noise", "DDIM, clipped": "clips its x0",
    "Amused": "not a continuous state", "LTX-2": "steps its scheduler", "HunyuanImage 2.1": "not a linear combination"}


@pytest.fixture(scope="module", params=PASSED)
def captured(request: pytest.FixtureRequest) -> tuple[Family, PipelinePolicy]:
    family = by_name(request.param)
    return family, PipelinePolicy(family.build(), family.call, probe=prompts_of(family)[0])


def test_names_are_unique():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_replay_and_decode_equal_the_pipelines_own_run(captured):
    """Relative error 1e-4 of the final latents, capture's own verification and a plain run with another prompt; decoding is identical."""
    family, policy = captured
    report = policy.verify()
    assert report.latent_error < 1e-4
    assert report.batch_error < 1e-4
    scheduler = policy.pipe.scheduler if report.parity == "own scheduler" else plain_scheduler(policy.pipe.scheduler)
    errors = compare(policy, scheduler, prompts_of(family)[1], seed=0 if family.sampled_condition else 5)
    assert errors["decode"] < 1e-6
    assert errors["initial"] < 1e-6 or family.sampled_condition
    assert errors["independent"] < 1e-4


def test_vae_map_is_inverted(captured):
    """Pixel-space families have no map; for all others ``from_vae(to_vae(z)) = z`` to 1e-5."""
    _, policy = captured
    errors = roundtrip(policy)
    assert all(error < 1e-5 for error in errors)
    assert bool(errors) == any(name in policy.observer.modules for name in ("vae", "movq"))


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "Wan 2.2", "Stable Audio"])
def test_decoding_is_differentiable(name):
    family = by_name(name)
    policy = PipelinePolicy(family.build(), family.call)
    latents = policy.initial_latents([1]).requires_grad_()
    policy.decode_tensor(latents).square().mean().backward()
    assert latents.grad is not None
    assert torch.isfinite(latents.grad).all()
    assert latents.grad.abs().max() > 0


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    family = by_name(name)
    with pytest.raises(CaptureError, match=REFUSED[name]):
        PipelinePolicy(family.build(), family.call, probe=prompts_of(family)[0]).verify()
