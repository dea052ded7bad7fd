"""HPS v2: a bare state dict in open_clip's architecture, the whole image padded with black, no logit scale; tiny random weights."""

import inspect
import json

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image

from visalign.protocols import DifferentiableReward, Reward
from visalign.rewards.hps import HumanPreferenceScore
from visalign.types import Media, Prompt

ARCHITECTURE = "visalign-tiny-hps"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a red circle", "two blue squares", "a green triangle"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as it is published: the tensors under "state_dict"."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = CLIP(embed_dim=16, vision_cfg=CONFIG["vision_cfg"], text_cfg=CONFIG["text_cfg"]).eval()
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return model, folder / "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def reward(published):
    return HumanPreferenceScore(str(published[1]), model=ARCHITECTURE)


def images(height, width, num=3):
    coarse = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def padded(image):
    """Longest side to 32 by PIL's bicubic, then black to both sides, the odd pixel at the end: (3, 32, 32) in [0, 1]."""
    height, width = image.shape[1:]
    scale = 32 / max(height, width)
    small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (32, 32))
    canvas.paste(small, ((32 - small.width) // 2, (32 - small.height) // 2))
    return torch.tensor(list(canvas.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 96), (20, 24), (64, 30)])
def test_the_score_is_the_plain_cosine_of_the_padded_image(reward, published, height, width):
    assert isinstance(reward, Reward)
    sample = images(height, width)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    model = published[0]
    with torch.no_grad():
        image = model.encode_image(torch.stack([(padded(one) - mean) / std for one in sample]))
        text = model.encode_text(open_clip.tokenize(TEXTS))
    expected = torch.nn.functional.cosine_similarity(image, text)
    scores = reward.score([Media("image", one) for one in sample], [Prompt(text) for text in TEXTS], [0, 1, 2])
    torch.testing.assert_close(scores.raw, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(reward.score_tensor(sample.float() / 255, [Prompt(text) for text in TEXTS]), expected, atol=1e-3, rtol=0)


def test_both_ends_of_a_wide_image_count(reward):
    wide = images(32, 128, num=1)
    for end in (slice(0, 20), slice(108, 128)):
        changed = wide.clone()
        changed[..., end] = 255 - changed[..., end]
        gap = [reward.score([Media("image", one[0])], [Prompt(TEXTS[0])], [0]).raw for one in (wide, changed)]
        assert (gap[0] - gap[1]).abs() > 1e-4


def test_it_has_a_gradient_and_stays_float32_inside_autocast(reward):
    assert isinstance(reward, DifferentiableReward)
    pixels = (images(40, 40).float() / 255).requires_grad_()
    prompts = [Prompt(text) for text in TEXTS]
    outside = reward.score_tensor(pixels, prompts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward.score_tensor(pixels, prompts), outside)
    (gradient,) = torch.autograd.grad(outside[1], pixels)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).tolist() == [False, True, False]


def test_a_checkpoint_that_would_run_code_is_refused_unread(tmp_path, capsys, published):
    class Surprise:
        def __reduce__(self):
            return (print, ("this ran",))

    torch.save({"state_dict": {"visual.proj": Surprise()}}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt holds more than tensors, and loading it could run code"):
        HumanPreferenceScore(str(tmp_path / "bad.pt"), model=ARCHITECTURE)
    assert "this ran" not in capsys.readouterr().out


def test_version_2_1_is_the_default():
    """The published package's own default is 2.0."""
    assert inspect.signature(HumanPreferenceScore).parameters["weights"].default == "xswu/HPSv2/HPS_v2.1_compressed.pt"


def test_missing_files_and_foreign_weights(published, tmp_path):
    with pytest.raises(ValueError, match=r"reward 'hps': no file .*; give the path of the weights, or ORG/REPO/FILE on the hub"):
        HumanPreferenceScore("HPS_v2.1.pt", model=ARCHITECTURE)
    state = dict(published[0].state_dict())
    state.pop("visual.proj")
    torch.save({"state_dict": state}, tmp_path / "cut.pt")
    with pytest.raises(RuntimeError, match=r"visual\.proj"):
        HumanPreferenceScore(str(tmp_path / "cut.pt"), model=ARCHITECTURE)
