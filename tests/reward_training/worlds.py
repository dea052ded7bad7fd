"""Judgements with known utilities: as tensors for the loop, and as files for the way from a data set to a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.media import save_media
from visalign.reward_models.heads import Shape
from visalign.reward_training.config import OptimizationConfig
from visalign.reward_training.examples import Examples
from visalign.reward_training.features import Embeddings
from visalign.reward_training.fit import Fitting
from visalign.reward_training.objectives import BradleyTerry, Objective
from visalign.reward_training.sources import FrozenSource
from visalign.types import Media

CPU = torch.device("cpu")


def examples(scores: Tensor, media: Tensor, cluster: Tensor | None = None, gold: Tensor | None = None, ratings: Tensor | None = None,
             text: Tensor | None = None) -> Examples:
    """Judgements over rows ``media`` (n, K); every one is of a prompt of its own unless ``cluster`` says otherwise."""
    n, k = media.shape
    alone = torch.arange(n)
    return Examples(media=media, text=alone if text is None else text, cluster=alone if cluster is None else cluster,
                    scores=scores.double(), weight=torch.ones(n),
                    gold=torch.full((n, k), torch.nan, dtype=torch.float64) if gold is None else gold.double(),
                    ratings=torch.empty(n, k, 0) if ratings is None else ratings)


def fitting(media: Tensor, text: Tensor | None = None, objective: Objective | None = None, calibration: Examples | None = None, *,
            width: int = 32, depth: int = 0, blocks: Sequence[str] = ("media",), **settings: Any) -> Fitting:
    """Everything a member is trained with, on tables of embeddings (U, d) and (T, e)."""
    shape = Shape(media.shape[1], 0 if text is None else text.shape[1], tuple(blocks), width, depth)  # type: ignore[arg-type]
    source = FrozenSource(Embeddings(media, text), CPU)
    empty = examples(torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int64))
    return Fitting(shape, objective or BradleyTerry(), source, source, OptimizationConfig(**settings), None, calibration or empty)


def utilities(num: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random embeddings (num, dim) and a direction (dim,) whose inner product is their utility."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=generator), torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)


def colour(media: Sequence[Media]) -> Tensor:
    """An encoder: mean red, green and blue of an image in [0, 1]."""
    return torch.stack([one.data.float().mean(dim=(1, 2)) / 255 for one in media])


class ColourAndWords:
    """An encoder of both sides: mean colour, and which of red, green and blue a prompt names."""

    name, hash, modality = "colour and words", "0" * 64, frozenset({"image"})

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, media: Sequence[Media]) -> list[Tensor]:
        self.encoded += len(media)
        return list(colour(media).double()[:, None])

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(word in text) for word in ("red", "green", "blue")] for text in texts])


def plain(path: Path, rgb: Sequence[float]) -> str:
    """A 4 x 4 picture of one colour in [0, 1], written; its name."""
    pixels = (torch.tensor(rgb) * 255).round().to(torch.uint8)[:, None, None].expand(3, 4, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_media(Media("image", pixels.contiguous()), path).name


def colour_pairs(folder: Path, num: int = 120, num_prompts: int = 20, seed: int = 0, flipped: float = 0.0,
                 extra: Mapping[str, Any] | None = None) -> Path:
    """Pairs where more of the colour that the prompt names is better; ``ratings`` say how much, and ``gold`` is the colour itself."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k in range(num):
        which = k % num_prompts % 3
        rgb = torch.rand(2, 3, generator=generator)
        names = [plain(folder / f"{k}-{side}", rgb[side].tolist()) for side in range(2)]
        amount = rgb[:, which].tolist()
        scores = amount[::-1] if float(torch.rand((), generator=generator)) < flipped else amount
        ratings = {name: rgb[:, c].tolist() for c, name in enumerate(("red", "green", "blue"))}
        rows.append({"prompt": f"{('red', 'green', 'blue')[which]} number {k % num_prompts}", "media": names, "scores": scores,
                     "ratings": {**ratings, "gold": amount}, **(extra or {})})
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
