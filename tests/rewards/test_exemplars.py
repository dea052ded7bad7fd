"""Reference statistics: what is kept, files of both formats, what is refused; seeds stated."""

from dataclasses import replace

import pytest
import torch
from colour_features import Plane, audio, colour, images, save_reference
from safetensors.torch import save_file

from visalign.maths.mmd import median_distance
from visalign.media import save_media
from visalign.playground import exemplars_path
from visalign.rewards.distribution import FrechetDistance
from visalign.rewards.encoders import as_encoder
from visalign.rewards.exemplars import load_exemplars, read_exemplars, reference_statistics, save_exemplars
from visalign.rewards.kernel_distance import KID


@pytest.fixture
def reference(tmp_path):
    return save_reference(tmp_path)


def test_statistics_survive_saving_and_batching(tmp_path):
    encoder, media = as_encoder(colour), images(30, seed=9)
    exemplars = reference_statistics(media, encoder)
    small = reference_statistics(iter(media), encoder, batch_size=7)
    torch.testing.assert_close(small.gaussian.covariance, torch.cov(colour(media).T), atol=1e-12, rtol=0)
    torch.testing.assert_close(small.gaussian.mean, exemplars.gaussian.mean, atol=1e-12, rtol=0)
    save_exemplars(exemplars, tmp_path / "s.safetensors")
    loaded = load_exemplars(tmp_path / "s.safetensors", encoder, "sample")
    assert torch.equal(loaded.gaussian.covariance, exemplars.gaussian.covariance)
    assert torch.equal(loaded.features, exemplars.features)
    assert loaded.bandwidth == exemplars.bandwidth
    assert (loaded.count, loaded.num_media, loaded.unit, loaded.encoder, loaded.hash) == (30, 30, "sample", encoder.name, encoder.hash)


def test_features_are_kept_with_their_bandwidth():
    encoder, media = as_encoder(colour), images(30, seed=9)
    exemplars = reference_statistics(media, encoder)
    assert torch.equal(exemplars.features, colour(media).float())
    assert exemplars.bandwidth == pytest.approx(float(torch.pdist(colour(media)).median()), rel=1e-6)  # 435 pairs


def test_more_features_than_are_kept_are_drawn_at_random_without_replacement():
    encoder, media = as_encoder(colour), images(200, seed=10)
    all_rows = colour(media).float()
    found = [reference_statistics(media, encoder, num_features=50, seed=seed, batch_size=size) for seed, size in ((0, 64), (0, 7), (1, 64))]
    assert torch.equal(found[0].features, found[1].features)
    rows = [(exemplars.features[:, None] == all_rows[None]).all(dim=2).nonzero()[:, 1].tolist() for exemplars in found]
    assert rows[0] != rows[2]
    for chosen in rows:
        assert len(set(chosen)) == 50
        assert 75 < sum(chosen) / 50 < 125  # the mean position is 99.5 +- 7
    assert found[0].bandwidth == pytest.approx(median_distance(found[0].features.double()))
    torch.testing.assert_close(found[0].gaussian.covariance, torch.cov(colour(media).T), atol=1e-12, rtol=0)  # of all rows


def test_a_file_of_the_former_format_serves_the_frechet_distance_alone(tmp_path, reference):
    exemplars = load_exemplars(reference, as_encoder(colour), "sample")
    metadata = {"format": "visalign exemplars 1", "unit": "sample", "encoder": exemplars.encoder, "hash": exemplars.hash, "count": "60",
                "num_media": "60"}
    former = tmp_path / "former.safetensors"
    save_file({"mean": exemplars.gaussian.mean, "covariance": exemplars.gaussian.covariance}, former, metadata=metadata)
    features = colour(images(10, seed=11))
    assert FrechetDistance(colour, former).value(features) == FrechetDistance(colour, reference).value(features)
    assert read_exemplars(former).features is None
    with pytest.raises(ValueError, match="KID compares with the exemplars' own features, and these statistics hold mean and cov"):
        KID(colour, former)


def test_statistics_without_features_are_a_choice(tmp_path):
    path = save_reference(tmp_path, num_features=0)
    assert read_exemplars(path).features is None
    FrechetDistance(colour, path)
    with pytest.raises(ValueError, match="visalign exemplars FOLDER"):
        KID(colour, path)
    with pytest.raises(ValueError, match="num_features 1 must be 0 or at least 2"):
        reference_statistics(images(3), as_encoder(colour), num_features=1)


def test_the_embedded_exemplars_are_of_the_embedded_clip():
    from visalign.playground import clip_path

    encoder = as_encoder({"reward": "clip", "model": str(clip_path())})
    exemplars = load_exemplars(exemplars_path(), encoder, "sample")
    assert exemplars.count == 4096
    assert exemplars.features.shape == (1024, 64)
    assert exemplars.bandwidth == pytest.approx(median_distance(exemplars.features.double()), rel=1e-12)
    assert "/" not in exemplars.encoder


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


def test_bad_references(tmp_path):
    encoder = as_encoder(colour)
    with pytest.raises(ValueError, match="no such file or folder"):
        load_exemplars(tmp_path / "missing", encoder, "sample")
    with pytest.raises(ValueError, match="holds 0 media files"):
        load_exemplars(tmp_path, encoder, "sample")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_exemplars(tmp_path / "text.safetensors", encoder, "sample")
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no exemplars"):
        load_exemplars(tmp_path / "weights.safetensors", encoder, "sample")
    exemplars = reference_statistics(images(3), encoder)
    save_file({"mean": exemplars.gaussian.mean, "covariance": exemplars.gaussian.covariance}, tmp_path / "newer.safetensors",
              metadata={"format": "visalign exemplars 3"})
    with pytest.raises(ValueError, match=r"format 'visalign exemplars 3', expected 'visalign exemplars 2' or 'visalign exemplars 1'"):
        load_exemplars(tmp_path / "newer.safetensors", encoder, "sample")
    save_exemplars(replace(exemplars, unit="frame", num_media=1), tmp_path / "frames.safetensors")
    with pytest.raises(ValueError, match=r"rows are frames \(3 of 1 media\)"):
        load_exemplars(tmp_path / "frames.safetensors", encoder, "sample")
    with pytest.raises(ValueError, match="no exemplars"):
        reference_statistics([], encoder)
    with pytest.raises(ValueError, match="needs at least 2 features, got 1"):
        reference_statistics(images(1), encoder)
    with pytest.raises(ValueError, match="exemplar 2 is of kind audio"):
        reference_statistics([*images(2), *audio([[0.0]])], encoder)
