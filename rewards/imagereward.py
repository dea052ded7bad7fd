"""ImageReward: BLIP reads image and prompt together, and a head fitted to expert rankings rates them.

    raw = (w . h + b - 0.16717) / 1.03334        typically -2.3 to 2

h is the text encoder's first token after cross-attention to the image; the head's five linear layers have no activation between them and
are folded into w and b. Differences of raw scores are log-odds between two images (``bradley_terry`` with scale 1). Only the first 35
tokens of a prompt are read.

The published package does not install beside a current transformers, so the network is transformers' own BLIP, with the checkpoint's
tensors under their new names; a tensor that is missing or left over is an error.

Source: ImageReward, arXiv:2304.05977; BLIP, arXiv:2201.12086.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor

from visalign.protocols import RewardSpec
from visalign.rewards.dual_encoder import Preprocessing, default_device
from visalign.rewards.licences import licence_of
from visalign.rewards.pretrained import pretrained
from visalign.rewards.weights import fold_linear_layers, read_tensors, weights_file
from visalign.types import Media, Prompt, Scores

logger = logging.getLogger(__name__)

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw ratings, published with the weights
NUM_TOKENS = 35
HEAD_WIDTH = 64  # of an attention head, in both towers of every BLIP
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."


WEIGHTS, TOKENIZER = "THUDM/ImageReward/ImageReward.pt", "bert-base-uncased"


class ImageReward:
    """ImageReward of images; for video wrap it in ``framewise``."""

    spec = RewardSpec(name="imagereward", requires=frozenset({"prompt"}), differentiable=True, model_ids=(WEIGHTS, TOKENIZER),
                      licence=licence_of(WEIGHTS, TOKENIZER))

    def __init__(self, weights: str = WEIGHTS, *, tokenizer: str = TOKENIZER, batch_size: int = 16,
                 device: str | torch.device | None = None, cache_dir: str | None = None, name: str = "imagereward") -> None:
        """
        Args:
            weights: a path or ORG/REPO/FILE on the hub.
            tokenizer: folder or hub id of BERT's uncased tokenizer.
            batch_size: image-prompt pairs per forward pass; does not change the scores.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
        Raises:
            ValueError: weights that are not found or not of this network, or a tokenizer that does not fit them.
        """
        from transformers import AutoTokenizer

        tensors = read_tensors(weights_file(weights, reward=name, cache_dir=cache_dir))
        self.device = default_device(device)
        self.vision, self.text = (tower.to(self.device).requires_grad_(False).eval() for tower in build_towers(tensors))
        weight, bias = fold_linear_layers(tensors, prefix="mlp.layers.")
        self.weight, self.bias = (weight / STD).to(self.device), ((bias - MEAN) / STD).to(self.device)
        # AutoTokenizer raises where the vocabulary is missing; BertTokenizer would come up empty.
        self.tokenizer = pretrained(AutoTokenizer, tokenizer, owner=f"reward '{name}'", cache_dir=cache_dir)
        vocabulary = self.text.config.vocab_size
        # The network was trained with two more tokens than the tokenizer has, which no prompt contains.
        if not vocabulary - 2 <= len(self.tokenizer) <= vocabulary:
            raise ValueError(f"reward '{name}': tokenizer {tokenizer} has {len(self.tokenizer)} tokens, the weights know {vocabulary}; "
                             "the published weights belong to bert-base-uncased")
        self.preprocessing = Preprocessing(PreprocessCfg(size=self.vision.config.image_size), name)
        self.batch_size = batch_size
        self._warned = False
        self.spec = replace(self.spec, name=name, model_ids=(weights, tokenizer), licence=licence_of(weights, tokenizer))

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One rating per image with its own prompt."""
        rows = [self._rate(torch.stack([self.preprocessing.of_image(sample.data) for sample in media[i:i + self.batch_size]]),
                           prompts[i:i + self.batch_size]) for i in range(0, len(media), self.batch_size)]
        return Scores.from_values(torch.cat(rows).tolist())

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Ratings with gradients to the pixels, float32 (B,), of images (B, 3, H, W) in [0, 1]."""
        return self._rate(self.preprocessing.of_pixels(media), prompts)

    def _rate(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        self._warn_truncation(texts)
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=NUM_TOKENS, return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            image = self.vision(pixel_values=pixels.to(self.device)).last_hidden_state
            hidden = self.text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image,
                               encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=self.device),
                               is_decoder=False).last_hidden_state[:, 0]
            return (hidden.double() @ self.weight + self.bias).float()

    def _warn_truncation(self, texts: Sequence[str]) -> None:
        """Most of a long prompt is never read; say so once."""
        num_cut = 0 if self._warned else sum(len(ids) > NUM_TOKENS for ids in self.tokenizer(list(texts)).input_ids)
        if num_cut:
            self._warned = True
            logger.warning("%s: %d of %d prompts exceed %d tokens; what comes after is ignored", self.spec.name, num_cut, len(texts),
                           NUM_TOKENS)


def build_towers(tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """transformers' BLIP image and text encoder with the checkpoint's tensors; every size is read from them.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = {vision_name(key.removeprefix(VISION)): tensor for key, tensor in tensors.items() if key.startswith(VISION)}
    text = {key.removeprefix(TEXT): tensor for key, tensor in tensors.items() if key.startswith(TEXT) and not key.endswith("position_ids")}
    try:
        width, _, _, patch = vision["embeddings.patch_embedding.weight"].shape
        side = patch * math.isqrt(vision["embeddings.position_embedding"].shape[1] - 1)
        vocabulary, text_width = text["embeddings.word_embeddings.weight"].shape
        vision_config = BlipVisionConfig(
            hidden_size=width, intermediate_size=len(vision["encoder.layers.0.mlp.fc1.bias"]), num_hidden_layers=_depth(vision),
            num_attention_heads=width // HEAD_WIDTH, image_size=side, patch_size=patch, layer_norm_eps=1e-6, hidden_act="gelu")
        text_config = BlipTextConfig(
            vocab_size=vocabulary, hidden_size=text_width, intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=_depth(text), num_attention_heads=text_width // HEAD_WIDTH,
            encoder_hidden_size=text["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]), layer_norm_eps=1e-12, hidden_act="gelu",
            bos_token_id=None, eos_token_id=None, sep_token_id=None, pad_token_id=0)
    except KeyError as error:
        raise ValueError(f"no ImageReward checkpoint: it has no {error.args[0]} under {VISION} or {TEXT}; its tensors are "
                         f"{', '.join(sorted(tensors)[:4])}, ...") from error
    towers = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    for tower, state in zip(towers, (vision, text), strict=True):
        try:
            tower.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise ValueError(f"no ImageReward checkpoint: {error}") from error
    return towers


def vision_name(name: str) -> str:
    """transformers' name of a tensor of BLIP's vision transformer."""
    for pattern, replacement in (
            (r"^cls_token$", "embeddings.class_embedding"), (r"^pos_embed$", "embeddings.position_embedding"),
            (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^norm\.", "post_layernorm."), (r"^blocks\.", "encoder.layers."),
            (r"\.attn\.qkv\.", ".self_attn.qkv."), (r"\.attn\.proj\.", ".self_attn.projection."), (r"\.norm([12])\.", r".layer_norm\1.")):
        name = re.sub(pattern, replacement, name)
    return name


def _depth(tensors: Mapping[str, Tensor]) -> int:
    """Number of numbered layers."""
    return 1 + max(int(match[1]) for name in tensors if (match := re.match(r"encoder\.layers?\.(\d+)\.", name)))
