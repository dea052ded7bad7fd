"""PickScore: a CLIP ViT-H/14 fine-tuned on the Pick-a-Pic users' choices between two images for their prompt.

    raw = s <image / |image|, text / |text|>,   s = exp(logit_scale), about 100        typically 17 to 24

Differences of raw scores are log-odds, ``P(i beats j) = sigmoid(raw_i - raw_j)``, so ``bradley_terry`` takes it with scale 1.
Other code reports raw / 26 (about 0.85) or the cosine (about 0.22, here under ``details["cosine"]``): the same ranking on another scale,
and not log-odds any more.

Source: Pick-a-Pic, arXiv:2305.01569.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from visalign.protocols import RewardSpec
from visalign.rewards.dual_encoder import DualEncoder
from visalign.rewards.licences import licence_of
from visalign.rewards.pretrained import pretrained, pretrained_model
from visalign.types import Media, Prompt, Scores

MODEL, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """PickScore of images; for video wrap it in ``framewise``."""

    spec = RewardSpec(name="pickscore", requires=frozenset({"prompt"}), differentiable=True, raw_range=(-100.0, 100.0),
                      model_ids=(MODEL, PROCESSOR), licence=licence_of(MODEL, PROCESSOR))

    def __init__(self, model: str = MODEL, *, processor: str = PROCESSOR,
                 batch_size: int = 64, device: str | torch.device | None = None, cache_dir: str | None = None,
                 name: str = "pickscore") -> None:
        """
        Args:
            model: folder or hub id of a transformers ``CLIPModel``.
            processor: folder or hub id of its tokenizer and image preprocessing, which the published weights come without.
            batch_size: images per forward pass; does not change the scores.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
        Raises:
            ValueError: no such folder and the hub out of reach, an incomplete checkpoint, an empty tokenizer, or preprocessing other than
                resize of the shortest side, centre crop, normalise.
        """
        from transformers import AutoTokenizer, CLIPModel

        owner = f"reward '{name}'"
        clip = pretrained_model(CLIPModel, model, owner=owner, cache_dir=cache_dir)
        # AutoTokenizer raises where the vocabulary is missing; CLIPTokenizer would come up empty.
        tokenizer = pretrained(AutoTokenizer, processor, owner=owner, cache_dir=cache_dir)
        limit = int(clip.config.text_config.max_position_embeddings)
        self.encoder = DualEncoder(_Towers(clip), _Tokenizer(tokenizer, limit), _preprocessing(processor, owner, cache_dir), name=name,
                                   batch_size=batch_size, device=device)
        self.scale = float(clip.logit_scale.detach().double().exp())
        self.spec = replace(self.spec, name=name, raw_range=(-self.scale, self.scale), model_ids=(model, processor),
                            licence=licence_of(model, processor))

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Scaled cosine of each image with its own prompt; each distinct prompt is encoded once."""
        cosine = self.encoder.cosines([sample.data for sample in media], prompts)
        return Scores.from_values((self.scale * cosine).tolist(), details={"cosine": cosine})

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Raw scores with gradients to the pixels, float32 (B,), of images (B, 3, H, W) in [0, 1]."""
        return self.scale * self.encoder.cosines_of_pixels(media, prompts)


class _Towers(nn.Module):
    """The two towers of a transformers ``CLIPModel`` up to their projections: the same in transformers 4 and 5."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)

    def encode_text(self, tokens: Tensor) -> Tensor:
        # Attention is causal and the text's last token is pooled, so what pads it is never seen.
        return self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output)


class _Tokenizer:
    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer, self.context_length, self.vocab_size = tokenizer, context_length, len(tokenizer)

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        return self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=context_length or self.context_length,
                              return_tensors="pt").input_ids


def _preprocessing(processor: str, owner: str, cache_dir: str | None) -> PreprocessCfg:
    """The image steps of a transformers CLIP processor, as PIL takes them."""
    from transformers import AutoImageProcessor

    found = pretrained(AutoImageProcessor, processor, owner=owner, cache_dir=cache_dir)
    size, crop = dict(found.size), dict(found.crop_size or {})
    side: Any = size.get("shortest_edge")
    usual = (found.do_resize and found.do_center_crop and found.do_rescale and found.do_normalize and side is not None
             and crop == {"height": side, "width": side} and int(found.resample) == 3)
    if not usual:
        where = Path(processor) / "preprocessor_config.json"
        raise ValueError(f"{where}: size {size}, crop {crop}, resample {found.resample}; expected a CLIP processor: bicubic resize of "
                         "the shortest edge, centre crop to the same side, rescale, normalise")
    return PreprocessCfg(size=int(side), mean=tuple(found.image_mean), std=tuple(found.image_std))
