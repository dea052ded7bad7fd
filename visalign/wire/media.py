"""One sample as an array and back, bit for bit.

Pictures travel as PNG files, sound as FLAC where that is exact (every sample a multiple of 2^-15, as 16-bit files are; what a model
generates is not) and everything else raw: uint8 video, float32 sound, meshes and latents.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visalign.types import Media
from visalign.wire.body import Array, TooLargeError, WireError
from visalign.wire.schema import Encoding, MediaPart

FULL_SCALE = 32768  # of 16-bit sound


def encodings() -> tuple[Encoding, ...]:
    """What this process can read."""
    try:
        import soundfile  # noqa: F401
    except ImportError:
        return "raw", "png"
    return "raw", "png", "flac"


def size_of(media: Media) -> int:
    """Bytes of a sample that is not encoded."""
    tensors = [one for one in (media.data, media.faces, media.prompt_embeds) if one is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encode(media: Media, name: str, allowed: Collection[str]) -> tuple[MediaPart, dict[str, Array]]:
    """What to write about a sample, and its arrays, under ``name`` and names that begin with it."""
    encoding: Encoding = "raw"
    data = _array(media.data)
    if media.kind == "image" and "png" in allowed:
        encoding, data = "png", _png(data)
    elif media.kind == "audio" and "flac" in allowed and "flac" in encodings() and (file := _flac(media)) is not None:
        encoding, data = "flac", file
    arrays = {name: data}
    if media.faces is not None:
        arrays[f"{name}.faces"] = _array(media.faces)
    if media.prompt_embeds is not None:
        arrays[f"{name}.prompt_embeds"] = _array(media.prompt_embeds)
    return MediaPart(kind=media.kind, encoding=encoding, rate=media.rate, convention=media.convention), arrays


def decode(part: MediaPart, name: str, arrays: Mapping[str, Array], most: int) -> Media:
    """The sample, of at most ``most`` bytes.

    Raises:
        TooLargeError: decoded it would be larger; found before it is decoded.
        WireError: an array is missing or is not the file it should be.
    """
    if name not in arrays:
        raise WireError(f"the head speaks of an array '{name}', which the body lacks")
    read = {"raw": _tensor, "png": lambda array: _read_png(array, name, most), "flac": lambda array: _read_flac(array, name, most)}
    faces, embeds = (arrays.get(f"{name}.{what}") for what in ("faces", "prompt_embeds"))
    return Media(part.kind, read[part.encoding](arrays[name]), rate=part.rate, faces=None if faces is None else _tensor(faces),
                 convention=part.convention, prompt_embeds=None if embeds is None else _tensor(embeds))


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array.copy())


def _png(image: Array) -> Array:
    buffer = io.BytesIO()
    # Level 1: a third of the time of level 6, for files of the same size within a few percent.
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, format="PNG", compress_level=1)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def _read_png(array: Array, name: str, most: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(array.tobytes()), formats=["PNG"]) as file:
            _check_size(3 * file.width * file.height, name, most)
            if file.mode != "RGB":
                raise WireError(f"'{name}' is a PNG file of mode {file.mode}; expected 8-bit RGB")
            return torch.from_numpy(np.array(file)).permute(2, 0, 1).contiguous()
    except WireError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WireError(f"'{name}' is no readable PNG file: {error}") from error


def _flac(media: Media) -> Array | None:
    """The samples as a 16-bit FLAC file, or ``None`` where that would change them."""
    import soundfile

    scaled = media.data.detach().cpu().double() * FULL_SCALE
    whole = scaled.round().clamp(-FULL_SCALE, FULL_SCALE - 1)
    if not media.rate or media.rate != int(media.rate) or not torch.equal(whole, scaled) or len(scaled) > 8 or 0 in scaled.shape:
        return None
    buffer = io.BytesIO()
    soundfile.write(buffer, whole.to(torch.int16).T.contiguous().numpy(), int(media.rate), format="FLAC", subtype="PCM_16")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def _read_flac(array: Array, name: str, most: int) -> Tensor:
    try:
        import soundfile
    except ImportError:
        raise WireError(f"'{name}' is a FLAC file, which this server cannot read; send it raw") from None
    try:
        with soundfile.SoundFile(io.BytesIO(array.tobytes())) as file:
            _check_size(4 * file.frames * file.channels, name, most)
            return torch.from_numpy(file.read(dtype="float32", always_2d=True)).T.contiguous()
    except soundfile.SoundFileError as error:
        raise WireError(f"'{name}' is no readable FLAC file: {error}") from error


def _check_size(size: int, name: str, most: int) -> None:
    if size > most:
        raise TooLargeError(f"'{name}' is {size} bytes once decoded, and {most} are left of what one request may hold")
