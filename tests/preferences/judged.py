"""Pictures, judgements and an exact encoder for the tests of preference data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.types import Media

SIZE = 8


class Encoder(GaussianPolicy):
    """The Gaussian policy on images (3, 8, 8) or sounds (2, 8), with the exact inverse of its decoding; counts what it encodes."""

    def __init__(self, media: str = "image") -> None:
        shape = (3, SIZE, SIZE) if media == "image" else (2, SIZE)
        super().__init__(GaussianWorld(mean=torch.zeros(shape), var=0.04), flow_schedule(dance_sigmas(4, 3.0)), media=media)
        self.num_encoded = 0

    def encode_media(self, media: Sequence[Media]) -> Tensor:
        self.num_encoded += len(media)
        stacked = torch.stack([one.data for one in media]).float()
        return stacked / 127.5 - 1 if media[0].kind == "image" else stacked


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """A random picture of (width, height), written; its pixels (H, W, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def encoded(pixels: np.ndarray) -> Tensor:
    """The latent of a picture."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(folder: Path, num: int = 3) -> Path:
    """``num`` pairs of pictures 2k and 2k + 1, the first of which is better."""
    for k in range(2 * num):
        picture(folder / f"{k}.png", seed=k)
    return write(folder / "data.jsonl", [{"prompt": f"prompt {k}", "chosen": f"{2 * k}.png", "rejected": f"{2 * k + 1}.png"}
                                         for k in range(num)])
