"""ImageReward's checkpoint layout in transformers' BLIP: timm and a plain attention written here are the oracles; tiny, seed 0."""

import logging
import math
from functools import partial

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, softmax
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import PreTrainedTokenizerFast

from visalign.protocols import DifferentiableReward, Reward
from visalign.rewards.imagereward import MEAN, STD, ImageReward, build_towers
from visalign.types import Media, Prompt

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "two", "blue", "squares"]
TEXTS = ["a red circle", "two blue squares", "red"]
DEPTH = 2


def vit():
    """Width 128 with heads of 64, patches of 8 on 32 x 32; BLIP's layout is timm's."""
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=DEPTH, num_heads=2, num_classes=0,
                             norm_layer=partial(nn.LayerNorm, eps=1e-6))


@pytest.fixture(scope="module")
def checkpoint():
    """A state dict in the published layout: BLIP's two encoders, its unused projections and the five-layer head."""
    torch.manual_seed(0)
    linears = {"attention.self.query": (64, 64), "attention.self.key": (64, 64), "attention.self.value": (64, 64),
               "attention.output.dense": (64, 64), "crossattention.self.query": (64, 64), "crossattention.self.key": (64, 128),
               "crossattention.self.value": (64, 128), "crossattention.output.dense": (64, 64), "intermediate.dense": (96, 64),
               "output.dense": (64, 96)}
    state = {f"blip.visual_encoder.{key}": tensor for key, tensor in vit().state_dict().items()}
    text = {"embeddings.word_embeddings.weight": torch.randn(len(WORDS) + 2, 64),
            "embeddings.position_embeddings.weight": torch.randn(40, 64),
            "embeddings.LayerNorm.weight": 1 + 0.1 * torch.randn(64), "embeddings.LayerNorm.bias": torch.randn(64),
            "embeddings.position_ids": torch.arange(40)[None]}
    for layer in range(DEPTH):
        for name, shape in linears.items():
            text[f"encoder.layer.{layer}.{name}.weight"] = torch.randn(shape) / math.sqrt(shape[1])
            text[f"encoder.layer.{layer}.{name}.bias"] = 0.1 * torch.randn(shape[0])
        for name in ("attention.output", "crossattention.output", "output"):
            text[f"encoder.layer.{layer}.{name}.LayerNorm.weight"] = 1 + 0.1 * torch.randn(64)
            text[f"encoder.layer.{layer}.{name}.LayerNorm.bias"] = 0.1 * torch.randn(64)
    state |= {f"blip.text_encoder.{key}": tensor for key, tensor in text.items()}
    state |= {"blip.vision_proj.weight": torch.randn(4, 128), "blip.text_proj.weight": torch.randn(4, 64)}
    for index, (out, into) in zip((0, 2, 4, 6, 7), ((32, 64), (16, 32), (8, 16), (4, 8), (1, 4)), strict=True):
        state |= {f"mlp.layers.{index}.weight": torch.randn(out, into) / math.sqrt(into), f"mlp.layers.{index}.bias": torch.randn(out)}
    return state


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(checkpoint, folder / "ImageReward.pt")
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return ImageReward(str(folder / "ImageReward.pt"), tokenizer=str(folder), batch_size=2, device="cpu")


def images(num=3, height=40, width=56):
    coarse = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def media(pixels):
    return [Media("image", one) for one in pixels]


def read(checkpoint, pixels, words):
    """The rating by plain formulas: timm's image tokens, then BERT layers with cross-attention, without any padding."""
    network = vit().eval()
    prefix = "blip.visual_encoder."
    network.load_state_dict({key.removeprefix(prefix): value for key, value in checkpoint.items() if key.startswith(prefix)})
    image = network.forward_features(pixels[None])[0]
    t = {key.removeprefix("blip.text_encoder."): value for key, value in checkpoint.items()}

    def norm(x, name):
        return layer_norm(x, (64,), t[f"{name}.LayerNorm.weight"], t[f"{name}.LayerNorm.bias"], 1e-12)

    def attend(x, to, name):
        query, key, value = (linear(of, t[f"{name}.self.{part}.weight"], t[f"{name}.self.{part}.bias"])
                             for of, part in ((x, "query"), (to, "key"), (to, "value")))
        mixed = softmax(query @ key.T / 8, dim=-1) @ value  # one head of width 64
        return norm(x + linear(mixed, t[f"{name}.output.dense.weight"], t[f"{name}.output.dense.bias"]), f"{name}.output")

    x = norm(t["embeddings.word_embeddings.weight"][words] + t["embeddings.position_embeddings.weight"][:len(words)], "embeddings")
    for layer in range(DEPTH):
        name = f"encoder.layer.{layer}"
        x = attend(attend(x, x, f"{name}.attention"), image, f"{name}.crossattention")
        wide = gelu(linear(x, t[f"{name}.intermediate.dense.weight"], t[f"{name}.intermediate.dense.bias"]))
        x = norm(x + linear(wide, t[f"{name}.output.dense.weight"], t[f"{name}.output.dense.bias"]), f"{name}.output")
    rating = x[0]
    for index in (0, 2, 4, 6, 7):
        rating = linear(rating, checkpoint[f"mlp.layers.{index}.weight"], checkpoint[f"mlp.layers.{index}.bias"])
    return (rating - MEAN) / STD


def test_the_score_is_what_the_formulas_say(reward, checkpoint):
    assert isinstance(reward, Reward)
    steps = Compose([Resize(32, interpolation=InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(),
                     Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))])
    sample = images()
    with torch.no_grad():
        expected = torch.cat([read(checkpoint, steps(Image.fromarray(image.permute(1, 2, 0).numpy())),
                                   [2, *(WORDS.index(word) for word in text.split()), 3])
                              for image, text in zip(sample, TEXTS, strict=True)])
    scores = reward.score(media(sample), [Prompt(text) for text in TEXTS], [0, 1, 2])
    torch.testing.assert_close(scores.raw, expected, rtol=1e-4, atol=1e-4)
    assert scores.raw.std() > 1e-2


def test_image_and_prompt_are_read_together_in_pairs(reward):
    sample = images(2)
    table = [[reward.score(media(sample[i:i + 1]), [Prompt(text)], [0]).raw.item() for text in TEXTS[:2]] for i in range(2)]
    together = reward.score(media(sample[[0, 0, 1, 1]]), [Prompt(text) for text in TEXTS[:2] * 2], range(4)).raw
    torch.testing.assert_close(together, torch.tensor(table).flatten(), rtol=1e-4, atol=1e-4)
    # Not a sum of an image's and a text's own merit.
    assert abs(table[0][0] - table[0][1] - table[1][0] + table[1][1]) > 1e-4


def test_the_tensor_path_agrees_and_has_gradients(reward):
    assert isinstance(reward, DifferentiableReward)
    sample, prompts = images(), [Prompt(text) for text in TEXTS]
    pixels = (sample.float() / 255).requires_grad_()
    value = reward.score_tensor(pixels, prompts)
    torch.testing.assert_close(value.detach(), reward.score(media(sample), prompts, [0, 1, 2]).raw, rtol=0, atol=1e-2)
    (gradient,) = torch.autograd.grad(value[1], pixels)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).tolist() == [False, True, False]


def test_float32_inside_autocast_frozen_and_in_evaluation_mode(reward):
    pixels, prompts = images().float() / 255, [Prompt(text) for text in TEXTS]
    outside = reward.score_tensor(pixels, prompts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward.score_tensor(pixels, prompts), outside)
    for tower in (reward.vision, reward.text):
        assert not tower.training
        assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_long_prompts_are_cut_and_it_is_said_once(folder, caplog):
    reward = ImageReward(str(folder / "ImageReward.pt"), tokenizer=str(folder), device="cpu")
    long = "red " * 33
    with caplog.at_level(logging.WARNING, logger="visalign"):
        first, second = (reward.score(media(images(1)), [Prompt(text)], [0]).raw for text in (long + "a b", long + "circle circle circle"))
    assert torch.equal(first, second)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["imagereward: 1 of 1 prompts exceed 35 tokens; what comes after is ignored"]


@pytest.mark.parametrize(("change", "problem"), [
    (lambda state: state.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"), r"Missing key.*crossattention"),
    (lambda state: state.update({"blip.visual_encoder.head.weight": torch.zeros(1)}), r"Unexpected key.*head\.weight"),
    (lambda state: [state.pop(key) for key in list(state) if "text_encoder" in key], r"no embeddings\.word_embeddings\.weight under"),
    (lambda state: state.update({"blip.visual_encoder.norm.weight": torch.zeros(3)}), "size mismatch")])
def test_tensors_that_are_missing_left_over_or_of_another_shape(checkpoint, change, problem):
    state = dict(checkpoint)
    change(state)
    with pytest.raises(ValueError, match=f"(?s)no ImageReward checkpoint: .*{problem}"):
        build_towers(state)


def test_a_tokenizer_of_another_size(folder, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 2 tokens, the weights know 12; .* bert-base-uncased"):
        ImageReward(str(folder / "ImageReward.pt"), tokenizer=str(tmp_path))
