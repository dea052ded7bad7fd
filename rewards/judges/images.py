"""Samples as PNG files for a question. PNG, because a lossy format changes what is judged."""

from __future__ import annotations

from io import BytesIO

from PIL import Image
from torch import Tensor

from visalign.media import evenly_spaced
from visalign.types import Media


def files(media: Media, num_frames: int, max_side: int | None) -> tuple[bytes, ...]:
    """PNG files of a sample: the image, or evenly spaced frames of a video, the first and the last among them.

    Args:
        num_frames: of a video; shorter ones give all their frames.
        max_side: larger frames are reduced to this many pixels on their longer side, aspect kept; ``None`` leaves them.
    """
    if media.kind == "image":
        return (png(media.data, max_side),)
    return tuple(png(frame, max_side) for frame in media.data[evenly_spaced(len(media.data), num_frames)])


def picture_of(pixels: Tensor) -> Image.Image:
    """One uint8 (3, H, W) picture for PIL."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def png(pixels: Tensor, max_side: int | None = None) -> bytes:
    """One uint8 (3, H, W) picture as a PNG file, the same bytes for the same pixels."""
    picture = picture_of(pixels)
    if max_side is not None:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
