"""The playground's architectures: autoencoder, tokenizers, text encoders and transformer, all tiny, all standard classes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from visalign.playground import world

LATENT_CHANNELS = 4
TEXT_WIDTH = 64
NUM_TEXT_TOKENS = 12
WORDS = ("a", "and", "two", "three", "above", "below", "left", "right", "of", *world.COLOURS, *world.SIZES, *world.SHAPES)
WORDS += tuple(f"{shape}s" for shape in world.SHAPES)
CLIP_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
        "text_cfg": {
            "context_length": NUM_TEXT_TOKENS,
            "vocab_size": 132,
            "width": 64,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "playground",
        },
    },
    "preprocess_cfg": {"mean": [0.2, 0.2, 0.2], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "resize_mode": "squash"},
}


def new_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(24, 24),
        decoder_block_out_channels=(24, 24),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
        latent_channels=LATENT_CHANNELS,
    )


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary in which every word of the grammar is one token (letters stay available for any other word).

    Merges are found by re-encoding each word with the merges so far, because a merge made for one word also fires in the next.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            pieces = _apply_merge(pieces, pair)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges.append(pair)
            tokens.append("".join(pair))
            pieces = _apply_merge(pieces, pair)
    return {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def _apply_merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def new_tokenizer() -> CLIPTokenizer:
    """The CLIP tokenizer of the pipeline: 12 tokens hold the longest caption and its two markers."""
    vocabulary, merges = build_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=NUM_TEXT_TOKENS)
    assert len(tokenizer) == len(vocabulary), (len(tokenizer), len(vocabulary))
    longest = "a purple triangle right of a yellow square"
    assert len(tokenizer(longest).input_ids) == len(longest.split()) + 2, tokenizer.tokenize(longest)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=NUM_TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def new_silent_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A third encoder that always says zero: what the pipeline uses in its place when there is none.

    ``from_pretrained`` insists on a T5, so one is shipped whose last layer norm has weight 0; its output is exactly 0 for any text.
    """
    words = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in WORDS)]
    tokenizer = T5TokenizerFast(vocab=[(word, 0.0) for word in words], extra_ids=0)
    width = 2 * TEXT_WIDTH
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def new_transformer() -> SD3Transformer2DModel:
    """SD3 transformer on 16x16 latents (64 image tokens), adaLN and output zero-initialised as in DiT (arXiv:2212.09748)."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=64,
        caption_projection_dim=128,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".norm1" in name or name in ("norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


class CountedNullTokens:
    """Joint attention in which the last text token stands for ``count`` identical ones (a bias of log(count) on its key).

    The pipeline appends ``max_sequence_length`` zero vectors for its silent third encoder. They have no position, so they stay
    identical through all layers; training with random counts makes the model indifferent to their number at the cost of one token.
    """

    def __init__(self) -> None:
        self.bias = torch.zeros(())

    def set_count(self, count: int) -> None:
        self.bias.fill_(math.log(count) if count else -30.0)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        num_image = hidden_states.shape[1]

        def heads(image: Tensor, text: Tensor, norm_image: Any, norm_text: Any) -> Tensor:
            parts = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (image, text)]
            norms = (norm_image, norm_text)
            return torch.cat([norm(x) if norm is not None else x for norm, x in zip(norms, parts, strict=True)], dim=2)

        query = heads(attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states), attn.norm_q, attn.norm_added_q)
        key = heads(attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states), attn.norm_k, attn.norm_added_k)
        value = heads(attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states), None, None)
        mask = F.pad(self.bias.view(1, 1, 1, 1).to(query.dtype), (key.shape[2] - 1, 0))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        image, text = out[:, :num_image], out[:, num_image:]
        return attn.to_out[0](image), (text if attn.context_pre_only else attn.to_add_out(text))


class FlowModels(nn.Module):
    """The trained parts of the pipeline: two text encoders and the transformer."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(tokenizer)
        self.text_encoder_2 = new_text_encoder(tokenizer)
        self.transformer = new_transformer()

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Velocity, shape (B, 4, 16, 16), as the pipeline computes it: penultimate text states, pooled embeddings, null tokens."""
        encoded = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = F.pad(torch.cat([out.hidden_states[-2] for out in encoded], dim=-1), (0, 0, 0, 1))
        pooled = torch.cat([out.text_embeds for out in encoded], dim=-1)
        return self.transformer(noisy, tokens, pooled, sigma * 1000, return_dict=False)[0]
