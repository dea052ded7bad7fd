"""The cache: what is encoded, what is found, what survives a kill, and what is complained about."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.preferences.judged import Encoder, encoded, pairs, picture, write
from visalign.preferences import PreferenceError, cached_latents, load_latents, load_preferences, write_jsonl
from visalign.preferences.candidates import MediaFile
from visalign.preferences.stored import write_latents


def cache(policy, path, **options):
    return cached_latents(policy, load_preferences(path), path.parent / "cache", **{"identity": "test", **options})


def files(folder):
    return sorted((folder / "cache").rglob("*.safetensors"))


def test_everything_is_encoded_once(tmp_path):
    path, policy = pairs(tmp_path, 3), Encoder()
    first = cache(policy, path)
    assert (first.encoded, first.found, policy.num_encoded) == (6, 0, 6)
    again = cache(policy, path)
    assert (again.encoded, again.found, policy.num_encoded) == (0, 6, 6)
    assert again.dataset.records == first.dataset.records
    for k, record in enumerate(first.dataset.records):
        expected = torch.stack([encoded(picture(tmp_path / "x.png", seed=s)) for s in (2 * k, 2 * k + 1)])
        assert torch.equal(load_latents(record.candidates), expected)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_the_batch_changes_nothing(tmp_path, batch):
    found = cache(Encoder(), pairs(tmp_path, 3), batch=batch).dataset.records[1]
    assert torch.equal(load_latents(found.candidates)[0], encoded(picture(tmp_path / "x.png", seed=2)))


def test_a_picture_in_two_pairs_is_encoded_once_and_an_overwritten_one_again(tmp_path):
    for k in range(3):
        picture(tmp_path / f"{k}.png", seed=k)
    rows = [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}, {"prompt": "b", "chosen": "0.png", "rejected": "2.png"}]
    path, policy = write(tmp_path / "data.jsonl", rows), Encoder()
    assert (cache(policy, path).encoded, cache(policy, path).found) == (3, 4)
    pixels = picture(tmp_path / "1.png", seed=9)  # the same name, another picture
    again = cache(policy, path)
    assert (again.encoded, again.found) == (1, 3)
    assert torch.equal(load_latents(again.dataset.records[0].candidates)[1], encoded(pixels))


def test_another_pipeline_or_size_does_not_meet_the_latents(tmp_path):
    path, policy = pairs(tmp_path, 1), Encoder()
    assert [cache(policy, path, identity=name).encoded for name in ("one", "two", "one")] == [2, 2, 0]
    assert cache(policy, path, identity="one", resize=True).encoded == 2


def test_a_damaged_file_is_made_again(tmp_path, caplog):
    path, policy = pairs(tmp_path, 1), Encoder()
    cached = cache(policy, path)
    file = cached.dataset.records[0].candidates[0].path
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="run cached_latents again"):
        load_latents(cached.dataset.records[0].candidates)
    assert cache(policy, path).encoded == 1
    assert "is damaged" in caplog.text
    assert load_latents(cached.dataset.records[0].candidates).shape == (2, 3, 8, 8)


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    path, policy = pairs(tmp_path, 3), Encoder()
    first = cache(policy, path)
    read = []
    monkeypatch.setattr(MediaFile, "read", lambda self: read.append(self.path.name) or self.path.read_bytes())
    assert cache(policy, path).dataset.records == first.dataset.records
    assert read == []
    first.dataset.records[1].candidates[0].path.unlink()
    assert cache(policy, path).encoded == 1
    assert read == ["2.png"]
    picture(tmp_path / "4.png", seed=9)
    assert cache(policy, path).encoded == 1
    assert sorted(read[1:]) == [f"{k}.png" for k in range(6)]  # another data set: everything is looked at, one is new


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.preferences.judged import Encoder
from visalign import tensorfile
from visalign.preferences import cached_latents, load_preferences
moment, path = sys.argv[1], Path(sys.argv[2])
if moment == "writing":
    save = tensorfile.save_file
    def lethal(tensors, file, **rest):
        save(tensors, file, **rest)
        if len(list(path.parent.glob("cache/*/*.safetensors"))) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    tensorfile.save_file = lethal
def progress(done, total):
    if moment == "between" and done == 4:
        os.kill(os.getpid(), signal.SIGKILL)
cached_latents(Encoder(), load_preferences(path), path.parent / "cache", identity="test", batch=2, progress=progress)
"""


@pytest.mark.parametrize(("moment", "kept"), [("writing", 3), ("between", 4)])
def test_a_killed_run_continues_where_it_was(tmp_path, moment, kept):
    path = pairs(tmp_path, 4)
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, str(path)], check=False, env={**os.environ, "PYTHONPATH": "."})
    assert killed.returncode == -signal.SIGKILL
    policy = Encoder()
    again = cache(policy, path)
    assert (again.encoded, again.found, policy.num_encoded) == (8 - kept, kept, 8 - kept)
    whole = cached_latents(Encoder(), load_preferences(path), tmp_path / "other", identity="test")
    for one, other in zip(again.dataset.records, whole.dataset.records, strict=True):
        assert torch.equal(load_latents(one.candidates), load_latents(other.candidates))


def test_missing_unreadable_and_differently_sized_pictures_are_reported_before_anything_is_encoded(tmp_path):
    path, policy = pairs(tmp_path, 6), Encoder()
    dataset = load_preferences(path)
    (tmp_path / "2.png").unlink()
    (tmp_path / "5.png").write_bytes(b"not a picture")
    (tmp_path / "6.png").write_bytes(b"")
    picture(tmp_path / "9.png", size=(8, 10))
    with pytest.raises(PreferenceError) as caught:
        cached_latents(policy, dataset, tmp_path / "cache", identity="test")
    assert [(p.row, p.fault) for p in caught.value.problems] == [(1, "missing file"), (2, "unreadable"), (3, "unreadable"), (4, "size")]
    assert "is 8 x 10, the pipeline makes 8 x 8" in str(caught.value)
    assert "resize=True scales and crops" in str(caught.value)
    assert policy.num_encoded == 0
    kept = cached_latents(policy, dataset, tmp_path / "cache", identity="test", broken="skip").dataset
    assert [record.row for record in kept.records] == [0, 5]
    assert kept.dropped == {"missing file": 1, "unreadable": 2, "size": 1}


def test_a_picture_that_breaks_off_is_reported_after_the_others_were_encoded(tmp_path):
    path, policy = pairs(tmp_path, 2), Encoder()
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(content[:len(content) // 2])  # a good header
    with pytest.raises(PreferenceError, match=r"row 0: .*not a readable image"):
        cache(policy, path)
    assert policy.num_encoded == 3
    kept = cache(policy, path, broken="skip")
    assert (kept.encoded, [record.row for record in kept.dataset.records]) == (0, [1])
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not one usable row \(2 unreadable left out\)"):
        cache(policy, path, broken="skip")


def test_latents_that_are_not_finite_are_no_latents(tmp_path):
    class Broken(Encoder):
        def encode_media(self, media):
            latents = super().encode_media(media)
            latents[1, 0, 0, 0] = float("nan")
            return latents

    with pytest.raises(PreferenceError, match=r"row 0: .*1\.png: its latents are not finite"):
        cache(Broken(), pairs(tmp_path, 1))
    assert len(files(tmp_path)) == 1


def test_resized_pictures_cover_the_size_and_are_cropped_around_their_centre(tmp_path):
    wide = picture(tmp_path / "0.png", seed=0, size=(20, 8))
    picture(tmp_path / "1.png", seed=1, size=(16, 16))
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "0.png", "rejected": "1.png"}])
    found = load_latents(cache(Encoder(), path, resize=True).dataset.records[0].candidates)
    assert torch.equal(found[0], encoded(wide[:, 6:14]))
    assert found[1].shape == (3, 8, 8)


def test_stored_latents_need_no_encoder_but_must_be_of_this_pipeline(tmp_path):
    for name, identity in (("same", "test"), ("other", "another VAE"), ("unsaid", None)):
        write_latents(tmp_path / f"{name}.safetensors", torch.randn(3, 3, 8, 8), identity)
    write_latents(tmp_path / "small.safetensors", torch.randn(3, 3, 4, 4), "test")
    (tmp_path / "damaged.safetensors").write_bytes(b"12")
    rows = [{"prompt": "a", "latents": f"{name}.safetensors", "rows": rows, "label": [1, 0]} for name, rows in
            (("same", [2, 0]), ("other", [0, 1]), ("unsaid", [0, 1]), ("small", [0, 1]), ("damaged", [0, 1]), ("same", [0, 3]))]
    path, policy = write(tmp_path / "data.jsonl", rows), Encoder()
    with pytest.raises(PreferenceError, match="4 latents") as caught:
        cache(policy, path)
    for message in ("latents of another pipeline", "of shape (3, 4, 4), the pipeline's are (3, 8, 8)", "not a readable file of latents",
                    "the file has 3 rows"):
        assert message in str(caught.value)
    kept = cache(policy, path, broken="skip")
    assert [record.row for record in kept.dataset.records] == [0, 2]
    assert policy.num_encoded == 0


def test_a_cached_data_set_can_be_written_and_needs_its_media_no_more(tmp_path):
    path, policy = pairs(tmp_path, 2), Encoder()
    first = cache(policy, path, resize=True)
    write_jsonl(first.dataset, tmp_path / "encoded.jsonl")
    for file in tmp_path.glob("*.png"):
        file.unlink()
    again = cache(policy, tmp_path / "encoded.jsonl")
    assert again.dataset.records == first.dataset.records
    assert policy.num_encoded == 4
