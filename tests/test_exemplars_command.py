"""``visalign exemplars``: a folder becomes a reference that rewards load; what it is too small for is said."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from visalign.cli import app
from visalign.maths.mmd import median_distance
from visalign.media import load_media, save_media
from visalign.playground import parse, render, sample_scene, train_prompts
from visalign.plugins import load_reward
from visalign.rewards.encoders import as_encoder
from visalign.rewards.exemplars import read_exemplars, reference_statistics
from visalign.types import Media, Prompt

CLIP = "{reward: clip, model: playground:clip}"
ENCODER = "def size(media):\n    return [[float(one.data.shape[-1]), float(one.data.float().mean())] for one in media]\n"


def visalign(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import random

    rng, made = random.Random(3), tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(render([sample_scene(parse(text), rng) for text in train_prompts(24, seed=3)])):
        save_media(Media("image", picture), made / f"{number:02d}")
    (made / "samples.jsonl").write_text("")
    return made


def test_the_file_is_what_the_library_computes_and_a_reward_loads_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "good.safetensors"
    result = visalign("exemplars", folder, "--encoder", CLIP, "--out", out, "--features", 10, "--seed", 5, "--batch", 7)
    assert result.exit_code == 0, result.output + result.stderr
    from visalign.playground import clip_path

    encoder = as_encoder({"reward": "clip", "model": str(clip_path())})
    media = [load_media(path) for path in sorted(folder.glob("*.png"))]
    expected, found = reference_statistics(media, encoder, num_features=10, seed=5), read_exemplars(out)
    torch.testing.assert_close(found.gaussian.covariance, expected.gaussian.covariance, atol=1e-7, rtol=0)  # batches of 7 and of 24
    torch.testing.assert_close(found.features, expected.features, atol=1e-6, rtol=0)
    assert (found.count, found.num_media, found.hash, found.unit) == (24, 24, encoder.hash, "sample")
    assert found.bandwidth == pytest.approx(median_distance(found.features.double()))
    for told in (encoder.hash[:12], f"{found.bandwidth:.6g}", "features kept", "24", "64"):
        assert told in result.output
    reward = load_reward("kad", encoder={"reward": "clip", "model": str(clip_path())}, reference=str(out))
    features = reward.features(media, [Prompt("")] * 24)
    assert reward.value(features) > reward.value(features[:, torch.randperm(64)])


def test_statistics_too_small_for_their_dimensions_say_so(folder: Path, tmp_path: Path) -> None:
    result = visalign("exemplars", folder, "--encoder", CLIP, "--out", tmp_path / "few.safetensors")
    assert "24 samples cannot fill 64 dimensions" in result.output
    assert "gather 640" in result.output
    assert "24 features are fewer than KID's subsets of 1000" in result.output


def test_a_function_of_ones_own_needs_nothing_else(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_encoder.py").write_text(ENCODER)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "own.safetensors"
    result = visalign("exemplars", folder, "--encoder", "own_encoder:size", "--out", out, "--features", 0)
    assert result.exit_code == 0, result.output + result.stderr
    assert read_exemplars(out).features is None
    assert "cannot fill" not in result.output
    assert "few for 2 dimensions" not in result.output  # 24 are above 10 per dimension
    assert "own_encoder:size" in result.output


@pytest.mark.parametrize(("words", "message"), [
    (("--encoder", "{encoder: vgg}"), "{encoder: hf, ...}"),
    (("--encoder", "{encoder: inception, weights: nowhere.pth}"), "nothing is downloaded for you"),
    (("--encoder", CLIP, "--unit", "window"), "--unit window: neither sample nor frame"),
    (("--encoder", CLIP, "--features", "1"), "num_features 1 must be 0 or at least 2"),
    (("--encoder", "{reward: clip"), "{reward: clip"),
])
def test_mistakes_end_in_one_message(folder: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    result = visalign("exemplars", folder, *words, "--out", tmp_path / "x.safetensors")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_a_folder_without_media_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in visalign("exemplars", tmp_path / "none", "--encoder", CLIP, "--out", tmp_path / "x").stderr
    assert "holds 0 media files" in visalign("exemplars", tmp_path, "--encoder", CLIP, "--out", tmp_path / "x").stderr
