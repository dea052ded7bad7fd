"""Media in the pipeline's size: what is cut, filled and mixed, and what is refused."""

import io

import pytest
import torch

from tests.preferences.judged import Encoder, picture
from visalign.preferences import PreferenceDataset, PreferenceRecord, cached_latents, load_latents
from visalign.preferences.candidates import MediaCell, MediaFile
from visalign.preferences.content import decode, fit
from visalign.preferences.records import RowError
from visalign.types import Media, Prompt


def sound(channels, length, rate=100.0):
    return Media("audio", torch.linspace(-0.9, 0.9, channels * length).reshape(channels, length), rate)


def clip(frames, height, width):
    generator = torch.Generator().manual_seed(0)
    return Media("video", torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8), 8.0)


def test_what_fits_is_not_touched():
    for one in (sound(2, 8), clip(3, 4, 4)):
        assert fit(one, one, resize=True, name="x") is one


def test_sounds_are_cut_padded_and_mixed():
    like = sound(2, 8)
    longer, shorter, mono, four = (fit(one, like, True, "x").data for one in (sound(2, 12), sound(2, 5), sound(1, 8), sound(4, 8)))
    assert torch.equal(longer, sound(2, 12).data[:, :8])
    assert torch.equal(shorter, torch.cat([sound(2, 5).data, torch.zeros(2, 3)], dim=1))
    assert torch.equal(mono, sound(1, 8).data.expand(2, -1))
    assert torch.equal(four, sound(4, 8).data.mean(dim=0).expand(2, -1))


def test_another_rate_is_another_size_and_is_resampled():
    with pytest.raises(RowError, match=r"2 x 8 samples at 50 Hz, the pipeline makes 2 x 8 samples at 100 Hz"):
        fit(sound(2, 8, rate=50.0), sound(2, 8), resize=False, name="x")
    pytest.importorskip("soxr")
    tone = torch.sin(torch.arange(4000) / 20)[None]
    found = fit(Media("audio", tone, 4000.0), Media("audio", torch.zeros(1, 8000), 8000.0), True, "x").data
    assert torch.allclose(found[:, 1000:7000], torch.sin(torch.arange(1000, 7000) / 40)[None], atol=1e-2)


def test_clips_give_their_first_frames_and_the_middle_of_each():
    like, given = clip(2, 4, 4), clip(5, 4, 10)
    assert torch.equal(fit(given, like, True, "x").data, given.data[:2, :, :, 3:7])
    with pytest.raises(RowError, match="x has 1 frames, the pipeline makes 2"):
        fit(clip(1, 4, 4), like, True, "x")


def test_flat_colours_stay_what_they_are_under_scaling():
    like = Media("image", torch.zeros(3, 4, 4, dtype=torch.uint8))
    for value in (0, 127, 255):
        for height, width in ((9, 16), (16, 9), (3, 3), (2, 7)):
            found = fit(Media("image", torch.full((3, height, width), value, dtype=torch.uint8)), like, True, "x").data
            assert torch.equal(found, torch.full((3, 4, 4), value, dtype=torch.uint8))


def test_another_kind_cannot_be_fitted():
    with pytest.raises(RowError, match="x is an audio, the pipeline makes video"):
        fit(sound(2, 8), clip(1, 4, 4), True, "x")


def test_a_file_that_went_away(tmp_path):
    with pytest.raises(RowError, match="no such file") as caught:
        decode(MediaFile(tmp_path / "gone.png"))
    assert caught.value.fault == "missing file"


def test_flac_in_a_table_is_recognised_by_its_content(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    data = (torch.randint(-1000, 1000, (2, 8), generator=torch.Generator().manual_seed(0)) / 32768).float()
    soundfile.write(buffer, data.T.numpy(), 100, format="FLAC", subtype="PCM_16")
    assert torch.equal(decode(MediaCell(buffer.getvalue, "audio_1", ".wav")).data, data)


def test_pictures_cannot_be_given_to_a_pipeline_of_sounds(tmp_path):
    picture(tmp_path / "0.png")
    record = PreferenceRecord(Prompt("a"), (MediaFile(tmp_path / "0.png"),) * 2, (1.0, 0.0), 0)
    with pytest.raises(ValueError, match=r"row 0: .*0\.png is an image, the pipeline makes audio"):
        cached_latents(Encoder("audio"), PreferenceDataset("x", (record,)), tmp_path / "cache", identity="test")


def test_sounds_through_the_cache(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    data = (torch.randint(-1000, 1000, (2, 8), generator=torch.Generator().manual_seed(0)) / 32768).float()
    for name in ("0.flac", "1.flac"):
        soundfile.write(tmp_path / name, data.T.numpy(), 1, subtype="PCM_16")
    record = PreferenceRecord(Prompt("a"), (MediaFile(tmp_path / "0.flac"), MediaFile(tmp_path / "1.flac")), (1.0, 0.0), 0)
    cached = cached_latents(Encoder("audio"), PreferenceDataset("x", (record,)), tmp_path / "cache", identity="test")
    assert (cached.encoded, cached.found) == (1, 1)  # the same sound under two names
    assert torch.equal(load_latents(cached.dataset.records[0].candidates), data.expand(2, 2, 8))
