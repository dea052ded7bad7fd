"""Embeddings are made once per content and encoder, survive a kill by shards, and what cannot be embedded is reported with its row."""

import json
import shutil

import pytest
import torch

from tests.reward_training.worlds import ColourAndWords, colour_pairs, plain
from visalign.preferences import PreferenceError, load_preferences
from visalign.reward_training.examples import build_corpus
from visalign.reward_training.features import EmbeddingCache, embed
from visalign.rewards.feature_encoders import as_feature_encoder


def corpus_of(path):
    return build_corpus(load_preferences(path, content="media"))


def encoder(**changes):
    made = ColourAndWords()
    for name, value in changes.items():
        setattr(made, name, value)
    return as_feature_encoder(made), made


def test_embeddings_are_those_of_the_encoder_and_are_made_once_per_content(tmp_path):
    corpus = corpus_of(colour_pairs(tmp_path / "data", num=30, num_prompts=5))
    shutil.copy(tmp_path / "data" / "0-0.png", tmp_path / "data" / "0-1.png")  # another file of the same content
    wrapped, counted = encoder()
    _, found = embed(wrapped, corpus, tmp_path / "cache", batch=16)
    assert counted.encoded == 59
    from visalign.preferences.content import decode

    torch.testing.assert_close(found.media, wrapped.media([decode(one) for one in corpus.media]))
    torch.testing.assert_close(found.text, wrapped.texts(corpus.texts))
    counted.encoded = 0
    _, again = embed(wrapped, corpus, tmp_path / "cache", batch=16)
    assert counted.encoded == 0
    assert torch.equal(again.media, found.media)


def test_another_encoder_and_changed_content_never_meet_old_embeddings(tmp_path):
    corpus = corpus_of(colour_pairs(tmp_path / "data", num=5))
    embed(encoder()[0], corpus, tmp_path / "cache")
    wrapped, counted = encoder(hash="1" * 64)
    embed(wrapped, corpus, tmp_path / "cache")
    assert counted.encoded == 10
    plain(tmp_path / "data" / "0-0", [0.9, 0.1, 0.2])
    _, found = embed(wrapped, corpus, tmp_path / "cache")
    assert counted.encoded == 11
    torch.testing.assert_close(found.media[0], torch.tensor([0.9, 0.1, 0.2]), atol=0.01, rtol=0)


def test_a_killed_run_continues_behind_the_last_whole_shard(tmp_path):
    corpus = corpus_of(colour_pairs(tmp_path / "data", num=20))
    wrapped, counted = encoder()

    def stop(done, total):
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(wrapped, corpus, tmp_path / "cache", batch=8, progress=stop)
    embed(wrapped, corpus, tmp_path / "cache", batch=8)
    assert counted.encoded == 40


def test_damaged_shards_are_made_again(tmp_path, caplog):
    corpus = corpus_of(colour_pairs(tmp_path / "data", num=4))
    wrapped, counted = encoder()
    _, before = embed(wrapped, corpus, tmp_path / "cache", batch=100)
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-3])
    _, after = embed(wrapped, corpus, tmp_path / "cache", batch=100)
    assert "is damaged" in caplog.text
    assert counted.encoded == 16
    assert torch.equal(before.media, after.media)
    assert len(EmbeddingCache(tmp_path / "cache", wrapped.hash)._rows) == 8 + len(corpus.texts)


def test_what_cannot_be_embedded_is_an_error_with_its_row_or_left_out(tmp_path):
    path = colour_pairs(tmp_path / "data", num=6)
    (tmp_path / "data" / "2-1.png").write_bytes(b"no picture")
    corpus = corpus_of(path)
    with pytest.raises(PreferenceError, match=r"row 2: .*2-1.png"):
        embed(encoder()[0], corpus, tmp_path / "cache")
    kept, found = embed(encoder()[0], corpus, tmp_path / "cache", broken="skip")
    assert [record.row for record in kept.dataset.records] == [0, 1, 3, 4, 5]
    assert kept.dataset.dropped == {"unreadable": 1}
    assert torch.isfinite(found.media[kept.examples.media]).all()
    assert len(kept.examples) == 5


def test_kinds_the_encoder_does_not_read_and_embeddings_that_are_none_are_refused(tmp_path):
    corpus = corpus_of(colour_pairs(tmp_path / "data", num=3))
    with pytest.raises(PreferenceError, match="is of kind image, and colour and words reads audio"):
        embed(encoder(modality=frozenset({"audio"}))[0], corpus, tmp_path / "cache")

    def broken(media):
        return [torch.full((1, 3), torch.nan if one.data[0, 0, 0] == first else 0.5, dtype=torch.float64) for one in media]

    from visalign.media import load_media

    first = load_media(tmp_path / "data" / "1-0.png").data[0, 0, 0]
    wrapped, made = encoder(hash="2" * 64)
    made.encode = broken
    with pytest.raises(PreferenceError, match=r"row 1: .*gives no embedding of it"):
        embed(wrapped, corpus, tmp_path / "cache")


def test_shards_name_their_keys(tmp_path):
    cache = EmbeddingCache(tmp_path, "a" * 64)
    cache.add(["k1", "k2"], torch.arange(6.0).reshape(2, 3))
    again = EmbeddingCache(tmp_path, "a" * 64)
    assert "k2" in again
    assert "k3" not in again
    assert again["k2"].tolist() == [3, 4, 5]
    from safetensors import safe_open

    with safe_open(next((tmp_path / ("a" * 32)).glob("*.safetensors")), framework="pt") as file:
        assert json.loads(file.metadata()["keys"]) == ["k1", "k2"]
