"""Candidates as media of the form a pipeline makes: decoded, and where the user says so resized and cropped.

Images, video and uncompressed 16-bit audio are read as everywhere in visalign; FLAC and other WAV encodings need ``soundfile``,
another sample rate needs ``soxr`` (both: pip install 'visalign[audio]').
"""

from __future__ import annotations

import io
import tempfile
import wave
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visalign.media import KIND, load_media
from visalign.preferences.candidates import MediaCell, MediaFile
from visalign.preferences.records import RowError
from visalign.types import Media, MediaKind

KINDS: Mapping[str, MediaKind] = {**{suffix: kind for suffix, kind in KIND.items() if kind != "mesh"}, ".flac": "audio"}


def decode(candidate: MediaFile | MediaCell) -> Media:
    """The candidate's media in canonical form.

    Raises:
        RowError: it is missing or cannot be read.
    """
    try:
        if isinstance(candidate, MediaFile):
            if not candidate.path.is_file():
                raise FileNotFoundError("no such file")
            return _decode_file(candidate.path)
        content = candidate.read()
        # Tables do not say how audio is encoded; images and videos are recognised by their readers.
        with tempfile.NamedTemporaryFile(suffix=".flac" if content.startswith(b"fLaC") else candidate.suffix) as file:
            file.write(content)
            file.flush()
            return _decode_file(Path(file.name))
    except FileNotFoundError as error:
        raise RowError("missing file", f"{candidate.name}: {error}") from None
    # Pillow raises SyntaxError for some broken files, and neither its bomb error nor PyAV's errors are OSErrors.
    except (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise RowError("unreadable", f"{candidate.name}: {error}") from None


def _decode_file(path: Path) -> Media:
    if path.suffix.lower() == ".flac" or (path.suffix.lower() == ".wav" and not _is_pcm16(path)):
        return _load_sound(path)
    return load_media(path)


def _is_pcm16(path: Path) -> bool:
    try:
        with wave.open(str(path), "rb") as file:
            return file.getsampwidth() == 2
    except (wave.Error, EOFError):
        return False


def _load_sound(path: Path) -> Media:
    try:
        import soundfile
    except ImportError:
        raise ValueError("FLAC, float and 24-bit audio need soundfile: pip install 'visalign[audio]'") from None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"not a readable audio file ({error})") from error
    return Media("audio", torch.from_numpy(samples.T.copy()).clamp(-1, 1), rate=float(rate))


def check_header(content: bytes, name: str, like: Media, resize: bool) -> None:
    """What can be said about an image without decoding its pixels.

    Raises:
        RowError: it is no image, or of another size while nothing is to be resized.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RowError("unreadable", f"{name}: not a readable image ({error})") from None
    if not resize and (height, width) != tuple(like.data.shape[1:]):
        raise RowError("size", f"{name} is {width} x {height}, the pipeline makes {like.data.shape[2]} x {like.data.shape[1]}")


def fit(media: Media, like: Media, resize: bool, name: str) -> Media:
    """``media`` in the size of ``like``, what the pipeline makes.

    With ``resize``: images and frames are scaled to cover the size and cropped around their centre; videos give their first
    frames; audio is resampled, mixed to the channels, cut at the end or padded with silence.

    Raises:
        RowError: another kind; another size and not ``resize``; or fewer frames than the pipeline makes.
    """
    if media.kind != like.kind:
        raise RowError("size", f"{name} is {_article(media.kind)}, the pipeline makes {like.kind}")
    same_rate = media.kind != "audio" or media.rate == like.rate
    if media.data.shape == like.data.shape and same_rate:
        return media
    if not resize:
        raise RowError("size", f"{name} is {describe_size(media)}, the pipeline makes {describe_size(like)}")
    if media.kind == "audio":
        return Media("audio", _fit_audio(media, like), rate=like.rate)
    data = media.data
    if media.kind == "video":
        if data.shape[0] < like.data.shape[0]:
            raise RowError("size", f"{name} has {data.shape[0]} frames, the pipeline makes {like.data.shape[0]}")
        data = data[:like.data.shape[0]]
    pixels = _cover(data if media.kind == "video" else data[None], like.data.shape[-2], like.data.shape[-1])
    return replace(media, data=pixels if media.kind == "video" else pixels[0])


def _cover(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (n, 3, H, W) scaled so that it just covers (height, width), then cropped around the centre."""
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = [max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale))]
    scaled = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, :, top:top + height, left:left + width].round().clamp(0, 255).to(torch.uint8)


def _fit_audio(media: Media, like: Media) -> Tensor:
    samples = media.data
    if media.rate != like.rate:
        samples = _resample(samples, float(media.rate or 0), float(like.rate or 0))
    channels, length = like.data.shape
    if samples.shape[0] != channels:
        samples = samples.mean(dim=0, keepdim=True).expand(channels, -1)
    return F.pad(samples[:, :length], (0, max(0, length - samples.shape[1]))).contiguous()


def _resample(samples: Tensor, rate: float, wanted: float) -> Tensor:
    try:
        import soxr
    except ImportError:
        raise ValueError(f"audio at {rate:g} Hz for a pipeline at {wanted:g} Hz needs soxr: pip install 'visalign[audio]'") from None
    return torch.from_numpy(soxr.resample(samples.T.numpy(), rate, wanted).T.copy()).clamp(-1, 1)


def describe_size(media: Media) -> str:
    shape = media.data.shape
    if media.kind == "audio":
        return f"{shape[0]} x {shape[1]} samples at {media.rate:g} Hz"
    frames = f"{shape[0]} frames of " if media.kind == "video" else ""
    return f"{frames}{shape[-1]} x {shape[-2]}"


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
