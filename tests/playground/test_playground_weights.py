"""The shipped weights: plain diffusers and plain open_clip load them, and they are as good as their record says."""

import json
import random
from typing import Any

import open_clip
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from visalign import playground
from visalign.playground import world

WEIGHTS = playground.pipeline_path().parent
SCORES: dict[str, Any] = json.loads((WEIGHTS / "scores.json").read_text())


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(playground.pipeline_path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: StableDiffusion3Pipeline, prompts: list[str], **call: Any) -> torch.Tensor:
    call = {"num_inference_steps": 8, "guidance_scale": 1.0, "max_sequence_length": 12} | call
    images = pipe(prompts, output_type="np", generator=torch.Generator().manual_seed(0), **call).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)


def test_plain_from_pretrained_gives_one_dtype(pipe: StableDiffusion3Pipeline) -> None:
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}


def test_gold_scores_lie_near_the_recorded_ones(pipe: StableDiffusion3Pipeline) -> None:
    """96 prompts, recorded on 256: four standard errors (0.3 / sqrt(96) for mean, 0.45 / sqrt(96) for strict)."""
    record = SCORES["pipeline"][0]
    assert (record["guidance"], record["steps"]) == (1.0, 8)
    prompts = playground.heldout_prompts(96, seed=1)
    verdict = playground.verify(draw(pipe, prompts), prompts)
    assert verdict.mean.mean().item() == pytest.approx(record["mean"], abs=0.12)
    assert verdict.strict.mean().item() == pytest.approx(record["strict"], abs=0.18)
    shuffled = playground.verify(draw(pipe, prompts), prompts[7:] + prompts[:7])
    assert shuffled.mean.mean() < verdict.mean.mean() - 0.15


def test_the_last_step_is_not_wasted(pipe: StableDiffusion3Pipeline) -> None:
    pipe.scheduler.set_timesteps(10)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.linspace(1, 0, 11), atol=1e-6, rtol=0)


def test_the_third_encoder_says_zero_and_its_length_hardly_matters(pipe: StableDiffusion3Pipeline) -> None:
    tokens = pipe._get_t5_prompt_embeds(["a red circle"], max_sequence_length=16)
    assert tokens.shape == (1, 16, pipe.transformer.config.joint_attention_dim)
    assert not tokens.any()
    prompts = ["a red circle", "two blue squares"]
    short, default = draw(pipe, prompts, num_inference_steps=4), draw(pipe, prompts, num_inference_steps=4, max_sequence_length=256)
    assert (short.float() - default.float()).abs().mean() < 8


def test_every_word_of_the_grammar_is_one_token(pipe: StableDiffusion3Pipeline) -> None:
    texts = [caption.text for caption in world.all_captions()]
    for text, ids in zip(texts, pipe.tokenizer(texts).input_ids, strict=True):
        assert len(ids) == len(text.split()) + 2 <= pipe.tokenizer.model_max_length


def test_autoencoder_keeps_what_the_verifier_reads(pipe: StableDiffusion3Pipeline) -> None:
    captions = [world.parse(prompt) for prompt in playground.train_prompts(128)]
    rng = random.Random(0)
    images = world.render([world.sample_scene(caption, rng) for caption in captions])
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(images.float() / 127.5 - 1).latents).sample
    verdict = playground.verify(decoded.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8), captions)
    assert verdict.strict.mean() >= 0.97


def test_clip_loads_with_open_clip_and_retrieves_captions() -> None:
    """Own caption among 32 of other things on held-out captions; chance is 0.03."""
    name = f"local-dir:{playground.clip_path()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    captions = [caption for caption in world.heldout_captions() if len(caption.objects) == 1][:16]
    captions += [caption for caption in world.heldout_captions() if caption.relation][:: 706 // 16][:16]
    rng = random.Random(0)
    images = world.render([world.sample_scene(caption, rng) for caption in captions])
    pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        image = model.eval().encode_image(pixels, normalize=True)
        text = model.encode_text(tokenizer([caption.text for caption in captions]), normalize=True)
    accuracy = ((image @ text.T).argmax(1) == torch.arange(len(captions))).float().mean()
    assert accuracy >= 0.8
    assert min(SCORES["clip_retrieval"].values()) >= 0.95
