"""Image models of transformers as encoders, on tiny random weights of each kind through their own processors; seeds stated."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextImageProcessor,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from visalign.rewards.encoders import Encoder, as_encoder
from visalign.rewards.encoders.vision import VisionEncoder
from visalign.types import Media

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99, "bos_token_id": 1,
        "eos_token_id": 2}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}
FAMILIES = {
    "vit": lambda: (ViTModel(ViTConfig(**SMALL)), ViTImageProcessor(**SQUARE)),
    "dinov2": lambda: (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"},
                                                                          num_register_tokens=4)), BitImageProcessor(**CROPPED)),
    "clip": lambda: (CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SMALL, projection_dim=12)), CLIPImageProcessor(**CROPPED)),
    "swin": lambda: (SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)),
                     ViTImageProcessor(**SQUARE)),
    "resnet": lambda: (ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
                       ConvNextImageProcessor(size={"shortest_edge": 32})),
}


def save(folder, family, seed=0):
    torch.manual_seed(seed)
    model, processor = FAMILIES[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def images(n, seed=0, size=(40, 56)):
    generator = torch.Generator().manual_seed(seed)
    return [Media("image", torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)) for _ in range(n)]


def outputs(folder, media):
    """What the model itself says of PIL images through its processor, with the layer's tokens."""
    model = {"vit": ViTModel, "dinov2": Dinov2WithRegistersModel, "clip": CLIPModel, "swin": SwinModel,
             "resnet": ResNetModel}[next(name for name in FAMILIES if name in folder)].from_pretrained(folder).eval()
    pictures = [Image.fromarray(one.data.permute(1, 2, 0).numpy()) for one in media]
    pixels = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return getattr(model, "vision_model", model)(pixel_values=pixels)


@pytest.mark.parametrize(("family", "num_prefix"), [("vit", 1), ("dinov2", 5), ("clip", 1)])
def test_poolings_of_models_with_class_tokens(folders, family, num_prefix):
    media, out = images(3), outputs(folders[family], images(3))
    for pooling, expected in (("cls", out.last_hidden_state[:, 0]), ("mean", out.last_hidden_state[:, num_prefix:].mean(dim=1)),
                              ("pooled", out.pooler_output)):
        rows = VisionEncoder(folders[family], pooling).encode(media)
        assert [row.shape for row in rows] == [(1, 16)] * 3
        assert rows[0].dtype == torch.float64
        torch.testing.assert_close(torch.cat(rows).float(), expected, atol=1e-5, rtol=0)
        assert float(torch.cat(rows).std(dim=0).max()) > 1e-3


@pytest.mark.parametrize("family", ["swin", "resnet"])
def test_models_without_class_tokens(folders, family):
    media, out = images(3), outputs(folders[family], images(3))
    positions = out.last_hidden_state if family == "swin" else out.last_hidden_state.flatten(2).transpose(1, 2)
    for pooling, expected in (("mean", positions.mean(dim=1)), ("pooled", out.pooler_output.flatten(1))):
        found = torch.cat(VisionEncoder(folders[family], pooling).encode(media))
        torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="has no class token; use pooling: mean or pooled"):
        VisionEncoder(folders[family], "cls")


def test_sizes_and_batches_do_not_matter(folders):
    media = [*images(2, 1), *images(2, 2, (64, 32)), *images(1, 3)]
    together = torch.cat(VisionEncoder(folders["vit"], batch_size=2).encode(media))
    alone = torch.cat([row for one in media for row in VisionEncoder(folders["vit"]).encode([one])])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_video_is_encoded_frame_by_frame(folders):
    encoder = as_encoder({"encoder": "hf", "path": folders["vit"], "pooling": "cls", "video_frames": 3})
    assert isinstance(encoder, Encoder)
    assert encoder.modality == {"image", "video"}
    pictures = images(5)
    video = Media("video", torch.stack([one.data for one in pictures]), rate=8.0)
    rows = encoder.encode([video, pictures[1]])
    assert [len(part) for part in rows] == [3, 1]
    torch.testing.assert_close(rows[0], torch.cat(VisionEncoder(folders["vit"], "cls").encode([pictures[0], pictures[2], pictures[4]])),
                               atol=1e-6, rtol=0)


@pytest.mark.parametrize(("change", "span"), [({"do_rescale": False}, "255"), ({"rescale_factor": 1.0}, "255"),
                                              ({"rescale_factor": 1 / 255**2}, "0.003922")])
def test_a_processor_that_does_not_divide_by_255_once_is_refused(tmp_path, change, span):
    folder = save(tmp_path, "vit")
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"goes over {span}"):
        VisionEncoder(folder)


def test_floats_are_refused(folders):
    with pytest.raises(ValueError, match="expected uint8"):
        VisionEncoder(folders["vit"]).encode([Media("image", torch.rand(3, 32, 32))])


def test_a_pooler_that_the_checkpoint_lacks_would_be_random(tmp_path):
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SMALL)).save_pretrained(tmp_path)
    ViTImageProcessor(**SQUARE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for pooler\.dense\.bias, pooler\.dense\.weight of ViTModel"):
        VisionEncoder(str(tmp_path))
    first, second = (VisionEncoder(str(tmp_path), "cls") for _ in range(2))
    assert torch.equal(first.encode(images(1))[0], second.encode(images(1))[0])


def test_the_hash_follows_weights_and_preprocessing(folders, tmp_path):
    encoder = VisionEncoder(folders["vit"])
    assert encoder.hash == VisionEncoder(folders["vit"]).hash
    assert encoder.hash != VisionEncoder(folders["vit"], "cls").hash
    assert encoder.hash != VisionEncoder(folders["vit"], video_frames=2).hash
    assert encoder.hash != VisionEncoder(save(tmp_path / "other", "vit", seed=1)).hash
    folder = save(tmp_path / "resized", "vit")
    path = tmp_path / "resized" / "preprocessor_config.json"
    assert encoder.hash == VisionEncoder(folder).hash
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 3}))
    assert encoder.hash != VisionEncoder(folder).hash


def test_bad_settings(folders, tmp_path):
    with pytest.raises(ValueError, match="pooling 'max'"):
        VisionEncoder(folders["vit"], "max")
    with pytest.raises(ValueError, match="video_frames -1"):
        VisionEncoder(folders["vit"], video_frames=-1)
    with pytest.raises(ValueError, match=r"encoder: no folder .*nowhere; give the folder of a model, or ORG/REPO on the hub"):
        VisionEncoder(str(tmp_path / "nowhere"))
