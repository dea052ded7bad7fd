"""What a captured pipeline tells rewards of latents: one name for what its numbers mean, and its prompts' embeddings."""

import torch

from scripts.tiny_families import by_name
from visalign.samplers.identity import pipeline_identity
from visalign.samplers.latent_source import PipelineLatents
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.reward_head import pooled_prompts
from visalign.types import Prompt


def test_the_convention_follows_the_autoencoder_and_the_size_and_nothing_else():
    family = by_name("Stable Diffusion 3")
    pipe = family.build()
    policy = PipelinePolicy.from_pipeline(pipe, **family.call)
    source = PipelineLatents(policy)
    assert source.convention == pipeline_identity(policy)
    assert PipelineLatents(policy.with_call(guidance_scale=1.0, num_inference_steps=5)).convention == source.convention
    larger = policy.with_call(height=32, width=32)
    assert larger.latent_shape != policy.latent_shape
    assert PipelineLatents(larger).convention != source.convention
    pipe.vae.register_to_config(scaling_factor=0.123)
    assert PipelineLatents(PipelinePolicy.from_pipeline(pipe, **family.call)).convention != source.convention


def test_prompts_are_embedded_as_heads_were_trained_on_them():
    family = by_name("Stable Diffusion 3")
    policy = PipelinePolicy.from_pipeline(family.build(), **family.call)
    prompts = [Prompt("a red circle"), Prompt("two blue squares")]
    assert torch.equal(PipelineLatents(policy).embed(prompts), pooled_prompts(policy)(prompts))
