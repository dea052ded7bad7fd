"""Samples as other projects take them: PIL images, evenly spaced frames, and mp4 files that lose nothing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from visalign.types import Media


def pil(image: Tensor) -> Image.Image:
    """One picture, uint8 (3, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def frames(video: Media, most: int) -> list[Image.Image]:
    """All frames of a short video, ``most`` evenly spaced ones of a longer, as ``linspace(0, T - 1)`` rounded down; an image is one."""
    if video.kind == "image":
        return [pil(video.data)]
    count = len(video.data)
    rows = range(count) if count <= most else [k * (count - 1) // (most - 1) if most > 1 else 0 for k in range(most)]
    return [pil(video.data[row]) for row in rows]


def lossless_mp4(video: Media, path: Path) -> None:
    """H.264 in RGB at quantiser 0: for projects that take nothing but files, the pixels they decode are those that were sampled.

    Raises:
        ValueError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise ValueError("videos become files through PyAV: pip install av") from None
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264rgb", rate=Fraction(video.rate or 8.0).limit_denominator(1001))
        pixels = video.data.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        stream.height, stream.width, stream.pix_fmt, stream.options = pixels.shape[1], pixels.shape[2], "rgb24", {"qp": "0"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
