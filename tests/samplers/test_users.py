"""Users in the denoiser: nothing changes at zero, every row is for its own user, nobody is the population, and everything comes back."""

import math

import peft
import pytest
import torch
from safetensors.torch import save_file

from scripts.tiny_families import by_name
from visalign import checkpoint
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.user_attention import UserAttention, UserLayer, load_users, text_readers
from visalign.samplers.users import UserTable
from visalign.types import Prompt
from visalign.users import asking, with_users

FAMILIES = ["Stable Diffusion 1.5", "Stable Diffusion 3", "Flux", "Wan 2.1"]
PROMPTS = [Prompt("a red circle"), Prompt("a red circle")]


def build(family="Stable Diffusion 3", names=("ann", "bob"), **changes):
    found = by_name(family)
    policy = PipelinePolicy.from_pipeline(found.build(), **{**found.call, **changes})
    torch.manual_seed(5)
    if names:
        policy.add_users(UserTable.random(names, num_tokens=3, width=8))
    return policy


def move(policy, seed=3, amount=0.2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.named_trainable().values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


def velocity(policy, *users, role="policy", step=0):
    """One row per user, the same state in every row."""
    prompts = [asking(PROMPTS[0], user) for user in users]
    with torch.no_grad():
        return policy.predict(policy.initial_latents([1] * len(users)), step, policy.encode(prompts), role).velocity


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_for_its_own_user_and_the_reference_for_nobody(family):
    policy = build(family, names=())
    base = velocity(policy, None, None)
    policy.add_users(UserTable.random(["ann", "bob"], num_tokens=3, width=8))
    assert torch.equal(velocity(policy, "ann", "bob"), base)
    move(policy)
    both = velocity(policy, "ann", "bob")
    assert not torch.allclose(both[0], both[1], atol=1e-5)
    assert torch.equal(velocity(policy, "ann", "bob", role="reference"), base)
    assert torch.equal(velocity(policy, None, None), base)
    mixed = velocity(policy, None, "bob")
    assert torch.equal(mixed[0], base[0])
    # Another batch size may take another matrix kernel: rounding is relative to the largest value, users differ a thousand times more.
    rounding = 1e-5 * float(both.abs().max())
    torch.testing.assert_close(mixed[1], both[1], atol=rounding, rtol=0)
    torch.testing.assert_close(velocity(policy, "ann")[0], both[0], atol=rounding, rtol=0)


@pytest.mark.parametrize("family", ["Stable Diffusion 3", "Flux"])
def test_nothing_changes_at_the_start_in_half_precision_either(family):
    found = by_name(family)
    policy = PipelinePolicy.from_pipeline(found.build().to(torch.bfloat16), **found.call)
    base = velocity(policy, "ann", "bob")
    policy.add_users(UserTable.random(["ann", "bob"], num_tokens=2, width=8))
    assert torch.equal(velocity(policy, "ann", "bob"), base)
    assert torch.equal(velocity(policy, None, "bob"), base)


def test_users_go_where_text_is_read():
    pipe = build("Stable Diffusion 1.5")
    assert all(name.endswith("attn2") for name in pipe.roles.users.readers["unet"])
    joint = build("Flux")
    assert all(name.startswith("transformer_blocks.") for name in joint.roles.users.readers["transformer"])


def test_interpolation_ends_at_its_users_and_passes_between_them():
    policy = build()
    move(policy)
    ann, bob = velocity(policy, "ann", "bob")
    ends = velocity(policy, {"ann": 1.0, "bob": 0.0}, {"bob": 1.0})
    assert torch.equal(ends[0], ann)
    assert torch.equal(ends[1], bob)
    middle = velocity(policy, {"ann": 0.5, "bob": 0.5})[0]
    assert float((middle - ann).norm()) > 0
    assert float((middle - ann).norm() + (middle - bob).norm()) < 2 * float((ann - bob).norm())


def test_mixtures_are_linear_in_the_tokens():
    table = UserTable(["a", "b", "c"], torch.arange(24.0).reshape(3, 2, 4))
    tokens, present = table([(("a", 0.25), ("c", 0.75)), (), (("b", -2.0),)])
    torch.testing.assert_close(tokens[0], 0.25 * table.tokens[0] + 0.75 * table.tokens[2])
    torch.testing.assert_close(tokens[2], -2 * table.tokens[1])
    assert present.tolist() == [True, False, True]


@pytest.mark.parametrize("normalised", [False, True])
def test_the_layer_is_softmax_attention_to_the_tokens(normalised):
    layer = UserLayer(width=2, queries=4, values=4, heads=2, normalised=normalised)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.value.weight)
    queries, users = torch.randn(1, 3, 4), torch.randn(1, 2, 2)
    k, v = users[0] @ layer.key.weight.T, users[0] @ layer.value.weight.T
    expected = torch.empty(3, 4)
    for head in range(2):
        part = slice(2 * head, 2 * head + 2)
        q, own = queries[0][:, part], k[:, part]
        if normalised:
            q, own = (row / row.square().mean(dim=1, keepdim=True).sqrt() for row in (q, own))
        expected[:, part] = (q @ own.T / math.sqrt(2)).softmax(dim=1) @ v[:, part]
    torch.testing.assert_close(layer(queries, users)[0], expected, atol=1e-5, rtol=1e-5)


def test_beside_an_adapter_the_reference_is_the_base_and_nobody_is_the_adapter():
    policy = build(names=())
    base = velocity(policy, None)
    policy.roles.add_lora(rank=2)
    policy.add_users(UserTable.random(["ann"], 2, 8))
    names = list(policy.named_trainable())
    assert torch.equal(velocity(policy, "ann"), base)
    move(policy)
    assert list(policy.named_trainable()) == names
    assert any("lora_" in name for name in names)
    assert "users.table.tokens" in names
    assert torch.equal(velocity(policy, "ann", role="reference"), base)
    assert not torch.equal(velocity(policy, None), base)
    assert not torch.equal(velocity(policy, None), velocity(policy, "ann"))


def test_beside_full_fine_tuning_the_kept_reference_has_no_users():
    policy = build(names=())
    base = velocity(policy, None)
    policy.roles.train_full()
    policy.add_users(UserTable.random(["ann"], 2, 8))
    move(policy, amount=0.01)
    assert torch.equal(velocity(policy, "ann", role="reference"), base)


def test_a_snapshot_brings_its_users_along():
    policy = build()
    move(policy)
    old = velocity(policy, "ann")
    policy.snapshot("old")
    move(policy, seed=4)
    assert not torch.equal(velocity(policy, "ann"), old)
    assert torch.equal(velocity(policy, "ann", role="old"), old)
    again = policy.with_call(num_inference_steps=3)
    assert again.roles is policy.roles


def test_recomputed_activations_are_for_the_users_of_their_own_forward_pass():
    policy = build()
    move(policy)
    x, conditionings = policy.initial_latents([1]), [policy.encode([asking(PROMPTS[0], user)]) for user in ("ann", "bob")]

    def gradients():
        for parameter in policy.named_trainable().values():
            parameter.grad = None
        # Bob's forward pass stands between Ann's and her backward pass.
        first, second = (policy.predict(x, 0, conditioning).velocity for conditioning in conditionings)
        (first.square().mean() + 2 * second.square().mean()).backward()
        return [parameter.grad.clone() for parameter in policy.named_trainable().values()]

    plain = gradients()
    policy.enable_gradient_checkpointing()
    policy.train(True)
    for one, two in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-4)
    assert all(float(gradient.abs().sum()) > 0 for gradient in plain)


def test_a_batch_of_nobody_has_a_gradient_and_it_is_zero():
    policy = build()
    move(policy)
    output = policy.predict(policy.initial_latents([1]), 0, policy.encode(PROMPTS[:1])).velocity
    assert torch.equal(output, velocity(policy, None, role="reference"))
    output.square().mean().backward()
    assert all(not parameter.grad.any() for parameter in policy.named_trainable().values())


def test_what_is_saved_conditions_a_fresh_pipeline_alike(tmp_path):
    policy = build("Stable Diffusion 1.5", num_inference_steps=2)
    move(policy)
    policy.save_adapter(tmp_path)
    expected = velocity(policy, "ann", "bob")
    other = build("Stable Diffusion 1.5", names=(), num_inference_steps=2)
    plain = velocity(other, None)
    other.roles.add_users(load_users(other.pipe.components, tmp_path))
    assert torch.equal(velocity(other, "ann", "bob"), expected)

    def picture(user):
        generator = torch.Generator().manual_seed(1)
        with other.roles.users.given([user]):
            return torch.tensor(other.pipe("a red circle", generator=generator, output_type="np", **other.call.fixed).images)

    assert not torch.allclose(picture((("ann", 1.0),)), picture((("bob", 1.0),)))
    assert torch.equal(velocity(other, None), plain)


def test_a_loaded_adapter_and_its_users_meet_again(tmp_path):
    policy = build("Stable Audio", names=())
    policy.roles.add_lora(rank=2)
    policy.add_users(UserTable.random(["ann"], 2, 8))
    move(policy)
    policy.save_adapter(tmp_path)
    plain = by_name("Stable Audio").build()
    adapted = peft.PeftModel.from_pretrained(plain.transformer, tmp_path / "transformer")
    loaded = PipelinePolicy.from_pipeline(plain, **by_name("Stable Audio").call)
    loaded.roles.add_users(load_users({"transformer": adapted}, tmp_path))
    torch.testing.assert_close(velocity(loaded, "ann"), velocity(policy, "ann"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(velocity(loaded, None), velocity(policy, None), rtol=1e-5, atol=1e-5)
    assert "load_users(pipe.components, ADAPTER)" in (tmp_path / "loading.json").read_text()


def test_training_resumes_bit_for_bit(tmp_path):
    def step(policy, optimizer):
        loss = policy.predict(policy.initial_latents([1, 2]), 0, policy.encode(with_users(PROMPTS[:1], ["ann", "bob"]))).velocity
        (loss - torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = build()
    optimizer = torch.optim.AdamW(first.named_trainable().values(), lr=1e-2)
    step(first, optimizer)
    tensors, state = checkpoint.flatten_optimizer(optimizer)
    path = checkpoint.save(tmp_path, 1, {"weights": dict(first.named_trainable()), "optimizer": tensors}, {"optimizer": state}, keep=1)
    step(first, optimizer)

    second, saved = build(), checkpoint.load(path)
    move(second, amount=1.0)
    with torch.no_grad():
        for name, parameter in second.named_trainable().items():
            parameter.copy_(saved.tensors["weights"][name])
    optimizer = torch.optim.AdamW(second.named_trainable().values(), lr=1e-2)
    checkpoint.restore_optimizer(optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
    step(second, optimizer)
    assert first.named_trainable().keys() == second.named_trainable().keys()
    assert all(torch.equal(parameter, second.named_trainable()[name]) for name, parameter in first.named_trainable().items())


def test_given_embeddings_stay_as_they_are_and_may_have_one_token(tmp_path):
    save_file({"ann": torch.randn(6), "bob": torch.randn(6)}, tmp_path / "embeddings.safetensors")
    table = UserTable.from_file(tmp_path / "embeddings.safetensors")
    assert (set(table.names), tuple(table.tokens.shape)) == ({"ann", "bob"}, (2, 1, 6))
    policy = build(names=())
    policy.add_users(table)
    assert all(".layers." in name for name in policy.named_trainable())
    policy.save_adapter(tmp_path / "adapter")
    again = load_users(policy.denoisers, tmp_path / "adapter")
    assert torch.equal(again.table.tokens, table.tokens)
    assert UserTable.from_file(tmp_path / "embeddings.safetensors", learned=True).tokens.requires_grad


def test_wrong_input_is_refused_with_a_way_out(tmp_path):
    policy = build()
    with pytest.raises(ValueError, match=r"unknown user 'anne', did you mean 'ann'\?; known: ann, bob"):
        velocity(policy, "anne")
    with pytest.raises(ValueError, match="users already"):
        policy.add_users(UserTable.random(["ann"]))
    with pytest.raises(ValueError, match="choose lora weights before add_users"):
        policy.roles.add_lora()
    with pytest.raises(ValueError, match="give every user once"):
        UserTable.random(["ann", "ann"])
    with pytest.raises(ValueError, match=r"must be \(users, tokens, width\), got \(2, 4\)"):
        UserTable(["ann", "bob"], torch.zeros(2, 4))
    save_file({"ann": torch.zeros(3), "bob": torch.zeros(4)}, tmp_path / "uneven.safetensors")
    with pytest.raises(ValueError, match="the same for all"):
        UserTable.from_file(tmp_path / "uneven.safetensors")
    with pytest.raises(ValueError, match="cannot read user embeddings"):
        UserTable.from_file(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"holds no users\.json"):
        load_users(policy.denoisers, tmp_path)
    policy.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="load the adapter into the pipeline it was trained for"):
        load_users({}, tmp_path)


def test_a_policy_without_users_takes_no_notice_of_them():
    policy = build(names=())
    assert torch.equal(velocity(policy, "ann"), velocity(policy, None))


def test_a_denoiser_without_attention_is_refused():
    silent = torch.nn.Sequential(torch.nn.Linear(2, 2))
    readers = text_readers({"net": silent}, lambda: silent(torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="no attention module to add users to in net"):
        UserAttention({"net": silent}, readers, UserTable.random(["ann"]))
