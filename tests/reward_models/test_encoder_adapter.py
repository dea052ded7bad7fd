"""LoRA on an encoder: which layers, a start that changes nothing, and tensors that can be exchanged."""

import pytest
import torch
from torch import nn

from visalign.reward_models.adapter import EncoderAdapter, LoraSettings


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.c_fc, self.c_proj = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return x + self.c_proj(torch.relu(self.c_fc(x)))


def data():
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def test_every_linear_layer_outside_attention_is_adapted_and_nothing_else_learns():
    network = Network()
    adapter = EncoderAdapter(network, LoraSettings(rank=2))
    assert sorted({name.partition(".")[0] for name in adapter.parameters}) == ["c_fc", "c_proj"]
    assert {name for name, p in network.named_parameters() if p.requires_grad} == set(adapter.parameters)
    assert adapter.parameters["c_fc.lora_A.default.weight"].shape == (2, 8)


def test_a_reset_adapter_changes_nothing_and_is_the_same_for_the_same_seed():
    network = Network()
    before = network(data())
    adapter = EncoderAdapter(network, LoraSettings(rank=2))
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.normal_()
    assert not torch.allclose(network(data()), before)
    adapter.reset(torch.Generator().manual_seed(5))
    torch.testing.assert_close(network(data()), before)
    first = adapter.tensors()
    adapter.reset(torch.Generator().manual_seed(5))
    assert all(torch.equal(first[name], value) for name, value in adapter.tensors().items())
    assert float(max(value.abs().max() for name, value in first.items() if "lora_A" in name)) <= 8**-0.5


def test_tensors_can_be_exchanged_and_those_of_another_rank_are_refused():
    network = Network()
    adapter = EncoderAdapter(network, LoraSettings(rank=2, target_modules=("c_fc",)))
    kept = adapter.tensors()
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.normal_()
    changed = network(data())
    trained = adapter.tensors()
    adapter.load(kept)
    assert not torch.allclose(network(data()), changed)
    adapter.load(trained)
    assert torch.equal(network(data()), changed)
    with pytest.raises(ValueError, match="another network or rank"):
        adapter.load({"other": torch.zeros(1)})


def test_alpha_scales_the_update():
    outputs = []
    for alpha in (2.0, 4.0):
        network = Network()
        before = network.c_fc(data())
        adapter = EncoderAdapter(network, LoraSettings(rank=2, alpha=alpha, target_modules=("c_fc",)))
        with torch.no_grad():
            for parameter in adapter.parameters.values():
                parameter.fill_(0.1)
        outputs.append(network.c_fc(data()) - before)
    torch.testing.assert_close(outputs[1], 2 * outputs[0])


def test_names_that_no_layer_has_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="there are c_fc, c_proj"):
        EncoderAdapter(Network(), LoraSettings(target_modules=("q_proj",)))
