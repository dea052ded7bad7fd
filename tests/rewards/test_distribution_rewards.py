"""Set-level and exemplar rewards: on pixel means as features, and on a tiny random open_clip model; seeds stated."""

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from visalign.maths.diversity import cosine_vendi
from visalign.maths.frechet import Gaussian, Moments, frechet_distance, mahalanobis
from visalign.media import save_media
from visalign.plugins import load_reward
from visalign.protocols import Reward
from visalign.rewards.clip import ClipScore
from visalign.rewards.distribution import ExemplarDistance, FrechetDistance, VendiScore
from visalign.rewards.encoders import Encoder, as_encoder
from visalign.rewards.encoders.function import FunctionEncoder
from visalign.rewards.exemplars import Exemplars, load_exemplars, reference_statistics, save_exemplars
from visalign.types import Media, Prompt


def colour(media):
    """Mean colour of an image, (n, 3) in [0, 1]."""
    return torch.stack([sample.data.double().mean(dim=(1, 2)) / 255 for sample in media])


def colours(media):
    """Mean colour of every frame of a video, n arrays (frames, 3)."""
    return [sample.data.double().mean(dim=(2, 3)).numpy() / 255 for sample in media]


class Plane:
    """The first sample of a waveform's channels as a feature; what an encoder object of one's own looks like."""

    name, hash, modality = "plane", "0123456789abcdef", frozenset({"audio"})

    def encode(self, media):
        return [sample.data[:, :1].T.double() for sample in media]


def images(n, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 256, (n, 3, 1, 1), generator=generator)
    return [Media("image", one) for one in base.expand(n, 3, size, size).to(torch.uint8)]


def audio(points):
    return [Media("audio", torch.tensor(point, dtype=torch.float32)[:, None].repeat(1, 4), rate=8000) for point in points]


def prompts(n):
    return [Prompt(f"prompt {i}") for i in range(n)]


@pytest.fixture
def reference(tmp_path):
    """Statistics of 60 random images under ``colour``, as a file."""
    path = tmp_path / "reference.safetensors"
    save_exemplars(reference_statistics(images(60, seed=1), as_encoder(colour)), path)
    return path


@pytest.fixture
def standard(tmp_path):
    """N(0, 1) for the encoder ``Plane``, as a file."""
    path = tmp_path / "standard.safetensors"
    gaussian = Gaussian(torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    save_exemplars(Exemplars(gaussian, 100, 100, "sample", Plane.name, Plane.hash), path)
    return path


def test_membership_of_the_worked_example(standard):
    # D1 = 2, -.2, .1, .3 and D2 = 1.2, -1, 0, -.6: D+ = 1.2, -1, .1, -.6, although 0 is closer to the reference mean than .1.
    reward = FrechetDistance(Plane(), standard)
    features = torch.tensor([2, -0.2, 0.1, 0.3, 1.2, -1, 0, -0.6], dtype=torch.float64)[:, None]
    credit = reward.credit(features, torch.tensor([5, 6, 7, 8, 5, 6, 7, 8]))
    assert credit.dtype == torch.float32
    assert credit.tolist() == [0, 0, 1, 0, 1, 1, 0, 1]
    assert reward.value(features[credit == 1]) == pytest.approx(-0.0069258, abs=1e-7)
    interleaved = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    again = reward.credit(features[interleaved], torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    assert again.tolist() == credit[interleaved].tolist()


def test_features_of_media_lead_to_the_set_closer_to_the_exemplars(reference):
    reward = FrechetDistance(colour, reference)
    media = images(40, seed=2)
    features = reward.features(media, prompts(40))
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, colour(media))
    credit = reward.credit(features, torch.arange(20).repeat_interleave(2))
    assert credit.view(20, 2).sum(dim=1).tolist() == [1.0] * 20
    positive, negative = reward.value(features[credit == 1]), reward.value(features[credit == 0])
    assert positive > max(reward.value(features[::2]), reward.value(features[1::2])) >= negative
    assert reward.spec.arity == "set"
    assert reward.spec.direction == 1
    assert not isinstance(reward, Reward)


def test_vendi_membership_raises_diversity():
    reward = VendiScore(colour)
    media = images(30, seed=3)
    features = reward.features(media, prompts(30))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(30, dtype=torch.float64))
    assert reward.value(features) == pytest.approx(cosine_vendi(colour(media)), rel=1e-9)
    credit = reward.credit(features, torch.arange(15).repeat_interleave(2))
    assert reward.value(features[credit == 1]) > max(reward.value(features[::2]), reward.value(features[1::2]))


def test_leave_one_out_takes_any_group_size_and_finds_the_outlier(reference):
    reward = FrechetDistance(colour, reference, credit="leave_one_out")
    features = torch.cat([reward.features(images(8, seed=4), prompts(8)), torch.full((1, 3), 5.0, dtype=torch.float64)])
    credit = reward.credit(features, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    assert int(credit.argmin()) == 8
    assert credit[8] < 0


def test_group_sizes_other_than_two_are_explained(reference):
    with pytest.raises(ValueError, match=r"group 3 has 4 samples; one goes to D\+ and one to D-, so set train\.group_size: 2"):
        FrechetDistance(colour, reference).credit(torch.rand(4, 3), torch.tensor([3, 3, 3, 3]))


def test_a_sample_that_cannot_be_judged_takes_its_pair_along(reference):
    features = torch.rand(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    group_id = torch.arange(4).repeat_interleave(2)
    alone = FrechetDistance(colour, reference).credit(features[2:], group_id[2:])
    broken = features.clone()
    broken[1, 0] = torch.inf
    credit = FrechetDistance(colour, reference).credit(broken, group_id)
    assert credit[:2].isnan().all()
    assert credit[2:].tolist() == alone.tolist()
    assert FrechetDistance(colour, reference).credit(features * torch.nan, group_id).isnan().all()
    black = VendiScore(colour).features([Media("image", torch.zeros(3, 4, 4, dtype=torch.uint8))], prompts(1))
    assert black.isnan().all()


def test_memory_counts_into_every_set_and_survives_a_checkpoint(reference):
    features = torch.rand(3, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    group_id = torch.arange(4).repeat_interleave(2)
    reward = FrechetDistance(colour, reference, memory=10)
    for step in range(2):
        reward.credit(features[step], group_id)
    assert torch.equal(reward.memory, features[:2].flatten(0, 1)[-10:])
    pooled = Moments.of(torch.cat([features[2], reward.memory])).gaussian()
    assert reward.value(features[2]) == pytest.approx(-frechet_distance(pooled, reward.exemplars.gaussian), abs=1e-9)
    resumed = FrechetDistance(colour, reference, memory=10)
    resumed.load_state_dict(reward.state_dict())
    assert torch.equal(resumed.credit(features[2], group_id), reward.credit(features[2], group_id))
    assert FrechetDistance(colour, reference).state_dict() == {}


def test_small_sets_are_warned_about_once(tmp_path, caplog):
    save_exemplars(reference_statistics(images(60, seed=1), as_encoder(colour)), tmp_path / "r.safetensors")
    reward = FrechetDistance(colour, tmp_path / "r.safetensors", shrinkage=1e-3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reward.credit(torch.rand(4, 3, generator=torch.Generator().manual_seed(7)), torch.tensor([0, 0, 1, 1]))
    assert sum("2 samples cannot fill 3 dimensions" in record.message for record in caplog.records) == 1


def test_an_image_is_a_point(reference):
    reward = ExemplarDistance(colour, reference)
    assert isinstance(reward, Reward)
    media = images(5, seed=8)
    scores = reward.score(media, prompts(5), range(5))
    gaussian = load_exemplars(reference, reward.encoder, "frame").gaussian
    expected = (colour(media) - gaussian.mean).square().sum(dim=1) + gaussian.covariance.trace()
    torch.testing.assert_close(scores.raw, expected.float())
    torch.testing.assert_close(scores.value, -scores.raw)
    by_density = ExemplarDistance(colour, reference, distance="mahalanobis").score(media, prompts(5), range(5))
    torch.testing.assert_close(by_density.raw, mahalanobis(colour(media), gaussian).float())


def test_a_video_is_the_gaussian_of_its_frames(tmp_path):
    def videos(n, seed):
        return [Media("video", torch.stack([frame.data for frame in images(6, seed + i)]), rate=8.0) for i in range(n)]

    encoder = FunctionEncoder(colours, ["video"])
    exemplars = reference_statistics(videos(10, seed=100), encoder, unit="frame", batch_size=3)
    assert (exemplars.count, exemplars.num_media) == (60, 10)
    save_exemplars(exemplars, tmp_path / "frames.safetensors")
    reward = ExemplarDistance(colours, tmp_path / "frames.safetensors", shrinkage=0.01, modality=["video"])
    media = videos(3, seed=200)
    frames = [torch.from_numpy(rows) for rows in colours(media)]
    expected = [frechet_distance(Moments.of(rows).gaussian(0.01), exemplars.gaussian.shrunk(0.01)) for rows in frames]
    assert reward.score(media, prompts(3), range(3)).raw.tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"rows are frames \(60 of 10 media\), this reward compares samples"):
        FrechetDistance(colours, tmp_path / "frames.safetensors", modality=["video"])
    whole = VendiScore(colours, modality=["video"]).features(media, prompts(3))
    means = torch.stack([rows.mean(dim=0) for rows in frames])
    torch.testing.assert_close(whole, means / means.norm(dim=1, keepdim=True))


def test_features_that_are_not_finite_make_a_sample_invalid(standard):
    scores = ExemplarDistance(Plane(), standard).score(audio([[float("nan")], [0.5]]), prompts(2), range(2))
    assert scores.valid.tolist() == [False, True]
    assert scores.reasons == ("nonfinite", None)
    assert scores.raw[1] == pytest.approx(1.25)  # .5^2 + 1


def test_statistics_survive_saving_and_batching(tmp_path):
    encoder, media = as_encoder(colour), images(30, seed=9)
    exemplars = reference_statistics(media, encoder)
    small = reference_statistics(iter(media), encoder, batch_size=7)
    torch.testing.assert_close(small.gaussian.covariance, torch.cov(colour(media).T), atol=1e-12, rtol=0)
    torch.testing.assert_close(small.gaussian.mean, exemplars.gaussian.mean, atol=1e-12, rtol=0)
    save_exemplars(exemplars, tmp_path / "s.safetensors")
    loaded = load_exemplars(tmp_path / "s.safetensors", encoder, "sample")
    assert torch.equal(loaded.gaussian.covariance, exemplars.gaussian.covariance)
    assert (loaded.count, loaded.num_media, loaded.unit, loaded.encoder, loaded.hash) == (30, 30, "sample", encoder.name, encoder.hash)


def test_a_folder_of_media_is_a_reference(tmp_path):
    media = images(5, seed=10)
    for i, sample in enumerate(media):
        save_media(sample, tmp_path / f"{i}")
    (tmp_path / "samples.jsonl").write_text("")
    exemplars = load_exemplars(tmp_path, as_encoder(colour), "sample")
    torch.testing.assert_close(exemplars.gaussian.mean, colour(media).mean(dim=0))


def test_statistics_of_another_encoder_are_refused(reference, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"encoded by .*colour .*, the samples by plane \(0123456789ab\); compute the statistics again"):
        FrechetDistance(Plane(), reference)
    (tmp_path / "my_encoder.py").write_text("def f(media):\n    return [[1.0, 2.0] for _ in media]\n")
    monkeypatch.syspath_prepend(tmp_path)
    by_path = as_encoder("my_encoder:f")
    assert by_path.name == "my_encoder:f"
    assert by_path.encode(images(2))[0].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(("encoder", "message"), [
    ("colour", r"package\.module:function"),
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


def test_bad_references(tmp_path):
    encoder = as_encoder(colour)
    with pytest.raises(ValueError, match="no such file or folder"):
        load_exemplars(tmp_path / "missing", encoder, "sample")
    with pytest.raises(ValueError, match="holds 0 media files"):
        load_exemplars(tmp_path, encoder, "sample")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_exemplars(tmp_path / "text.safetensors", encoder, "sample")
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no exemplars"):
        load_exemplars(tmp_path / "weights.safetensors", encoder, "sample")
    with pytest.raises(ValueError, match="no exemplars"):
        reference_statistics([], encoder)
    with pytest.raises(ValueError, match="needs at least 2 features, got 1"):
        reference_statistics(images(1), encoder)
    with pytest.raises(ValueError, match="exemplar 2 is of kind audio"):
        reference_statistics([*images(2), *audio([[0.0]])], encoder)


def test_bad_settings(reference, standard):
    with pytest.raises(ValueError, match="credit 'influence'"):
        FrechetDistance(colour, reference, credit="influence")
    with pytest.raises(ValueError, match="sweeps 0"):
        VendiScore(colour, sweeps=0)
    with pytest.raises(ValueError, match="shrinkage -1"):
        FrechetDistance(colour, reference, shrinkage=-1)
    with pytest.raises(ValueError, match="q = 0"):
        VendiScore(colour, q=0)
    with pytest.raises(ValueError, match="distance 'cosine'"):
        ExemplarDistance(colour, reference, distance="cosine")
    with pytest.raises(ValueError, match="features have 2 dimensions, the exemplars 3"):
        FrechetDistance(colour, reference).credit(torch.rand(4, 2), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="do not fit"):
        VendiScore(colour).credit(torch.rand(4, 2), torch.tensor([0, 0, 1]))


def test_a_singular_reference_is_refused_by_the_density_alone(tmp_path):
    save_exemplars(reference_statistics(images(3, seed=11), as_encoder(colour)), tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match="rank 2"):
        ExemplarDistance(colour, tmp_path / "few.safetensors", distance="mahalanobis")
    ExemplarDistance(colour, tmp_path / "few.safetensors", distance="mahalanobis", shrinkage=0.01)
    FrechetDistance(colour, tmp_path / "few.safetensors")


CONFIG = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


def clip_folder(folder, seed):
    torch.manual_seed(seed)
    model = CLIP(embed_dim=16, vision_cfg=CONFIG["vision_cfg"], text_cfg=CONFIG["text_cfg"])
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)


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


def test_a_configuration_names_clip_and_a_folder(tmp_path, tmp_path_factory):
    folder = clip_folder(tmp_path_factory.mktemp("clip"), 2)
    for i, sample in enumerate(images(4, seed=12, size=32)):
        save_media(sample, tmp_path / f"{i}")
    reward = load_reward("visalign.rewards.distribution:ExemplarDistance", encoder={"reward": "clip", "model": folder},
                         reference=str(tmp_path))
    assert reward.spec.modality == {"image"}
    assert reward.score(images(2, seed=13, size=32), prompts(2), range(2)).valid.all()
