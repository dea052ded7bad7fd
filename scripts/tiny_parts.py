"""Tiny random parts that many pipelines share: tokenizers built in memory, text encoders, image encoders and autoencoders.

Nothing is downloaded and nothing is trained. Sizes are the smallest that a family's own code accepts; every part is a real module of
diffusers or transformers with a small configuration.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers as df
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

HIDDEN = 32
_CHARACTERS = [chr(code) for code in range(33, 127)]
_CHAT_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] if 'text' in part else '<|image_pad|>' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def clip_tokenizer() -> Any:
    """One token per character, CLIP's own class and special tokens."""
    names = [*_CHARACTERS, *(c + "</w>" for c in _CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({name: i for i, name in enumerate(names)}))
        merges.write_text("#version: 0.2\n")
        tokenizer = tf.CLIPTokenizer(str(vocab), str(merges), model_max_length=77)
    assert len(tokenizer) == len(names)
    return tokenizer


def t5_tokenizer(max_length: int = 512) -> Any:
    """A Unigram model over characters that closes every text with ``</s>``."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in ["▁", *_CHARACTERS])]
    core = Tokenizer(models.Unigram(pieces, unk_id=2))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length)


def chat_tokenizer(padding_side: str = "right") -> Any:
    """A byte-level BPE without merges, with Qwen's special tokens and a chat template."""
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(_CHAT_MARKS))
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>", bos_token="<|endoftext|>", model_max_length=2048,
        padding_side=padding_side, chat_template=_CHAT_TEMPLATE)


class _PositionedTokenizer(tf.PreTrainedTokenizerFast):
    """Adds ``position_ids``, as the tokenizer of ChatGLM does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoded = super().__call__(*args, **kwargs)
        encoded["position_ids"] = torch.arange(encoded["input_ids"].shape[1]).expand_as(encoded["input_ids"])
        return encoded


def positioned_tokenizer() -> Any:
    return _PositionedTokenizer(tokenizer_object=chat_tokenizer().backend_tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>",
                                model_max_length=2048)


def clip_text(projection: bool = False, hidden: int = HIDDEN, projection_dim: int = HIDDEN) -> Any:
    tokenizer = clip_tokenizer()
    config = tf.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=77, projection_dim=projection_dim, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return tf.CLIPTextModelWithProjection(config) if projection else tf.CLIPTextModel(config)


def clip_vision(image_size: int = 32) -> Any:
    return tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, image_size=image_size,
        patch_size=image_size // 4, projection_dim=HIDDEN))


def clip_image_processor() -> Any:
    return tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def t5_text(d_model: int = HIDDEN) -> Any:
    return tf.T5EncoderModel(tf.T5Config(vocab_size=len(t5_tokenizer()), d_model=d_model, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def umt5_text(d_model: int = HIDDEN) -> Any:
    return tf.UMT5EncoderModel(tf.UMT5Config(vocab_size=len(t5_tokenizer()), d_model=d_model, d_kv=8, d_ff=37, num_layers=2, num_heads=4))


def causal_text(name: str, **more: Any) -> Any:
    """A decoder-only language model of transformers by class name (``Qwen3Model``, ``Gemma2Model``, ...)."""
    cls = getattr(tf, name)
    return cls(cls.config_class(**{
        "vocab_size": len(chat_tokenizer()), "hidden_size": HIDDEN, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256, **more}))


def qwen25_vl(hidden: int = HIDDEN) -> Any:
    marks = {name: chat_tokenizer().convert_tokens_to_ids(name) for name in _CHAT_MARKS}
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(chat_tokenizer()), "hidden_size": hidden, "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 256, "eos_token_id": 258,
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 10000.0}},
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": hidden,
            "fullatt_block_indexes": [0]},
        image_token_id=marks["<|image_pad|>"], video_token_id=marks["<|video_pad|>"], vision_start_token_id=marks["<|vision_start|>"],
        vision_end_token_id=marks["<|vision_end|>"]))


def qwen_processor() -> Any:
    """Images and text for Qwen2.5-VL; images are shrunk to a few patches."""
    images = tf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return tf.Qwen2_5_VLProcessor(
        image_processor=images, tokenizer=chat_tokenizer(), video_processor=tf.Qwen2VLVideoProcessor(), chat_template=_CHAT_TEMPLATE)


def kl_vae(channels: int = 4, levels: int = 2, **more: Any) -> Any:
    """The image autoencoder most families use; each level after the first halves the side."""
    return df.AutoencoderKL(
        layers_per_block=1, block_out_channels=(4,) * levels, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels, norm_num_groups=2, sample_size=16, **more)


def shifted_kl_vae(channels: int = 4, levels: int = 2) -> Any:
    """The autoencoder of flow models: shifted and scaled latents, no quantisation convolutions."""
    return kl_vae(channels, levels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)


def wan_vae(channels: int = 4) -> Any:
    """Causal video autoencoder, half the side and half the frames, with per-channel mean and std."""
    return df.AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], scale_factor_spatial=2,
        scale_factor_temporal=2, **_channel_statistics(channels))


def qwen_image_vae(channels: int = 4, levels: int = 2) -> Any:
    return df.AutoencoderKLQwenImage(
        base_dim=4 if levels < 4 else 2, z_dim=channels, dim_mult=[1] * levels, num_res_blocks=1, temperal_downsample=[False] * (levels - 1),
        **_channel_statistics(channels))


def cogvideox_vae(channels: int = 4) -> Any:
    """Causal video autoencoder, a quarter of the side and of the frames."""
    return df.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3, block_out_channels=(4, 4, 4),
        latent_channels=channels, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4, sample_height=16, sample_width=16)


def oobleck_vae(channels: int = 4) -> Any:
    """Waveform autoencoder: four samples of stereo sound per latent frame, 4 kHz."""
    return df.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[2, 2], channel_multiples=[1, 2], decoder_channels=4, decoder_input_channels=channels,
        audio_channels=2, sampling_rate=4000)


def movq(channels: int = 4) -> Any:
    """The quantised autoencoder of the Kandinsky family."""
    return df.VQModel(
        block_out_channels=(32, 32), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        in_channels=3, out_channels=3, latent_channels=channels, num_vq_embeddings=12, vq_embed_dim=channels, norm_num_groups=32,
        norm_type="spatial")


def deep_compression_vae(channels: int = 4) -> Any:
    """The deterministic autoencoder of Sana, half the side."""
    return df.AutoencoderDC(
        latent_channels=channels, attention_head_dim=4, encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407)


def _channel_statistics(channels: int) -> dict[str, list[float]]:
    return {"latents_mean": [0.1 * i - 0.2 for i in range(channels)], "latents_std": [0.8 + 0.1 * i for i in range(channels)]}


def randomise_zeros(pipe: Any) -> None:
    """Give parameters that start as zero (zero convolutions, output layers) small random values, so that everything matters."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            for parameter in module.parameters():
                if parameter.is_floating_point() and not parameter.detach().any():
                    nn.init.normal_(parameter, std=0.05)


def seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)
