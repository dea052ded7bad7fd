"""Audio models of transformers as encoders, on tiny random weights of each kind through their own extractors; seeds stated."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("soxr")

from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from visalign.rewards.encoders import Encoder, as_encoder
from visalign.rewards.encoders.audio import AudioEncoder
from visalign.types import Media

RATE = 8000
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def encodec(channels):
    config = EncodecConfig(num_filters=4, hidden_size=8, codebook_dim=8, upsampling_ratios=[4, 2], num_lstm_layers=1, sampling_rate=RATE,
                           codebook_size=16, target_bandwidths=[1.5], audio_channels=channels)
    return EncodecModel(config), EncodecFeatureExtractor(feature_size=channels, sampling_rate=RATE)


FAMILIES = {
    "wav2vec2": lambda: (Wav2Vec2Model(Wav2Vec2Config(**SMALL, num_hidden_layers=3, conv_dim=(8, 8), conv_kernel=(10, 3),
                                                      conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
                                                      num_conv_pos_embedding_groups=2)), Wav2Vec2FeatureExtractor(sampling_rate=RATE)),
    "encodec": lambda: encodec(1),
    "stereo": lambda: encodec(2),
    "ast": lambda: (ASTModel(ASTConfig(**SMALL, num_hidden_layers=2, num_mel_bins=16, max_length=64, patch_size=8, frequency_stride=8,
                                       time_stride=8)), ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=16, max_length=64)),
    "whisper": lambda: (WhisperModel(WhisperConfig(vocab_size=64, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
                                                   decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
                                                   max_source_positions=50, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)),
                        WhisperFeatureExtractor(chunk_length=1)),
}


def save(folder, family, seed=0):
    torch.manual_seed(seed)
    model, extractor = FAMILIES[family]()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def sound(seconds, seed=0, rate=RATE, channels=1):
    """Tones that neither resampling nor a change of length alters much."""
    time = torch.arange(round(seconds * rate)) / rate
    generator = torch.Generator().manual_seed(seed)
    tones = [0.1 * torch.sin(2 * torch.pi * (200 + 2000 * torch.rand((), generator=generator)) * time) for _ in range(4 * channels)]
    return Media("audio", torch.stack(tones).reshape(channels, 4, -1).sum(dim=1).float(), rate=rate)


def raw(media):
    return media.data[0].numpy()


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_hidden_states_of_the_layer_asked_for(folders, layer):
    encoder, media = AudioEncoder(folders["wav2vec2"], layer, window_seconds=1.0), [sound(1.0, seed) for seed in range(3)]
    assert isinstance(encoder, Encoder)
    model, extractor = Wav2Vec2Model.from_pretrained(folders["wav2vec2"]).eval(), Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    inputs = extractor([raw(one) for one in media], sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[layer]
    rows = encoder.encode(media)
    assert [row.shape for row in rows] == [(1, 16)] * 3
    assert rows[0].dtype == torch.float64
    torch.testing.assert_close(torch.cat(rows).float(), states.mean(dim=1), atol=1e-5, rtol=0)
    frames = AudioEncoder(folders["wav2vec2"], layer, rows="frame", window_seconds=1.0).encode(media[:1])[0]
    torch.testing.assert_close(frames.float(), states[0], atol=1e-5, rtol=0)


def test_encodec_gives_its_encoders_output(folders):
    encoder = as_encoder({"encoder": "hf_audio", "path": folders["encodec"], "rows": "frame", "window_seconds": 0.5})
    media = sound(0.5)
    model = EncodecModel.from_pretrained(folders["encodec"]).eval()
    with torch.no_grad():
        expected = model.encoder(media.data[None])[0].T
    torch.testing.assert_close(encoder.encode([media])[0].float(), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"layer 1 does not exist; hidden states are 0 to 0"):
        AudioEncoder(folders["encodec"], 1)


def test_a_stereo_model_hears_both_channels(folders):
    encoder, both = AudioEncoder(folders["stereo"], window_seconds=0.5), sound(0.5, channels=2)
    model = EncodecModel.from_pretrained(folders["stereo"]).eval()
    with torch.no_grad():
        expected = model.encoder(both.data[None])[0].mean(dim=1)
    torch.testing.assert_close(encoder.encode([both])[0][0].float(), expected, atol=1e-5, rtol=0)
    mono = Media("audio", both.data.mean(dim=0, keepdim=True), rate=RATE)
    twice = Media("audio", both.data.mean(dim=0, keepdim=True).repeat(2, 1), rate=RATE)
    torch.testing.assert_close(encoder.encode([mono])[0], encoder.encode([twice])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["ast", "whisper"])
def test_models_of_spectrograms(folders, family):
    rate = 16000 if family == "whisper" else RATE
    encoder = AudioEncoder(folders[family], 1, window_seconds=None if family == "whisper" else 0.6)
    assert encoder.rate == rate
    assert encoder.window == (16000 if family == "whisper" else 4800)
    media = [sound(1.5, seed, rate) for seed in range(2)]
    rows = encoder.encode(media)
    assert [row.shape for row in rows] == [(2, 16) if family == "whisper" else (3, 16)] * 2
    model = {"ast": ASTModel, "whisper": WhisperModel}[family].from_pretrained(folders[family]).eval()
    window = raw(media[0])[:encoder.window]
    inputs = encoder.extractor(window, sampling_rate=rate, return_tensors="pt")[encoder.extractor.model_input_names[0]]
    with torch.no_grad():
        states = (model.encoder if family == "whisper" else model)(inputs, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(rows[0][0].float(), states[0].mean(dim=0), atol=1e-5, rtol=0)


def test_windows_cover_the_sound_and_are_of_one_length(folders):
    encoder = AudioEncoder(folders["wav2vec2"], window_seconds=1.0)
    long = sound(2.25)
    windows = encoder._windows(long)
    assert [len(window[0]) for window in windows] == [RATE] * 3
    assert torch.equal(windows[0], long.data[:, :RATE])
    assert torch.equal(windows[2], long.data[:, -RATE:])
    assert [len(encoder._windows(sound(seconds))) for seconds in (0.4, 1.0, 2.0, 2.001)] == [1, 1, 2, 3]
    assert encoder._windows(sound(0.4))[0].shape == (1, 3200)


def test_batches_lengths_and_rates_do_not_matter(folders):
    media = [sound(seconds, seed) for seed, seconds in enumerate((0.4, 1.0, 3.3, 0.4))]
    together = AudioEncoder(folders["wav2vec2"], window_seconds=1.0).encode(media)
    alone = AudioEncoder(folders["wav2vec2"], window_seconds=1.0, batch_size=1)
    for one, rows in zip(media, together, strict=True):
        torch.testing.assert_close(alone.encode([one])[0], rows, atol=1e-5, rtol=0)
    resampled = alone.encode([sound(1.0, 1, rate=44100)])[0]
    misread = alone.encode([Media("audio", sound(1.0, 1, rate=44100).data, rate=RATE)])[0].mean(dim=0)
    assert float((resampled - together[1]).norm()) < 0.3 * float((misread - together[1]).norm())


def test_the_declared_rate_counts(folders, tmp_path):
    encoder = AudioEncoder(folders["wav2vec2"], rate=RATE)
    assert (encoder.rate, encoder.window) == (RATE, 10 * RATE)
    with pytest.raises(ValueError, match="declares 8000 samples per second, not 16000; leave rate out"):
        AudioEncoder(folders["wav2vec2"], rate=16000)
    with pytest.raises(ValueError, match="audio without a rate"):
        encoder.encode([Media("audio", torch.zeros(1, 100))])


@pytest.mark.parametrize(("family", "seconds"), [("whisper", 1.2), ("ast", 2.0)])
def test_windows_that_the_extractor_would_cut_are_refused(folders, family, seconds):
    with pytest.raises(ValueError, match=f"ignores the end of windows of {seconds:g} s; give a smaller window_seconds"):
        AudioEncoder(folders[family], window_seconds=seconds)


def test_encoding_is_repeatable_and_does_not_follow_chance(folders):
    """Wav2vec 2.0 masks spans of time at random while it trains."""
    encoder = AudioEncoder(folders["wav2vec2"], window_seconds=1.0)
    first = encoder.encode([sound(1.0)])[0]
    torch.manual_seed(7)
    np.random.seed(7)
    assert torch.equal(encoder.encode([sound(1.0)])[0], first)


def test_the_hash_follows_weights_windows_and_layer(folders, tmp_path):
    def hashed(folder, *layer, **settings):
        return AudioEncoder(folder, *layer, **{"window_seconds": 1, **settings}).hash

    own, path = hashed(folders["wav2vec2"]), tmp_path / "preprocessor_config.json"
    assert own == hashed(folders["wav2vec2"], window_seconds=1.0)
    assert own != hashed(folders["wav2vec2"], window_seconds=0.5)
    assert own != hashed(folders["wav2vec2"], 1)
    assert own != hashed(folders["wav2vec2"], rows="frame")
    assert own != hashed(save(tmp_path, "wav2vec2", seed=1))
    assert own == hashed(save(tmp_path, "wav2vec2"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": False}))
    assert own != hashed(str(tmp_path))


def test_bad_settings(folders):
    with pytest.raises(ValueError, match="layer 4 does not exist; hidden states are 0 to 3"):
        AudioEncoder(folders["wav2vec2"], 4)
    with pytest.raises(ValueError, match="rows 'second'"):
        AudioEncoder(folders["wav2vec2"], rows="second")
