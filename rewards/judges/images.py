"""Samples as PNG files for a question. PNG, because a lossy format changes what is judged."""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from visalign.types import Media


def files(media: Media, num_frames: int, max_side: int | None) -> tuple[bytes, ...]:
    """PNG files of a sample: the image, or evenly spaced frames of a video, the first and the last among them.

    Args:
        num_frames: of a video; shorter ones give all their frames.
        max_side: larger frames are reduced to this many pixels on their longer side, aspect kept; ``None`` leaves them.
    """
    if media.kind == "image":
        return (png(media.data, max_side),)
    length = media.data.shape[0]
    rows = torch.linspace(0, length - 1, min(num_frames, length)).round().long()
    return tuple(png(media.data[int(row)], max_side) for row in rows)


def png(pixels: Tensor, max_side: int | None = None) -> bytes:
    """One uint8 (3, H, W) picture as a PNG file, the same bytes for the same pixels."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    if max_side is not None:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
