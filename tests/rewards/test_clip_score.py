"""CLIP score on a tiny random open_clip model built on the spot; seed 0, float32, one image tower of 32 x 32 pixels."""

import json
import logging

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image

from visalign.protocols import DifferentiableReward, Reward
from visalign.rewards.clip import ClipScore
from visalign.types import Media, Prompt

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a red circle", "two blue squares", "a green triangle above a red circle"]


def save_model(folder, **text_cfg):
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], **text_cfg}}
    architecture = {key: value for key, value in config["text_cfg"].items() if not key.startswith("hf_")}
    torch.manual_seed(0)
    model = CLIP(embed_dim=16, vision_cfg=config["vision_cfg"], text_cfg=architecture)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return ClipScore(str(folder))


def smooth_images(num, height=48, width=48, seed=0):
    """Random low-frequency images, uint8 (num, 3, height, width), using the full range."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().to(torch.uint8)


def media(images):
    return [Media("image", image) for image in images]


def prompts(num):
    return [Prompt(TEXTS[i % len(TEXTS)]) for i in range(num)]


def test_it_is_a_reward_and_equals_the_cosine_of_the_models_own_transform(clip, folder):
    assert isinstance(clip, Reward)
    images = smooth_images(3, 40, 64)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images]))
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS))
    expected = torch.nn.functional.cosine_similarity(image, text)
    scores = clip.score(media(images), prompts(3), [0, 1, 2])
    torch.testing.assert_close(scores.raw, expected, atol=1e-6, rtol=0)
    assert scores.valid.all()
    assert scores.raw.abs().max() <= 1  # the logit scale (14.3 at initialisation) is not in it


def test_scores_do_not_depend_on_the_batch(folder, clip):
    images, texts = smooth_images(7), prompts(7)
    together = clip.score(media(images), texts, range(7)).raw
    alone = torch.cat([clip.score(media(images[i:i + 1]), texts[i:i + 1], [0]).raw for i in range(7)])
    small_batches = ClipScore(str(folder), batch_size=3).score(media(images), texts, range(7)).raw
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together, small_batches, atol=1e-6, rtol=0)
    assert together.std() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 48), (40, 96), (20, 24)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_tensor_path_agrees_with_the_pil_path(folder, height, width, resize_mode):
    clip = ClipScore(str(folder), resize_mode=resize_mode)
    images, texts = smooth_images(6, height, width), prompts(6)
    pil = clip.score(media(images), texts, range(6)).raw
    tensor = clip.score_tensor(images.float() / 255, texts)
    # PIL rounds to 8 bits after the resize; the largest gap measured here is 5e-4.
    torch.testing.assert_close(tensor, pil, atol=1e-3, rtol=0)
    assert pil.std() > 5e-3


def test_tensor_path_is_clamped_like_pil_at_hard_edges(clip):
    board = ((torch.arange(96)[:, None] // 7 + torch.arange(96)[None] // 7) % 2 * 255).to(torch.uint8).expand(3, 96, 96)
    pil = clip.score([Media("image", board)], prompts(1), [0]).raw
    torch.testing.assert_close(clip.score_tensor(board[None].float() / 255, prompts(1)), pil, atol=2e-3, rtol=0)


def test_resize_modes_see_different_parts_of_a_wide_image(folder):
    wide = smooth_images(1, 32, 128)
    changed = wide.clone()
    changed[..., :20] = 255 - changed[..., :20]  # only the left end, outside the centre crop
    for mode, sees_it in (("shortest", False), ("longest", True), ("squash", True)):
        clip = ClipScore(str(folder), resize_mode=mode)
        gap = clip.score(media(wide), prompts(1), [0]).raw - clip.score(media(changed), prompts(1), [0]).raw
        assert bool(gap.abs() > 1e-4) is sees_it, mode


def test_gradient_to_pixels_matches_finite_differences(folder):
    clip = ClipScore(str(folder))
    images = (smooth_images(2, 40, 40).float() / 255 * 0.8 + 0.1).requires_grad_()  # away from the clamp
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(clip.score_tensor(images, prompts(2)).sum(), images)
    step = 3e-3
    with torch.no_grad():
        ahead = clip.score_tensor(images + step * direction, prompts(2)).double().sum()
        behind = clip.score_tensor(images - step * direction, prompts(2)).double().sum()
    numeric = (ahead - behind) / (2 * step)
    analytic = (grad * direction).sum().double()
    assert analytic.abs() > 1e-2
    torch.testing.assert_close(analytic, numeric, rtol=1e-2, atol=1e-4)
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_a_group_shares_one_text_pass(folder):
    clip, rows = ClipScore(str(folder)), []
    clip.model.token_embedding.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    clip.score(media(smooth_images(12)), [Prompt(TEXTS[i // 4]) for i in range(12)], [i // 4 for i in range(12)])
    assert rows == [3]


def test_float32_inside_autocast(clip):
    images = smooth_images(2).float() / 255
    outside = clip.score_tensor(images, prompts(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = clip.score_tensor(images, prompts(2))
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, atol=0, rtol=0)


def test_video_is_refused_or_the_mean_over_evenly_spaced_frames(folder, clip):
    video = Media("video", smooth_images(9), rate=8.0)
    with pytest.raises(ValueError, match="video_frames=8"):
        clip.score([video], prompts(1), [0])
    score = ClipScore(str(folder), video_frames=3).score([video], prompts(1), [0]).raw
    frames = [clip.score(media(video.data[i:i + 1]), prompts(1), [0]).raw for i in (0, 4, 8)]
    torch.testing.assert_close(score, torch.cat(frames).mean(0, keepdim=True), atol=1e-6, rtol=0)


def test_the_tensor_path_is_a_differentiable_reward_of_images_and_of_video(folder):
    clip = ClipScore(str(folder), video_frames=3)
    assert isinstance(clip, DifferentiableReward)
    assert clip.spec.differentiable
    video = torch.stack([smooth_images(9, seed=0), smooth_images(9, seed=1)])
    pil = clip.score([Media("video", one, rate=8.0) for one in video], prompts(2), [0, 1]).raw
    pixels = (video.float() / 255).requires_grad_()
    tensor = clip.score_tensor(pixels, prompts(2))
    torch.testing.assert_close(tensor.detach(), pil, atol=1e-3, rtol=0)
    (gradient,) = torch.autograd.grad(tensor[0], pixels)
    moved = gradient.abs().amax(dim=(-3, -2, -1)) > 0
    assert moved.tolist() == [[frame in (0, 4, 8) for frame in range(9)], [False] * 9]


def test_without_a_resize_the_tensor_path_has_no_rounding_to_differ_by(clip):
    images = smooth_images(4, 32, 32)
    pil = clip.score(media(images), prompts(4), range(4)).raw
    torch.testing.assert_close(clip.score_tensor(images.float() / 255, prompts(4)), pil, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("num_words", "cut"), [(75, False), (76, True), (300, True)])
def test_truncation_is_reported_once_with_counts(folder, caplog, num_words, cut):
    clip = ClipScore(str(folder))
    texts = [Prompt("red " * num_words), Prompt("short"), Prompt("short")]
    with caplog.at_level(logging.WARNING, logger="visalign"):
        clip.score(media(smooth_images(3)), texts, [0, 1, 1])
        clip.score(media(smooth_images(3)), texts, [0, 1, 1])
    assert [record.getMessage().split("; ")[0] for record in caplog.records] == (
        ["clip: 1 of 2 distinct prompts exceed the model's 77 tokens"] if cut else [])


def save_tokenizer(folder, vocab):
    """A word-level tokenizer that ends texts in the token it also pads with, as the CLIP tokenizers of transformers do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    ids = {word: row for row, word in enumerate(["<end>", "<unk>", *vocab])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>", unk_token="<unk>").save_pretrained(folder)


WORDS = ["a", "red", "circle", "two", "blue", "squares", *(f"word{i}" for i in range(40))]


@pytest.mark.parametrize(("num_words", "cut"), [(76, False), (77, True), (200, True)])
def test_truncation_is_noticed_where_padding_looks_like_the_end(tmp_path, caplog, num_words, cut):
    folder = save_model(tmp_path, hf_tokenizer_name="here")
    save_tokenizer(folder, WORDS)
    with caplog.at_level(logging.WARNING, logger="visalign"):
        ClipScore(str(folder)).score(media(smooth_images(1)), [Prompt("red " * num_words)], [0])
    assert len(caplog.records) == cut


def test_an_empty_tokenizer_is_refused_and_a_small_real_one_accepted(tmp_path):
    folder = save_model(tmp_path, hf_tokenizer_name="here")
    save_tokenizer(folder, [])
    with pytest.raises(ValueError, match=r"is empty \(2 entries\)"):
        ClipScore(str(folder))
    save_tokenizer(folder, WORDS)
    assert ClipScore(str(folder)).score(media(smooth_images(1)), prompts(1), [0]).valid.all()


@pytest.mark.parametrize(("model", "pretrained", "problem"), [
    ("ViT-B-32", None, "model 'ViT-B-32' without pretrained would be random weights; name a checkpoint file or a tag: openai, "),
    ("ViT-B-23", "openai", r"'ViT-B-23' is neither a folder nor an architecture of open_clip, did you mean ViT-B-32"),
    ("ViT-B-32", "opennai", "'opennai' is neither a file nor weights that open_clip has for ViT-B-32, did you mean openai"),
    ("ViT-B-32", "openai", "reward 'clip': no ViT-B-32 with pretrained openai here, and the hub .* with this same command"),
    ("hf-hub:nobody/nothing", None, "reward 'clip': no nobody/nothing here, and the hub does not give it; .*hf download nobody/nothing")])
def test_models_that_are_not_there_are_one_message(model, pretrained, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        ClipScore(model, pretrained, cache_dir=str(tmp_path))


def test_a_folder_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"does not hold what is needed: .*open_clip_config\.json"):
        ClipScore(str(tmp_path))


def test_missing_weights_are_an_error(tmp_path):
    (save_model(tmp_path) / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(RuntimeError, match="could not be loaded"):
        ClipScore(str(tmp_path))


def tiny_architecture(tmp_path):
    (tmp_path / "visalign-tiny-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path)
    return "visalign-tiny-test"


def test_a_tag_trained_with_quick_gelu_gets_its_activation(tmp_path, folder, clip, monkeypatch):
    """A plain architecture would load these weights with a warning and score something else."""
    name, file = tiny_architecture(tmp_path), str(folder / "open_clip_pytorch_model.bin")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"quick": {"file": file, "quick_gelu": True}, "plain": {"file": file}})
    images = media(smooth_images(2))
    quick, plain = (ClipScore(name, tag) for tag in ("quick", "plain"))
    assert isinstance(quick.model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert torch.equal(plain.score(images, prompts(2), [0, 1]).raw, clip.score(images, prompts(2), [0, 1]).raw)
    assert (quick.score(images, prompts(2), [0, 1]).raw - plain.score(images, prompts(2), [0, 1]).raw).abs().max() > 1e-4


def test_padding_has_the_models_own_colour_on_both_paths(tmp_path):
    folder = save_model(tmp_path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"resize_mode": "longest", "fill_color": 127}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    wide = smooth_images(2, 16, 64)
    grey = ClipScore(str(folder))
    raw = grey.score(media(wide), prompts(2), [0, 1]).raw
    torch.testing.assert_close(grey.score_tensor(wide.float() / 255, prompts(2)), raw, atol=1e-3, rtol=0)
    padded = torch.nn.functional.pad(wide, (0, 0, 24, 24), value=127)
    torch.testing.assert_close(raw, ClipScore(str(folder)).score(media(padded), prompts(2), [0, 1]).raw, atol=5e-3, rtol=0)


def test_it_is_frozen_and_in_evaluation_mode(clip):
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_a_checkpoint_file_of_a_named_architecture(tmp_path, folder, clip):
    same = ClipScore(tiny_architecture(tmp_path), pretrained=str(folder / "open_clip_pytorch_model.bin"))
    images = media(smooth_images(2))
    assert torch.equal(same.score(images, prompts(2), [0, 1]).raw, clip.score(images, prompts(2), [0, 1]).raw)


@pytest.mark.parametrize("images", [torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32).byte(), torch.zeros(1, 4, 32, 32)])
def test_score_tensor_refuses_other_shapes_and_types(clip, images):
    with pytest.raises(ValueError, match=r"expected float \(B, 3, H, W\)"):
        clip.score_tensor(images, prompts(1))
