"""Roles: the reference is the base bit for bit, snapshots swap in and restore exactly, adapters load in plain diffusers."""

import peft
import pytest
import torch

from scripts.tiny_families import by_name
from visalign.samplers.policy import PipelinePolicy
from visalign.types import Prompt

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares", negative="blurry")]


@pytest.fixture
def policy():
    family = by_name("Stable Diffusion 3")
    return PipelinePolicy.from_pipeline(family.build(), **family.call)


def outputs(policy, role="policy"):
    x = policy.initial_latents([1, 2])
    with torch.no_grad():
        return policy.predict(x, 1, policy.encode(PROMPTS), role).velocity


def move(policy, amount=0.05):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.named_trainable().values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


def test_lora_reference_is_the_base_bit_for_bit_before_and_after_training(policy):
    base = outputs(policy)
    policy.roles.add_lora(rank=4)
    assert torch.equal(outputs(policy), base)
    assert torch.equal(outputs(policy, "reference"), base)
    move(policy)
    assert not torch.equal(outputs(policy), base)
    assert torch.equal(outputs(policy, "reference"), base)


def test_asking_the_reference_leaves_the_policy_trainable(policy):
    policy.roles.add_lora(rank=4)
    names = set(policy.named_trainable())
    outputs(policy, "reference")
    assert set(policy.named_trainable()) == names
    policy.predict(policy.initial_latents([1]), 0, policy.encode(PROMPTS[:1])).velocity.sum().backward()
    assert all(p.grad is not None for name, p in policy.named_trainable().items() if "lora_B" in name)


def test_reference_in_the_middle_of_a_graph_does_not_change_its_gradient(policy):
    policy.roles.add_lora(rank=4)
    move(policy)
    x, conditioning = policy.initial_latents([1]), policy.encode(PROMPTS[:1])

    def gradient(ask_reference):
        for p in policy.named_trainable().values():
            p.grad = None
        loss = policy.predict(x, 0, conditioning).velocity.square().mean()
        if ask_reference:
            with torch.no_grad():
                policy.predict(x, 0, conditioning, "reference")
        loss.backward()
        return [p.grad.clone() for p in policy.named_trainable().values()]

    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True), strict=True))


@pytest.mark.parametrize("offload", [False, True])
def test_full_fine_tuning_keeps_a_frozen_reference(policy, offload):
    base = outputs(policy)
    policy.roles.train_full(offload_reference=offload)
    move(policy, 0.01)
    moved = outputs(policy)
    assert not torch.equal(moved, base)
    assert torch.equal(outputs(policy, "reference"), base)
    assert torch.equal(outputs(policy), moved)


def test_snapshots_are_copies_and_swapping_restores_exactly(policy):
    policy.roles.add_lora(rank=4)
    move(policy)
    policy.roles.snapshot("old")
    old = outputs(policy)
    before = {name: p.detach().clone() for name, p in policy.named_trainable().items()}
    move(policy)
    after = {name: p.detach().clone() for name, p in policy.named_trainable().items()}
    assert torch.equal(outputs(policy, "old"), old)
    assert all(torch.equal(p, after[name]) for name, p in policy.named_trainable().items())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_error_inside_a_role_restores_the_policy(policy):
    policy.roles.add_lora(rank=4)
    move(policy)
    policy.roles.snapshot("ema", {name: torch.zeros_like(p) for name, p in policy.named_trainable().items()})
    moved = outputs(policy)
    with pytest.raises(RuntimeError, match="boom"), policy.roles.use("ema"):
        raise RuntimeError("boom")
    assert torch.equal(outputs(policy), moved)


def test_roles_without_weights_and_wrong_targets_are_refused(policy):
    with pytest.raises(ValueError, match=r"no layer of transformer ends in nothing; its layers end in .*to_q"):
        policy.roles.add_lora(rank=2, target_modules=["nothing"])
    with pytest.raises(ValueError, match="role 'old' has no weights"):
        outputs(policy, "old")


def test_choosing_twice_and_foreign_snapshots_are_refused(policy):
    policy.roles.add_lora(rank=2)
    with pytest.raises(ValueError, match="already trains lora"):
        policy.roles.train_full()
    with pytest.raises(ValueError, match="must agree"):
        policy.roles.snapshot("old", {"x": torch.zeros(1)})


def test_components_without_a_lora_loader_are_saved_as_peft_folders(tmp_path):
    family = by_name("Stable Audio")
    policy = PipelinePolicy.from_pipeline(family.build(), **family.call)
    policy.roles.add_lora(rank=4)
    move(policy)
    policy.save_adapter(tmp_path)
    plain = family.build()
    peft.PeftModel.from_pretrained(plain.transformer, tmp_path / "transformer")
    loaded = PipelinePolicy.from_pipeline(plain, **family.call)
    assert torch.allclose(outputs(loaded), outputs(policy), rtol=1e-5, atol=1e-6)
    assert "peft.PeftModel.from_pretrained(pipe.transformer" in (tmp_path / "loading.json").read_text()


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "Stable Diffusion XL", "Wan 2.1"])
def test_the_saved_adapter_loads_in_plain_diffusers_and_predicts_the_same(tmp_path, name):
    family = by_name(name)
    policy = PipelinePolicy.from_pipeline(family.build(), **family.call)
    policy.roles.add_lora(rank=4)
    move(policy)
    policy.save_adapter(tmp_path / "adapter")
    plain = family.build()
    plain.load_lora_weights(tmp_path / "adapter")
    loaded = PipelinePolicy.from_pipeline(plain, **family.call)
    assert torch.allclose(outputs(loaded), outputs(policy), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs(loaded), outputs(policy, "reference"), rtol=1e-3, atol=1e-4)
