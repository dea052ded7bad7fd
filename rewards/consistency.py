"""Consistency of a set of images: panels of one picture among themselves, or with the images they were made from.

    raw = mean over pairs (i, j) of min(<e_i, e_j>, ceiling)         in [-1, 1]

e are unit image embeddings. A sample is cut into a grid of panels (a storyboard, a character sheet); the pairs are all pairs of panels and,
with ``sources``, each panel with each condition image of its prompt (identity in editing; a grid of 1 x 1 is the image itself).

Copies of one panel are perfectly consistent, so this reward alone is maximised by drawing the same picture in every cell. ``ceiling``
says how alike is alike enough: nothing is earned beyond it, and a reward of prompt following for every panel does the rest.
``details["closest_pair"]`` shows copies at a glance.

Source: PaCo-RL, arXiv:2512.04784 (pairs of sub-images, averaged; there judged by a vision-language model).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.media import load_media
from visalign.protocols import RewardSpec
from visalign.rewards.clip import ResizeMode, licence, model_ids, open_clip_encoder
from visalign.rewards.licences import licence_of
from visalign.types import Media, Prompt, Scores


class SetConsistency:
    """Mean similarity within a set of images. Details: ``farthest_pair`` and ``closest_pair``, the extreme similarities."""

    spec = RewardSpec(name="consistency", raw_range=(-1.0, 1.0), model_ids=("ViT-L-14", "openai"), licence=licence_of("openai"))

    def __init__(self, model: str = "ViT-L-14", pretrained: str | None = "openai", *, grid: Sequence[int] | None = None,
                 sources: bool = False, ceiling: float = 1.0, resize_mode: ResizeMode | None = "longest", batch_size: int = 64,
                 device: str | torch.device | None = None, cache_dir: str | None = None, name: str = "consistency") -> None:
        """
        Args:
            model, pretrained, batch_size, device, cache_dir: the encoder, see ``clip.open_clip_encoder``.
            grid: rows and columns every sample is cut into; ``None`` reads ``metadata["grid"]`` of each prompt.
            sources: whether the condition images of a prompt belong to the set.
            ceiling: similarity above which pairs count as equally alike, in (0, 1].
            resize_mode: "longest" sees whole panels of any shape.
        Raises:
            ValueError: a ceiling outside (0, 1], a grid that is none, or one panel and no sources: nothing to compare.
        """
        if not 0 < ceiling <= 1:
            raise ValueError(f"ceiling {ceiling} must be in (0, 1]; 1 means that copies are the best set")
        if grid is not None and _grid(grid) == (1, 1) and not sources:
            raise ValueError("grid [1, 1] without sources leaves one image and nothing to compare it with; set sources: true, or the "
                             "number of rows and columns of panels")
        self.encoder = open_clip_encoder(model, pretrained, name=name, resize_mode=resize_mode, batch_size=batch_size, device=device,
                                         cache_dir=cache_dir)
        self.grid = None if grid is None else _grid(grid)
        self.sources = sources
        self.ceiling = ceiling
        self.spec = replace(self.spec, name=name, requires=frozenset({"grid"} if grid is None else ()), raw_range=(-1.0, ceiling),
                            model_ids=model_ids(model, pretrained), licence=licence(model, pretrained),
                            version=f"{grid or 'metadata'}-{'sources' if sources else 'panels'}-{ceiling:g}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per sample; an image that its grid does not divide loses the rows and columns left over.

        Raises:
            ValueError: a prompt without a usable grid, or without condition images where ``sources`` wants some.
        """
        cut = [panels(sample.data, *self._grid_of(prompt)) for sample, prompt in zip(media, prompts, strict=True)]
        paths = list(dict.fromkeys(path for prompt in prompts for path in prompt.images)) if self.sources else []
        given = [load_media(Path(path)).data for path in paths]
        embeddings = self.encoder.images([*itertools.chain.from_iterable(cut), *given]).cpu()
        source = dict(zip(paths, embeddings[len(embeddings) - len(given):], strict=True))
        values, closest, farthest = [], [], []
        for own, prompt in zip(embeddings[:len(embeddings) - len(given)].split([len(of) for of in cut]), prompts, strict=True):
            alike = pair_similarities(own, torch.stack([source[path] for path in prompt.images]) if self.sources else own[:0])
            values.append(alike.clamp(max=self.ceiling).mean().item())
            closest.append(alike.max())
            farthest.append(alike.min())
        return Scores.from_values(values, details={"closest_pair": torch.stack(closest), "farthest_pair": torch.stack(farthest)})

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without a usable grid or without the images to be like, before anything is generated."""
        for row, prompt in enumerate(prompts):
            try:
                self._grid_of(prompt)
            except ValueError as error:
                raise ValueError(f"reward '{self.spec.name}', prompt {row}: {error}") from error

    def _grid_of(self, prompt: Prompt) -> tuple[int, int]:
        if self.sources and not prompt.images:
            raise ValueError(f"{prompt.text[:60]!r} has no condition images to be consistent with; add \"images\" to its line, or set "
                             "sources: false")
        grid = self.grid or _grid(prompt.metadata["grid"])
        if grid == (1, 1) and not self.sources:
            raise ValueError(f"{prompt.text[:60]!r} has a grid of one panel: nothing to compare; give its rows and columns")
        return grid


def panels(image: Tensor, rows: int, columns: int) -> list[Tensor]:
    """Cells of a grid in reading order, each (3, H // rows, W // columns).

    Raises:
        ValueError: fewer pixels than cells.
    """
    height, width = image.shape[-2] // rows, image.shape[-1] // columns
    if not height or not width:
        raise ValueError(f"an image of {tuple(image.shape[-2:])} has no grid of {rows} x {columns} panels")
    return [image[:, row * height:(row + 1) * height, column * width:(column + 1) * width]
            for row in range(rows) for column in range(columns)]


def pair_similarities(panels: Tensor, sources: Tensor) -> Tensor:
    """Cosines of all pairs of panels and of every panel with every source, from unit embeddings (n, d) and (k, d)."""
    i, j = torch.triu_indices(len(panels), len(panels), offset=1)
    return torch.cat([(panels[i] * panels[j]).sum(dim=-1), (panels @ sources.T).flatten()])


def _grid(value: Any) -> tuple[int, int]:
    sides = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"grid {value!r} must be the numbers of rows and columns of panels, for example [2, 2]")
    return sides[0], sides[1]
