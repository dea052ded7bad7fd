"""HPS v2.1: a CLIP ViT-H/14 fine-tuned on 798,000 human choices between generated images.

    raw = <image / |image|, text / |text|>      in [-1, 1], typically 0.20 to 0.35; no logit scale

The whole image is seen: its longest side is resized to 224 (small images are enlarged), the rest is padded with black. Everything is
float32: half precision moves the cosine by 1e-3, as much as siblings of one prompt differ. As log-odds between two images the scores need
a factor of about 100: ``{reward: bradley_terry, pointwise: {reward: hps}, scale: 100}``.

Source: Human Preference Score v2, arXiv:2306.09341.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visalign.protocols import RewardSpec
from visalign.rewards.clip import ResizeMode, open_clip_encoder
from visalign.rewards.licences import licence_of
from visalign.rewards.weights import weights_file
from visalign.types import Media, Prompt, Scores

WEIGHTS = "xswu/HPSv2/HPS_v2.1_compressed.pt"


class HumanPreferenceScore:
    """HPS v2 of images, from its published state dict in open_clip's own architecture; for video wrap it in ``framewise``."""

    spec = RewardSpec(name="hps", requires=frozenset({"prompt"}), differentiable=True, raw_range=(-1.0, 1.0),
                      model_ids=("ViT-H-14", WEIGHTS), licence=licence_of(WEIGHTS))

    def __init__(self, weights: str = WEIGHTS, *, model: str = "ViT-H-14", resize_mode: ResizeMode = "longest",
                 batch_size: int = 64, device: str | torch.device | None = None, cache_dir: str | None = None, name: str = "hps") -> None:
        """
        Args:
            weights: a path or ORG/REPO/FILE on the hub; version 2.0 is xswu/HPSv2/HPS_v2_compressed.pt.
            model, resize_mode, batch_size, device, cache_dir: see ``clip.open_clip_encoder``; "longest" is what the weights were
                trained with.
        Raises:
            ValueError: no such file.
            RuntimeError: its tensors are not the architecture's.
        """
        path = weights_file(weights, reward=name, cache_dir=cache_dir)
        self.encoder = open_clip_encoder(model, str(path), name=name, resize_mode=resize_mode, batch_size=batch_size, device=device,
                                         cache_dir=cache_dir)
        self.spec = replace(self.spec, name=name, model_ids=(model, weights), licence=licence_of(weights), version=resize_mode)

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Cosine of each image with its own prompt; each distinct prompt is encoded once."""
        return Scores.from_values(self.encoder.cosines([sample.data for sample in media], prompts).tolist())

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Cosines with gradients to the pixels, float32 (B,), of images (B, 3, H, W) in [0, 1]."""
        return self.encoder.cosines_of_pixels(media, prompts)
