"""LAION aesthetic predictor v2: how much people would like an image, whatever was asked for.

    raw = w . image / |image| + b        nominally 1 to 10, typically 4.5 to 7

The published head is five linear layers (768, 1024, 128, 64, 16, 1) with dropout between them and no activation, so at scoring time it is
one affine map of CLIP ViT-L/14's embedding; it is folded once, in float64. The reward never reads the prompt: alone, it is maximised by
saturated colours and one house style, so train it beside a prompt-image reward or under a KL term.

Source: LAION-Aesthetics V2, github.com/christophschuhmann/improved-aesthetic-predictor; LAION-5B, arXiv:2210.08402.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visalign.protocols import RewardSpec
from visalign.rewards.clip import ResizeMode, model_ids, open_clip_encoder
from visalign.rewards.licences import licence_of
from visalign.rewards.weights import fold_linear_layers, read_tensors, weights_file
from visalign.types import Media, Prompt, Scores


class AestheticScore:
    """Aesthetic rating of images; for video wrap it in ``framewise``."""

    spec = RewardSpec(name="aesthetic", differentiable=True, model_ids=("ViT-L-14", "openai", "sac+logos+ava1-l14-linearMSE.pth"),
                      licence=licence_of("openai", "sac+logos+ava1-l14-linearMSE.pth"))

    def __init__(self, head: str, *, model: str = "ViT-L-14", pretrained: str | None = "openai", resize_mode: ResizeMode | None = None,
                 batch_size: int = 64, device: str | torch.device | None = None, cache_dir: str | None = None,
                 name: str = "aesthetic") -> None:
        """
        Args:
            head: the linear layers: path of ``sac+logos+ava1-l14-linearMSE.pth`` (or a safetensors copy), or ORG/REPO/FILE on the hub.
            model, pretrained, resize_mode, batch_size, device, cache_dir: the encoder, see ``clip.open_clip_encoder``; the published
                head belongs to OpenAI's ViT-L-14.
        Raises:
            ValueError: the head is not found, is no chain of linear layers, or reads embeddings of another length.
        """
        weight, bias = fold_linear_layers(read_tensors(weights_file(head, reward=name, cache_dir=cache_dir)))
        self.encoder = open_clip_encoder(model, pretrained, name=name, resize_mode=resize_mode, batch_size=batch_size, device=device,
                                         cache_dir=cache_dir)
        dims = self.encoder.texts(["x"]).shape[1]
        if len(weight) != dims:
            raise ValueError(f"reward '{name}': the head reads embeddings of length {len(weight)}, {model} gives {dims}; the published "
                             "head belongs to model ViT-L-14 with pretrained openai")
        self.weight, self.bias = weight.to(self.encoder.device), bias.to(self.encoder.device)
        ids = model_ids(model, pretrained)
        self.spec = replace(self.spec, name=name, model_ids=(*ids, head), licence=licence_of(ids[-1], head))

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One rating per image."""
        rating = self._rate(self.encoder.images([sample.data for sample in media]))
        return Scores.from_values(rating.tolist())

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Ratings with gradients to the pixels, float32 (B,), of images (B, 3, H, W) in [0, 1]."""
        return self._rate(self.encoder.pixels(media))

    def _rate(self, embeddings: Tensor) -> Tensor:
        return (embeddings.double() @ self.weight + self.bias).float()
