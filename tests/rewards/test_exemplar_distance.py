"""One sample against exemplars, on pixel means as features; seeds stated."""

import pytest
import torch
from colour_features import Plane, audio, colour, colours, images, prompts, save_reference, save_standard
from tiny_clip import clip_folder

from visalign.maths.frechet import Moments, frechet_distance, mahalanobis
from visalign.media import save_media
from visalign.plugins import load_reward
from visalign.protocols import Reward
from visalign.rewards.distribution import FrechetDistance, VendiScore
from visalign.rewards.encoders import as_encoder
from visalign.rewards.encoders.function import FunctionEncoder
from visalign.rewards.exemplar_distance import ExemplarDistance
from visalign.rewards.exemplars import load_exemplars, reference_statistics, save_exemplars
from visalign.types import Media


@pytest.fixture
def reference(tmp_path):
    return save_reference(tmp_path)


@pytest.fixture
def standard(tmp_path):
    return save_standard(tmp_path)


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


def test_a_singular_reference_is_refused_by_the_density_alone(tmp_path):
    save_exemplars(reference_statistics(images(3, seed=11), as_encoder(colour)), tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match="rank 2"):
        ExemplarDistance(colour, tmp_path / "few.safetensors", distance="mahalanobis")
    ExemplarDistance(colour, tmp_path / "few.safetensors", distance="mahalanobis", shrinkage=0.01)
    FrechetDistance(colour, tmp_path / "few.safetensors")


def test_a_configuration_names_clip_and_a_folder(tmp_path, tmp_path_factory):
    folder = clip_folder(tmp_path_factory.mktemp("clip"), 2)
    for i, sample in enumerate(images(4, seed=12, size=32)):
        save_media(sample, tmp_path / f"{i}")
    reward = load_reward("visalign.rewards.exemplar_distance:ExemplarDistance", encoder={"reward": "clip", "model": folder},
                         reference=str(tmp_path))
    assert reward.spec.modality == {"image"}
    assert reward.score(images(2, seed=13, size=32), prompts(2), range(2)).valid.all()


def test_bad_settings(reference):
    with pytest.raises(ValueError, match="distance 'cosine'"):
        ExemplarDistance(colour, reference, distance="cosine")
