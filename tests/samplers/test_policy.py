"""`PipelinePolicy`: batches, seeds, decoding, encoding, and the errors a user can cause."""

import pytest
import torch

from scripts.tiny_families import by_name
from visalign.samplers.codec import Codec
from visalign.samplers.observe import CaptureError
from visalign.samplers.policy import PipelinePolicy
from visalign.types import Media, Prompt

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares above a very large green triangle")]


@pytest.fixture(scope="module")
def sd3():
    family = by_name("Stable Diffusion 3")
    return PipelinePolicy.from_pipeline(family.build(), **family.call)


def test_initial_latents_are_the_pipelines_own_draw(sd3):
    for seed in (0, 7, 2**40):
        own = sd3.observer.run(sd3.call.one(PROMPTS[0], seed), stop_after=1).steps[0].sample
        assert torch.equal(sd3.initial_latents([seed])[0], own[0])


def test_packed_latents_start_from_the_pipelines_own_draw_too():
    family = by_name("Flux")
    flux = PipelinePolicy.from_pipeline(family.build(), **family.call)
    own = flux.observer.run(flux.call.one(PROMPTS[0], 5), stop_after=1).steps[0].sample
    assert torch.equal(flux.initial_latents([5])[0], own.reshape(flux.latent_shape))
    assert flux.codec.noise_order is not None


def test_rows_of_a_batch_do_not_depend_on_one_another(sd3):
    x, conditioning = sd3.initial_latents([1, 2, 3]), sd3.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    together = sd3.predict(x, 1, conditioning).velocity
    for row in range(3):
        alone = sd3.predict(x[row : row + 1], 1, conditioning.select([row])).velocity
        assert torch.allclose(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_prompts_of_different_lengths_share_a_call_and_keep_their_order():
    family = by_name("Z-Image")
    policy = PipelinePolicy.from_pipeline(family.build(), **family.call)
    x, conditioning = policy.initial_latents([1, 2, 3]), policy.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    together = policy.predict(x, 0, conditioning).velocity
    alone = torch.cat([policy.predict(x[i : i + 1], 0, conditioning.select([i])).velocity for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], rtol=1e-2)


def test_each_distinct_prompt_is_encoded_once(sd3):
    calls = []
    hook = sd3.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    prompt = Prompt("never seen before")
    sd3.encode([prompt] * 5)
    once = len(calls)
    sd3.encode([prompt, Prompt("never seen before")])
    hook.remove()
    assert once > 0
    assert len(calls) == once


def test_prompts_that_differ_in_case_or_negative_are_encoded_apart(sd3):
    rows = sd3.encode([Prompt("a Dog"), Prompt("a dog"), Prompt("a dog", negative="ugly")]).prompts
    assert len({id(row) for row in rows}) == 3


def test_decode_is_the_pipelines_own_and_differentiable(sd3):
    latents = sd3.initial_latents([4, 5])
    media = sd3.decode(latents)
    assert [m.kind for m in media] == ["image", "image"]
    assert media[0].data.dtype == torch.uint8
    own = sd3.pipe.image_processor.postprocess(
        sd3.pipe.vae.decode(latents / sd3.pipe.vae.config.scaling_factor + sd3.pipe.vae.config.shift_factor).sample.detach(), "pt"
    )
    assert torch.equal(media[1].data, (own[1] * 255).round().to(torch.uint8))
    latents.requires_grad_()
    sd3.decode_tensor(latents).mean().backward()
    assert latents.grad.abs().sum() > 0
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2
    with torch.no_grad():
        numeric = (sd3.decode_tensor(latents + step * direction).mean() - sd3.decode_tensor(latents - step * direction).mean()) / (2 * step)
    assert float((latents.grad * direction).sum()) == pytest.approx(float(numeric), rel=0.05, abs=1e-5)


def test_latents_to_vae_and_back_is_exact(sd3):
    latents = sd3.initial_latents([1, 2])
    assert torch.allclose(sd3.codec.from_vae(sd3.codec.to_vae(latents)), latents, rtol=1e-5, atol=1e-5)
    expected = latents / sd3.pipe.vae.config.scaling_factor + sd3.pipe.vae.config.shift_factor
    assert torch.allclose(sd3.codec.to_vae(latents).float(), expected, rtol=1e-5, atol=1e-5)


def test_encode_media_is_the_vae_encoder_in_loop_latents(sd3):
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = sd3.pipe.vae.encode(pixels[None].float() / 127.5 - 1).latent_dist.mode()
    expected = (z - sd3.pipe.vae.config.shift_factor) * sd3.pipe.vae.config.scaling_factor
    assert torch.allclose(sd3.encode_media([Media("image", pixels)]), expected, rtol=1e-4, atol=1e-5)


def test_the_same_weights_under_another_call(sd3):
    other = sd3.with_call(num_inference_steps=7, guidance_scale=1.0)
    assert other.schedule.num_steps == 7
    assert other.capture.plans[0].combination.weights == (1.0,)
    assert other.roles is sd3.roles
    other.verify()


def test_bad_input_is_answered_with_what_to_do(sd3):
    family = by_name("Stable Diffusion 3")
    with pytest.raises(ValueError, match=r"has no call argument widht; it takes .*width"):
        PipelinePolicy.from_pipeline(family.build(), widht=16)
    with pytest.raises(CaptureError, match="num_inference_steps=2"):
        PipelinePolicy.from_pipeline(family.build(), **{**family.call, "num_inference_steps": 1})
    with pytest.raises(ValueError, match=r"no diffusers pipeline at '/nowhere/at/all': there is no such folder"):
        PipelinePolicy.from_pretrained("/nowhere/at/all")
    with pytest.raises(ValueError, match="2 samples but conditioning 1 rows"):
        sd3.predict(sd3.initial_latents([1, 2]), 0, sd3.encode(PROMPTS[:1]))
    with pytest.raises(ValueError, match="takes no image"):
        sd3.encode([Prompt("a", images=("x.png",))])
    with pytest.raises(ValueError, match="decode takes latents"):
        sd3.decode(torch.zeros(1, 4, 3, 3))


def test_observation_leaves_no_trace_on_the_pipeline(sd3):
    assert "forward" not in vars(sd3.pipe.transformer)
    assert "step" not in vars(sd3.pipe.scheduler)
    assert "decode" not in vars(sd3.pipe.vae)
    assert isinstance(sd3.codec, Codec)


def test_no_network_is_evaluated_by_the_probe_runs():
    family = by_name("Stable Diffusion 3")
    pipe = family.build()
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    PipelinePolicy.from_pipeline(pipe, **family.call)
    assert len(calls) <= 4


def test_a_loop_that_edits_its_latents_is_refused():
    family = by_name("Stable Diffusion 3")
    pipe = family.build()

    def blend(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] * 0.5}

    with pytest.raises(CaptureError, match="changes its latents between scheduler steps 0 and 1"):
        PipelinePolicy.from_pipeline(pipe, **family.call, callback_on_step_end=blend)


def test_damaged_weights_are_named_as_such(tmp_path):
    family = by_name("Stable Diffusion 3")
    family.build().save_pretrained(tmp_path / "model")
    weights = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or incomplete; copy them again"):
        PipelinePolicy.from_pretrained(str(tmp_path / "model"), **family.call)
    (tmp_path / "model" / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        PipelinePolicy.from_pretrained(str(tmp_path / "model"), **family.call)
