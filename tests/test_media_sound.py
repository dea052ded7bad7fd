"""Sound from disk: FLAC, and WAV of every sample format."""

import pytest
import torch

from visalign.media import load_media, save_media
from visalign.types import Media

soundfile = pytest.importorskip("soundfile")


@pytest.mark.parametrize(("suffix", "subtype", "step"), [("flac", "PCM_16", 2**-15), ("flac", "PCM_24", 2**-23), ("wav", "PCM_24", 2**-23),
                                                         ("wav", "FLOAT", 0.0), ("wav", "PCM_U8", 2**-7)])
def test_what_is_read_is_what_was_written(tmp_path, suffix, subtype, step):
    wave = 0.5 * torch.sin(torch.arange(4000) * 0.1).repeat(2, 1)
    wave[1] *= -0.5
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, wave.T.numpy(), 16000, subtype=subtype)
    back = load_media(path)
    assert (back.rate, back.data.dtype, tuple(back.data.shape)) == (16000.0, torch.float32, (2, 4000))
    assert float((back.data - wave).abs().max()) <= step


@pytest.mark.parametrize("name", ["a.flac", "b.wav"])
def test_noise_bytes_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing here")
    with pytest.raises(ValueError, match="not a readable audio file"):
        load_media(tmp_path / name)


def test_our_own_wav_reaches_full_scale(tmp_path):
    media = Media("audio", torch.linspace(-1, 1, 100)[None], rate=8000)
    back = load_media(save_media(media, tmp_path / "x"))
    assert float(back.data.abs().max()) == 1
    assert float((back.data - media.data).abs().max()) <= 1 / 32767
