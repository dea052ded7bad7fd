"""PickScore on a tiny random transformers CLIP: against the model's own forward pass, and the scales in use; float32, seed 0."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from visalign.protocols import DifferentiableReward, Reward
from visalign.rewards.pairwise import BradleyTerry
from visalign.rewards.pickscore import PickScore
from visalign.types import Media, Prompt

TEXTS = ["a red circle", "two blue squares", "a red square"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def save_processor(folder, words=("a", "red", "circle", "two", "blue", "squares", "square", *(f"w{i}" for i in range(40))), **image):
    """Texts end in the token with the largest id, which is also what pads them: as in the published tokenizer."""
    ids = {word: row for row, word in enumerate(["<unk>", *words, "<start>", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", ids["<start>"]), ("<end>", ids["<end>"])])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    CLIPImageProcessor(**{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **image}).save_pretrained(folder)
    return len(ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickscore")
    vocabulary = save_processor(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config={**tower, "vocab_size": vocabulary, "max_position_embeddings": 16, "eos_token_id": vocabulary - 1},
                         vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16,
                         logit_scale_init_value=4.6052)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return PickScore(str(folder), processor=str(folder))


def images(num=3, height=40, width=56):
    coarse = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def media(pixels):
    return [Media("image", one) for one in pixels]


def prompts(num=3):
    return [Prompt(TEXTS[i % 3]) for i in range(num)]


def test_the_raw_score_is_the_models_own_logit(reward, folder):
    assert isinstance(reward, Reward)
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    steps = Compose([Resize(32, interpolation=InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), Normalize(MEAN, STD)])
    pixels = torch.stack([steps(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in images()])
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokenizer(TEXTS, padding=True, return_tensors="pt"))
    scores = reward.score(media(images()), prompts(), [0, 1, 2])
    torch.testing.assert_close(scores.raw, out.logits_per_image.diagonal(), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.details["cosine"], (out.image_embeds * out.text_embeds).sum(-1), rtol=0, atol=1e-6)
    assert abs(reward.scale - 100) < 0.01  # exp(4.6052), not 4.6052
    torch.testing.assert_close(scores.raw, reward.scale * scores.details["cosine"])


def test_differences_of_raw_scores_are_log_odds(reward):
    scores = reward.score(media(images()), [Prompt(TEXTS[0])] * 3, [0] * 3)
    said = BradleyTerry(reward).compare(media(images()[:1]), media(images()[1:2]), [Prompt(TEXTS[0])])
    torch.testing.assert_close(said.prob_first[0], torch.sigmoid(scores.raw[0] - scores.raw[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56), (64, 48)])
def test_the_tensor_path_agrees(reward, height, width):
    assert isinstance(reward, DifferentiableReward)
    sample = images(height=height, width=width)
    raw = reward.score(media(sample), prompts(), range(3)).raw
    pixels = (sample.float() / 255).requires_grad_()
    tensor = reward.score_tensor(pixels, prompts())
    torch.testing.assert_close(tensor.detach(), raw, rtol=0, atol=1e-3 * reward.scale)
    (gradient,) = torch.autograd.grad(tensor[2], pixels)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).tolist() == [False, False, True]


def test_rows_are_scored_alone_and_a_group_shares_one_text_pass(folder):
    reward, rows = PickScore(str(folder), processor=str(folder), batch_size=2), []
    reward.encoder.model.clip.text_model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    together = reward.score(media(images(6)), [Prompt(TEXTS[i // 3]) for i in range(6)], [i // 3 for i in range(6)]).raw
    assert rows == [2]
    alone = torch.cat([reward.score(media(images(6)[i:i + 1]), [Prompt(TEXTS[i // 3])], [0]).raw for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_long_prompts_are_cut_where_the_model_ends(reward):
    long = "red " * 14
    first, second = (reward.score(media(images(1)), [Prompt(text)], [0]).raw for text in (long, long + "two blue squares"))
    assert torch.equal(first, second)


def test_it_is_frozen_and_in_evaluation_mode(reward):
    assert not reward.encoder.model.training
    assert not any(parameter.requires_grad for parameter in reward.encoder.model.parameters())


def test_an_incomplete_checkpoint_is_refused(folder, tmp_path):
    model = CLIPModel.from_pretrained(folder)
    state = {key: value for key, value in model.state_dict().items() if key != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of a CLIPModel \(the first is visual_projection\.weight"):
        PickScore(str(tmp_path), processor=str(folder))


def test_an_empty_tokenizer_or_another_preprocessing_is_refused(folder, tmp_path):
    save_processor(tmp_path, words=())
    with pytest.raises(ValueError, match=r"tokenizer of 'pickscore' is empty \(3 entries\)"):
        PickScore(str(folder), processor=str(tmp_path))
    save_processor(tmp_path, crop_size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="expected a CLIP processor"):
        PickScore(str(folder), processor=str(tmp_path))
