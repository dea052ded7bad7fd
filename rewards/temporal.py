"""Temporal consistency: how alike the embeddings of neighbouring frames are.

    raw = 1/(T-1) sum_t <e_t, e_{t-1}>                           anchor = 0
    raw = 1/(T-1) sum_t (1 - a) <e_t, e_{t-1}> + a <e_t, e_0>    anchor = a; VBench's background consistency has a = 1/2

e_t is the unit image embedding of frame t. In [-1, 1], typically 0.85 to 1. A frozen video scores exactly 1: alone, this reward stops all
motion; train it beside ``flow_smoothness``, whose dynamics factor is 0 there. The first frame as anchor also sees a slow drift, which
neighbours do not, and punishes every camera that moves on.

Source: VBench, arXiv:2311.17982 (background consistency, there with CLIP ViT-B/32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visalign.media import evenly_spaced
from visalign.protocols import RewardSpec
from visalign.rewards.clip import ResizeMode, licence, model_ids, open_clip_encoder
from visalign.rewards.licences import licence_of
from visalign.types import Media, Prompt, Scores


class TemporalConsistency:
    """Mean cosine of consecutive frames. Details: ``worst_step``, the least cosine of two neighbours (a cut or a flash)."""

    spec = RewardSpec(name="temporal_consistency", modality=frozenset({"video"}), differentiable=True, raw_range=(-1.0, 1.0),
                      model_ids=("ViT-B-32", "openai"), licence=licence_of("openai"))

    def __init__(self, model: str = "ViT-B-32", pretrained: str | None = "openai", *, anchor: float = 0.0, max_frames: int | None = None,
                 resize_mode: ResizeMode | None = None, batch_size: int = 64, device: str | torch.device | None = None,
                 cache_dir: str | None = None, name: str = "temporal_consistency") -> None:
        """
        Args:
            model, pretrained, resize_mode, batch_size, device, cache_dir: the encoder, see ``clip.open_clip_encoder``.
            anchor: weight of the first frame as the one to resemble, in [0, 1].
            max_frames: look at this many evenly spaced frames; ``None`` at all. Scores of different spacing are not comparable.
        Raises:
            ValueError: anchor outside [0, 1], or fewer than 2 frames.
        """
        if not 0 <= anchor <= 1:
            raise ValueError(f"anchor {anchor} must be in [0, 1]: 0 compares neighbours, 0.5 is VBench's, 1 the first frame alone")
        if max_frames is not None and max_frames < 2:
            raise ValueError(f"max_frames {max_frames} leaves no two frames to compare; use at least 2, or leave it out for all")
        self.encoder = open_clip_encoder(model, pretrained, name=name, resize_mode=resize_mode, batch_size=batch_size, device=device,
                                         cache_dir=cache_dir)
        self.anchor = anchor
        self.max_frames = max_frames
        self.spec = replace(self.spec, name=name, model_ids=model_ids(model, pretrained), licence=licence(model, pretrained),
                            version=f"anchor-{anchor:g}-frames-{max_frames or 'all'}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per video; a video of one frame is invalid ("fewer than 2 frames")."""
        values: list[float | None] = []
        worst = []
        for sample in media:
            steps, value = self._judge(self.encoder.images(list(self._select(sample.data)))) if len(sample.data) > 1 else (None, None)
            values.append(None if value is None else value.item())
            worst.append(torch.tensor(torch.nan) if steps is None else steps.min().cpu())
        return Scores.from_values(values, reason="fewer than 2 frames", details={"worst_step": torch.stack(worst)})

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Raw scores with gradients to the pixels, float32 (B,), of video (B, frames, 3, H, W) in [0, 1].

        Raises:
            ValueError: another shape, or a single frame.
        """
        if media.dim() != 5 or media.shape[1] < 2:
            raise ValueError(f"{self.spec.name}: media are {tuple(media.shape)}; expected video (B, frames, 3, H, W) of at least 2 frames")
        return torch.stack([self._judge(self.encoder.pixels(self._select(video)))[1] for video in media])

    def _select(self, frames: Tensor) -> Tensor:
        return frames if self.max_frames is None else frames[evenly_spaced(len(frames), self.max_frames)]

    def _judge(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of neighbours (T - 1,), and the score (), of unit embeddings (T, d)."""
        neighbours = (embeddings[1:] * embeddings[:-1]).sum(dim=-1)
        first = embeddings[1:] @ embeddings[0]
        return neighbours, ((1 - self.anchor) * neighbours + self.anchor * first).mean()
