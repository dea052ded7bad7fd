"""JPEG compressibility and incompressibility: the size of the encoded image as a reward.

No model, no prompt, deterministic: the reward of choice for a first run. Source: DDPO, arXiv:2305.13301, section 5.1.
Public code differs in scale only (kB, kB / 500), which no group-normalised advantage can see.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from PIL import Image
from torch import Tensor

from visalign.protocols import RewardSpec
from visalign.types import Media, Prompt, Scores


def jpeg_bytes(image: Tensor, quality: int = 95) -> int:
    """Length of the JPEG file of one image, uint8 (3, H, W) RGB, with PIL's default 4:2:0 chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


class _JpegSize:
    """Raw score: kB (1000 bytes) per frame, or bytes per pixel with ``per_pixel=True``; a video is the mean over its frames."""

    spec: RewardSpec

    def __init__(self, quality: int = 95, per_pixel: bool = False) -> None:
        """
        Args:
            quality: JPEG quality, 1 to 95 (above 95 PIL disables part of the compression).
            per_pixel: divide by the number of pixels, needed when samples of one group differ in resolution.
        """
        if not 1 <= quality <= 95:
            raise ValueError(f"quality {quality} is outside 1..95; published results use 95")
        self.quality = quality
        self.per_pixel = per_pixel
        self.spec = replace(self.spec, version=f"q{quality}" + ("-per-pixel" if per_pixel else ""))

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Sizes of all samples.

        Raises:
            ValueError: two samples of one group differ in resolution and ``per_pixel`` is off.
        """
        if not self.per_pixel:
            self._check_resolutions(media, group_id)
        return Scores.from_values([self._size(sample.data) for sample in media], direction=self.spec.direction)

    def _size(self, data: Tensor) -> float:
        frames = data if data.dim() == 4 else data[None]
        num_bytes = sum(jpeg_bytes(frame, self.quality) for frame in frames) / len(frames)
        return num_bytes / frames[0, 0].numel() if self.per_pixel else num_bytes / 1000

    def _check_resolutions(self, media: Sequence[Media], group_id: Sequence[int]) -> None:
        first: dict[int, tuple[int, ...]] = {}
        for row, (sample, group) in enumerate(zip(media, group_id, strict=True)):
            size = tuple(sample.data.shape[-2:])
            if first.setdefault(group, size) != size:
                raise ValueError(f"{self.spec.name}: sample {row} of group {group} is {size[0]}x{size[1]}, its group's first is "
                                 f"{first[group][0]}x{first[group][1]}: file sizes are not comparable; set per_pixel=True")


def _spec(name: str, direction: Literal[1, -1]) -> RewardSpec:
    return RewardSpec(name=name, modality=frozenset({"image", "video"}), direction=direction, raw_range=(0.0, float("inf")))


class JpegCompressibility(_JpegSize):
    """Rewards small files: images become flat."""

    spec = _spec("jpeg_compressibility", -1)


class JpegIncompressibility(_JpegSize):
    """Rewards large files: images fill with texture."""

    spec = _spec("jpeg_incompressibility", 1)
