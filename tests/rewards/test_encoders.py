"""What encoders have in common, those from functions, and CLIP's; seeds stated."""

import sys
from pathlib import Path

import open_clip
import pytest
import torch
from colour_features import Plane, colour, images
from PIL import Image
from tiny_clip import clip_folder

from visalign.rewards.clip import ClipScore
from visalign.rewards.encoders import Encoder, as_encoder, by_shape
from visalign.rewards.encoders.function import FunctionEncoder
from visalign.rewards.weights import weights_hash
from visalign.types import Media


@pytest.mark.parametrize(("encoder", "message"), [
    ("colour", r"package\.module:function"),
    ({"encoder": "dino"}, r"\{encoder: hf, \.\.\.\}"),
    ({"encoder": "hf", "reward": "clip"}, r"\{reward: clip, \.\.\.\}"),
    ({"encoder": "hf", "pth": "."}, r"encoder 'hf': unknown parameter 'pth', did you mean 'path'\?; missing parameter 'path'"),
    ({"reward": "cilp"}, "did you mean 'clip'"),
    ("no_such_module:f", "cannot be imported"),
    ("math:no_such", "cannot be imported"),
    ("math:sqrt", "no source to hash"),
    (3, "an encoder of type int"),
])
def test_bad_encoders(encoder, message):
    with pytest.raises(ValueError, match=message):
        as_encoder(encoder)


def test_bad_features_of_a_function():
    with pytest.raises(ValueError, match="1 features for 2 samples"):
        FunctionEncoder(lambda media: [[1.0]]).encode(images(2))
    with pytest.raises(ValueError, match=r"expected \(frames, d\) with one d for all"):
        FunctionEncoder(lambda media: [[1.0], [1.0, 2.0]]).encode(images(2))
    with pytest.raises(ValueError, match="modality is a list"):
        FunctionEncoder(colour, "image")
    with pytest.raises(ValueError, match="plane reads"):
        as_encoder(Plane(), ["image"])


def test_clip_features_are_the_models_own_embeddings_and_their_hash_follows_the_weights(tmp_path_factory):
    folder, moved, other = (clip_folder(tmp_path_factory.mktemp("clip"), seed) for seed in (0, 0, 1))
    clip = ClipScore(folder)
    encoder = as_encoder(clip)
    assert isinstance(encoder, Encoder)
    media = [Media("image", torch.randint(0, 256, (3, 40, 64), generator=torch.Generator().manual_seed(i)).to(torch.uint8))
             for i in range(4)]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{Path(folder)}")
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(sample.data.permute(1, 2, 0).numpy())) for sample in media])
        expected = torch.nn.functional.normalize(model.encode_image(pixels), dim=-1)
    torch.testing.assert_close(torch.cat(encoder.encode(media)).float(), expected, atol=1e-6, rtol=0)
    assert encoder.hash == as_encoder(ClipScore(moved)).hash != as_encoder(ClipScore(other)).hash
    assert encoder.hash != as_encoder(ClipScore(folder, resize_mode="squash")).hash
    videos = as_encoder(ClipScore(folder, video_frames=2))
    assert videos.hash != encoder.hash
    frames = videos.encode([Media("video", torch.stack([sample.data for sample in media]), rate=8.0), media[1]])
    assert [len(rows) for rows in frames] == [2, 1]
    torch.testing.assert_close(frames[0].float(), expected[[0, 3]], atol=1e-6, rtol=0)


def test_settings_name_a_reward_whose_encoder_is_meant(tmp_path):
    folder = clip_folder(tmp_path, 3)
    encoder = as_encoder({"reward": "clip", "model": folder, "video_frames": 2})
    assert encoder.hash == as_encoder(ClipScore(folder, video_frames=2)).hash
    assert encoder.modality == {"image", "video"}


def test_inception_wants_a_file_and_its_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing is downloaded for you, get https://"):
        as_encoder({"encoder": "inception", "weights": str(tmp_path / "missing.pth")})
    for module in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install 'visalign\[distributional\]'"):
        as_encoder({"encoder": "inception", "weights": str(tmp_path / "weights.pth")})


def test_image_encoders_read_uint8_and_video_only_when_asked(tmp_path):
    encoder = as_encoder(ClipScore(clip_folder(tmp_path, 4)))
    with pytest.raises(ValueError, match="expected uint8"):
        encoder.encode([Media("image", torch.rand(3, 8, 8))])
    with pytest.raises(ValueError, match="video_frames: 8"):
        encoder.encode([Media("video", torch.zeros(4, 3, 8, 8, dtype=torch.uint8), rate=8.0)])


def test_batches_are_of_one_shape_and_order_is_kept():
    sizes, seen = [2, 3, 2, 2, 3, 2], []

    def double(batch):
        seen.append(tuple(batch.shape))
        return 2 * batch.sum(dim=1, keepdim=True)

    rows = by_shape([torch.full((size,), float(index)) for index, size in enumerate(sizes)], 3, double)
    assert [float(row) for row in rows] == [2.0 * index * size for index, size in enumerate(sizes)]
    assert seen == [(3, 2), (1, 2), (2, 3)]


def test_the_hash_is_of_names_bytes_and_what_is_declared():
    tensors = {"a": torch.ones(2, 2), "b": torch.tensor(3, dtype=torch.int64), "c": torch.ones(3, dtype=torch.bfloat16)}
    found = weights_hash("v1", tensors)
    assert found == weights_hash("v1", dict(reversed(tensors.items())))
    assert found != weights_hash("v2", tensors)
    assert found != weights_hash("v1", {**tensors, "c": torch.full((3,), 2.0, dtype=torch.bfloat16)})
    assert found != weights_hash("v1", {"a": tensors["a"], "b": tensors["b"], "d": tensors["c"]})
