"""Negative models: offsets merge exactly whatever their ranks, and guidance subtracts what the negative weights predict."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.tiny_families import by_name
from visalign.samplers.guidance import GuidedPolicy
from visalign.samplers.negative import ask_against, give_negative
from visalign.samplers.offsets import Factors, Offset, merge_offsets, read_offset
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.roles import ATTENTION
from visalign.samplers.rollout import generate
from visalign.types import Prompt

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares", negative="blurry")]


def build(name="Stable Diffusion 3", **call):
    family = by_name(name)
    return PipelinePolicy.from_pipeline(family.build(), **{**family.call, **call})


def trained_folder(folder, name, rank, seed, mode="lora", **lora):
    """The adapter folder of a policy whose trained weights were moved at random."""
    policy = build(name)
    policy.roles.add_lora(rank=rank, **lora) if mode == "lora" else policy.roles.train_full()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.named_trainable().values():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    policy.save_adapter(folder)
    return folder


def outputs(policy, predict=None, step=1):
    predict = predict or policy.predict
    with torch.no_grad():
        return predict(policy.initial_latents([1, 2]), step, policy.encode(PROMPTS), "policy").velocity


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("adapters")
    return (trained_folder(base / "positive", "Stable Diffusion 3", 4, 1),
            trained_folder(base / "negative", "Stable Diffusion 3", 2, 2, target_modules=["to_q", "to_v", "proj_out"]))


def test_both_published_forms_of_the_combination_agree():
    """pos 1, neg 0.4, guidance scale 7.5 = w + 1: 4.9."""
    positive, negative, scale = 1.0, 0.4, 7.5
    assert negative + scale * (positive - negative) == pytest.approx(4.9)
    assert scale * positive - (scale - 1) * negative == pytest.approx(4.9)


def scalar(value):
    return Offset(layers={"t.x": Factors(torch.ones(1, 1), torch.full((1, 1), value))}, tensors={"t.y": torch.full((1,), value)})


@pytest.mark.parametrize(("a", "b", "expected"), [(1.0, 1.0, 0.9), (0.6, 1.0, 0.82), (0.0, 1.0, 0.7), (1.0, 0.0, 1.2)])
def test_the_merged_weight_is_base_plus_both_offsets(a, b, expected):
    """Base 1, eta 0.2, delta -0.3; the published merge weight m = 0.4 is a = 0.6."""
    merged = merge_offsets(scalar(0.2), scalar(-0.3), a, b)
    assert 1 + merged.layers["t.x"].dense(torch.zeros(1, 1)).item() == pytest.approx(expected)
    assert 1 + merged.tensors["t.y"].item() == pytest.approx(expected)


def test_factors_of_different_ranks_join_exactly():
    generator = torch.Generator().manual_seed(0)
    first, second = (Factors(torch.randn(r, 3, 2, 2, generator=generator), torch.randn(5, r, 1, 1, generator=generator)) for r in (4, 1))
    like = torch.zeros(5, 3, 2, 2)
    joined = first * 0.5 + second * 0.25
    assert joined.down.shape[0] == 5
    torch.testing.assert_close(joined.dense(like), 0.5 * first.dense(like) + 0.25 * second.dense(like), rtol=1e-5, atol=1e-6)


def test_positive_and_negative_weights_are_those_plain_diffusers_makes(folders):
    positive, negative = folders
    plain = by_name("Stable Diffusion 3").build()
    plain.load_lora_weights(positive, adapter_name="eta")
    expected = outputs(PipelinePolicy.from_pipeline(plain, **by_name("Stable Diffusion 3").call))
    plain.load_lora_weights(negative, adapter_name="delta")
    plain.set_adapters(["eta", "delta"], [0.6, 0.8])
    expected_negative = outputs(PipelinePolicy.from_pipeline(plain, **by_name("Stable Diffusion 3").call))
    policy = build()
    base = outputs(policy)
    give_negative(policy, read_offset(policy, negative), read_offset(policy, positive), a=0.6, b=0.8)
    torch.testing.assert_close(outputs(policy), expected, rtol=1e-5, atol=1e-6)
    with policy.roles.use("negative"):
        torch.testing.assert_close(outputs(policy), expected_negative, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(policy), expected, rtol=1e-5, atol=1e-6)
    with policy.roles.use("reference"):
        assert torch.equal(outputs(policy), base)
    assert (expected - expected_negative).abs().max() > 1e-3


def test_a_policy_with_trained_lora_keeps_it_as_the_positive_model(folders):
    policy, same = build(), build()
    positive, negative = folders
    policy.roles.add_lora(rank=4, target_modules=[*ATTENTION, "proj_out"])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.named_trainable().values():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    policy.save_adapter(positive.parent / "own")
    before = outputs(policy)
    give_negative(policy, read_offset(policy, negative), a=0.5)
    assert torch.equal(outputs(policy), before)
    give_negative(same, read_offset(same, negative), read_offset(same, positive.parent / "own"), a=0.5)
    with policy.roles.use("negative"), same.roles.use("negative"):
        torch.testing.assert_close(outputs(policy), outputs(same), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="leave eta out"):
        give_negative(policy, Offset(), Offset())


def test_whole_components_and_lora_merge_as_full_weights(tmp_path, folders):
    whole = trained_folder(tmp_path / "whole", "Stable Diffusion 3", 0, 7, mode="full")
    policy, lora = build(), build()
    base = dict(policy.denoisers["transformer"].named_parameters())
    base = {name: value.detach().clone() for name, value in base.items()}
    trained = load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors")
    give_negative(lora, read_offset(lora, folders[0]))
    give_negative(policy, read_offset(policy, whole), read_offset(policy, folders[0]), a=0.5, b=0.25)
    factors = read_offset(policy, folders[0]).layers
    values = policy.snapshots()["negative"]
    for name, start in base.items():
        layer = f"transformer.{name.removesuffix('.weight')}"
        low_rank = 0.5 * factors[layer].dense(start) if layer in factors else 0.0
        torch.testing.assert_close(values[f"transformer.{name}"], start + low_rank + 0.25 * (trained[name] - start), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="a policy with LoRA cannot carry"):
        read_offset(lora, whole)


def test_alpha_in_the_file_scales_the_offset(tmp_path, folders):
    tensors = load_file(folders[1] / "pytorch_lora_weights.safetensors")
    layer = next(key for key in tensors if key.endswith("lora_A.weight")).removesuffix(".lora_A.weight")
    (tmp_path / "alpha").mkdir()
    save_file({**tensors, f"{layer}.alpha": torch.tensor(6.0)}, tmp_path / "alpha" / "pytorch_lora_weights.safetensors")
    policy = build()
    plain, scaled = read_offset(policy, folders[1]).layers[layer], read_offset(policy, tmp_path / "alpha").layers[layer]
    torch.testing.assert_close(scaled.up, 3.0 * plain.up)  # alpha 6 / rank 2


FAMILIES = ["Stable Diffusion 3", "Stable Diffusion XL", "Wan 2.1", "Stable Audio", "InstructPix2Pix", "Flux, true CFG"]


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_subtracts_the_negative_models_predictions_in_every_kind_of_pipeline(tmp_path, name):
    """Batched and separate calls, LoRA loaders and peft folders: where linear guidance has a negative weight g, exchanging the model adds
    g (prediction of the negative weights - prediction of the positive weights) to the output, and nothing else changes."""
    family = by_name(name)
    prompt = Prompt("a photo of a dog", images=family.condition_images(0))
    policy = PipelinePolicy(family.build(), family.call, probe=prompt)
    folder = trained_folder_of(policy.pipe, family, prompt, tmp_path / "negative")
    give_negative(policy, read_offset(policy, folder))
    x, conditioning = policy.initial_latents([1]), policy.encode([prompt])
    step = next(k for k in range(policy.schedule.num_steps) if policy.subtracts(k))
    plan, timestep = policy.capture.plans[step], policy.schedule.timesteps[step]
    rows = {}
    with torch.no_grad():
        for role in ("policy", "negative"):
            with policy.roles.use(role):
                rows[role] = policy.denoise.predictions(x, plan, [timestep], plan.scales, conditioning, (0,))
        mixed = policy.model_output(x, step, conditioning, "policy", "negative")
        plain = policy.model_output(x, step, conditioning, "policy")
    weights = plan.combination.weights
    expected = plain + sum(w * (n - p) for w, p, n in zip(weights, rows["policy"], rows["negative"], strict=True) if w < 0)
    assert plan.combination.correction == "none"
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    assert (mixed - plain).abs().max() > 1e-4


def trained_folder_of(pipe, family, prompt, folder):
    policy = PipelinePolicy(family.build(), family.call, probe=prompt)
    policy.roles.add_lora(rank=2)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in policy.named_trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy.save_adapter(folder)
    return folder


def test_the_output_is_the_published_combination_of_two_plain_models(folders):
    """out = m_neg(uncond) + s (m_pos(cond) - m_neg(uncond)), each term from its own pipeline with its own adapter: the conditional
    prediction is the output at guidance scale 1, the unconditional one follows from the outputs at scales 1 and s."""
    def alone(folder, scale):
        family = by_name("Stable Diffusion 3")
        pipe = family.build()
        pipe.load_lora_weights(folder)
        policy = PipelinePolicy.from_pipeline(pipe, **{**family.call, "guidance_scale": scale})
        with torch.no_grad():
            return policy.model_output(policy.initial_latents([1, 2]), 1, policy.encode([PROMPTS[0]] * 2))

    scale, (positive, negative) = 4.5, folders
    conditional = alone(positive, 1.0)
    unconditional = (scale * alone(negative, 1.0) - alone(negative, scale)) / (scale - 1)
    policy = build(guidance_scale=scale)
    give_negative(policy, read_offset(policy, negative), read_offset(policy, positive), a=0.0, b=1.0)
    with torch.no_grad():
        output = policy.model_output(policy.initial_latents([1, 2]), 1, policy.encode([PROMPTS[0]] * 2), "policy", "negative")
    torch.testing.assert_close(output, unconditional + scale * (conditional - unconditional), rtol=1e-4, atol=1e-5)


def test_equal_weights_are_plain_guidance_and_the_sample_moves_with_other_ones(folders):
    policy = build()
    positive, negative = (read_offset(policy, folder) for folder in folders)
    give_negative(policy, negative, positive, a=1.0, b=0.0)
    plain = generate(policy, PROMPTS, [1, 2])
    guided = GuidedPolicy(policy, ask=ask_against(policy))
    torch.testing.assert_close(generate(guided, PROMPTS, [1, 2]), plain, rtol=1e-4, atol=1e-5)
    give_negative(policy, negative, a=1.0, b=1.0)
    assert (generate(guided, PROMPTS, [1, 2]) - plain).abs().max() > 1e-3


def test_pipelines_without_subtraction_and_roles_without_weights_are_refused(folders):
    with pytest.raises(ValueError, match=r"guidance subtracts nothing.*guidance_scale"):
        ask_against(build(guidance_scale=1.0))
    with pytest.raises(ValueError, match=r"guidance subtracts nothing"):
        ask_against(build("Flux"))
    with pytest.raises(ValueError, match="role 'negative' has no weights"):
        ask_against(build())
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        merge_offsets(Offset(), Offset(), a=1.5)


def test_folders_that_do_not_fit_are_refused(tmp_path, folders):
    policy = build()
    with pytest.raises(ValueError, match=r"nothing in .* fits transformer"):
        read_offset(policy, tmp_path)
    tensors = load_file(folders[1] / "pytorch_lora_weights.safetensors")
    strange = (("text_encoder.x.lora_A.weight", "no part of the denoiser"), ("transformer.x.lora_magnitude_vector", "not lora_A"))
    for extra, message in strange:
        folder = tmp_path / extra
        folder.mkdir()
        more = {extra: torch.ones(2, 2)} | ({extra.replace("_A", "_B"): torch.ones(2, 2)} if "_A" in extra else {})
        save_file({**tensors, **more}, folder / "pytorch_lora_weights.safetensors")
        with pytest.raises(ValueError, match=message):
            read_offset(policy, folder)
    folder = tmp_path / "rslora"
    folder.mkdir()
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer.r": 2, "transformer.use_rslora": True})}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="use_rslora"):
        read_offset(policy, folder)
    narrow = build()
    narrow.roles.add_lora(rank=2, target_modules=["to_q"])
    with pytest.raises(ValueError, match="layers that the policy does not train"):
        give_negative(narrow, read_offset(narrow, folders[1]))
