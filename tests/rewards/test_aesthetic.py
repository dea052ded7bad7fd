"""LAION aesthetic score: the published head's five layers as one affine map, on the embedded CLIP; float64 where folded, seed 0."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from visalign import playground
from visalign.protocols import DifferentiableReward, Reward
from visalign.rewards.aesthetic import AestheticScore
from visalign.rewards.weights import assert_affine, fold_linear_layers, read_tensors, weights_file
from visalign.types import Media, Prompt

PROMPTS = [Prompt("a red circle")] * 4


def published_head(dims):
    """The layout of the published head, in evaluation mode: dropout does nothing, and there is no activation."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(dims, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
                           nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))
    return nn.ModuleDict({"layers": layers}).eval()


@pytest.fixture(scope="module")
def head():
    return published_head(64)


@pytest.fixture(scope="module")
def reward(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(head.state_dict(), path)
    return AestheticScore(str(path), model=str(playground.clip_path()))


@pytest.fixture(scope="module")
def images():
    coarse = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (nn.functional.interpolate(coarse, size=(40, 56), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def test_five_linear_layers_are_one_affine_map():
    head = published_head(768).double()
    weight, bias = fold_linear_layers(head.state_dict())
    x = torch.randn(32, 768, dtype=torch.float64)
    torch.testing.assert_close(x @ weight + bias, head["layers"](x)[:, 0], rtol=1e-10, atol=1e-12)
    assert sum(tensor.numel() for tensor in head.state_dict().values()) == 769 * 1024 + 1025 * 128 + 129 * 64 + 65 * 16 + 17


def test_that_the_folded_map_is_the_layers_is_asserted():
    layers = [(torch.randn(3, 4).double(), torch.randn(3).double()), (torch.randn(1, 3).double(), torch.randn(1).double())]
    weight, bias = (layers[1][0] @ layers[0][0])[0], (layers[1][0] @ layers[0][1] + layers[1][1])[0]
    assert_affine(layers, weight, bias)
    for wrong in ((weight + 1e-6, bias), (weight, bias + 1e-6), (weight.flip(0), bias)):
        with pytest.raises(AssertionError):
            assert_affine(layers, *wrong)


def test_the_score_is_the_heads_answer_to_the_unit_embedding(reward, head, images):
    assert isinstance(reward, Reward)
    assert isinstance(reward, DifferentiableReward)
    scores = reward.score([Media("image", image) for image in images], PROMPTS, [0] * 4)
    embeddings = reward.encoder.images(list(images))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    with torch.no_grad():
        torch.testing.assert_close(scores.raw, head["layers"](embeddings)[:, 0], rtol=1e-5, atol=1e-6)
    assert scores.valid.all()
    assert scores.raw.std() > 0


def test_the_tensor_path_agrees_and_its_gradient_is_the_derivative(reward, images):
    scores = reward.score([Media("image", image) for image in images], PROMPTS, [0] * 4)
    pixels = (images.float() / 255 * 0.8 + 0.1).requires_grad_()
    torch.testing.assert_close(reward.score_tensor(images.float() / 255, PROMPTS), scores.raw, atol=1e-3, rtol=0)
    (gradient,) = torch.autograd.grad(reward.score_tensor(pixels, PROMPTS).sum(), pixels)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (reward.score_tensor(pixels + sign * 0.05 * direction, PROMPTS).sum() for sign in (1, -1))
    torch.testing.assert_close((ahead - behind) / 0.1, gradient.norm(), rtol=3e-2, atol=0)


def test_the_prompt_is_not_read(reward, images):
    assert "prompt" not in reward.spec.requires
    sample = [Media("image", images[0])]
    assert torch.equal(reward.score(sample, [Prompt("one")], [0]).raw, reward.score(sample, [Prompt("")], [0]).raw)


def test_safetensors_and_checkpoints_with_a_state_dict_key_are_the_same(tmp_path, head):
    save_file(head.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": head.state_dict()}, tmp_path / "b.pt")
    a, b = read_tensors(tmp_path / "a.safetensors"), read_tensors(tmp_path / "b.pt")
    assert a.keys() == b.keys() == head.state_dict().keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


class Surprise:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_checkpoint_that_would_run_code_is_refused_unread(tmp_path, capsys):
    torch.save({"layers.0.weight": Surprise()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"could run code; convert it"):
        read_tensors(tmp_path / "bad.pth")
    assert "this ran" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds list; expected tensors by name"):
        read_tensors(tmp_path / "list.pth")


@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint_that_is_empty_or_cut_off_is_to_be_copied_again(tmp_path, head, old_format):
    torch.save(head.state_dict(), tmp_path / "whole.pth", _use_new_zipfile_serialization=not old_format)
    whole = (tmp_path / "whole.pth").read_bytes()
    assert read_tensors(tmp_path / "whole.pth").keys() == head.state_dict().keys()
    for length in (0, 1, 3, 5, 19, 60, len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth is no torch checkpoint") as caught:
            read_tensors(tmp_path / "cut.pth")
        assert "run code" not in str(caught.value)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.safetensors is not a readable safetensors file"):
        read_tensors(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(("content", "what"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it is a Git LFS pointer; fetch .* git lfs pull"),
    (b"<!DOCTYPE html><html>Not found</html>", "it begins with b'<!DOCTYPE html>.*; download it again"),
    (bytes(100), "it begins with .*; download it again")])
def test_a_file_that_torch_never_wrote_is_not_to_be_unpickled_in_trust(tmp_path, content, what):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"other\.pth is no torch checkpoint: {what}") as caught:
        read_tensors(tmp_path / "other.pth")
    assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize(("tensors", "problem"), [
    ({"weight": torch.zeros(1, 4)}, r"expected linear layers layers\.0\.weight.*the file has weight"),
    ({"layers.0.weight": torch.zeros(1, 4)}, r"lacks layers\.0\.bias"),
    ({"layers.0.weight": torch.zeros(2, 4), "layers.0.bias": torch.zeros(2)}, "do not chain to one number"),
    ({"layers.0.weight": torch.zeros(2, 4), "layers.0.bias": torch.zeros(2),
      "layers.1.weight": torch.zeros(1, 3), "layers.1.bias": torch.zeros(1)}, "do not chain to one number"),
])
def test_a_head_that_is_no_chain_of_linear_layers(tensors, problem):
    with pytest.raises(ValueError, match=problem):
        fold_linear_layers(tensors)


def test_the_head_is_looked_for_before_anything_large_is_fetched():
    with pytest.raises(ValueError, match=r"reward 'aesthetic': no file nowhere\.pth"):
        AestheticScore("nowhere.pth", model="ViT-L-14", pretrained="openai")
    with pytest.raises(ValueError, match=r"reward 'aesthetic': no nobody/nothing head\.pth here.*hf download nobody/nothing head\.pth"):
        AestheticScore("nobody/nothing/head.pth", model="ViT-L-14", pretrained="openai")


def test_a_head_for_another_encoder_and_a_missing_file(tmp_path):
    torch.save(published_head(768).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"length 768, .* gives 64; .* ViT-L-14"):
        AestheticScore(str(tmp_path / "head.pth"), model=str(playground.clip_path()))
    for wrong in ("head.pth", "org/repo", "/no/such/file.pth", "~/no-such-file.pth"):
        with pytest.raises(ValueError, match="give the path of the weights, or ORG/REPO/FILE"):
            weights_file(wrong, reward="aesthetic")
