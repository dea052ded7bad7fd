"""Vision-language models of 100 kB with random weights, made in a folder: LLaVA, and Qwen2-VL, which has a part for videos."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

TEMPLATE = ("{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
            "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
            "{% endif %}{% endfor %}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
WORDS = ["Yes", "No", "1", "2", "Image", "is", "better", ".", ":", "user", "assistant", " "]


def word_tokenizer(marks, words, special):
    """A word is a token; ``marks`` are padding, unknown, the end and what follows."""
    vocabulary = {word: index for index, word in enumerate([*marks, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token=marks[0], eos_token=marks[2],
                                   additional_special_tokens=list(special))


def make(folder, extra_tokens=(), verdict=None):
    """Write the model and its processor; with a ``verdict`` that is all it ever says, whatever it is shown."""
    spoken = () if verdict is None else (verdict,)
    tokenizer = word_tokenizer(["<pad>", "<unk>", "<end>", "<image>"], [*WORDS, *extra_tokens, *spoken], special=["<image>", *extra_tokens])
    vocabulary = tokenizer.get_vocab()
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
                   num_additional_image_tokens=1).save_pretrained(folder)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                              patch_size=8, projection_dim=16)
    text = LlamaConfig(vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2, pad_token_id=0, eos_token_id=2, bos_token_id=2, max_position_embeddings=4096)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-1,
                                                      eos_token_id=2, pad_token_id=0))
    if verdict is not None:
        say_only(model, after=vocabulary[" "], verdict=vocabulary[verdict], end=vocabulary["<end>"])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def say_only(model, after, verdict, end):
    """What follows depends on the last token alone: the verdict after a space (the generation prompt ends in one), then the end."""
    layer = model.model.language_model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight.zero_()
    model.lm_head.weight[verdict] = 10 * embedding[after] / embedding[after].norm()
    model.lm_head.weight[end] = 10 * embedding[verdict] / embedding[verdict].norm()


QWEN_TEMPLATE = ("{% for message in messages %}<start>{{ message['role'] }}: {% for part in message['content'] %}"
                 "{% if part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
                 "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end>{% endfor %}"
                 "{% if add_generation_prompt %}<start>assistant: {% endif %}")


def make_qwen(folder, extra_tokens=()):
    """Write a Qwen2-VL and its processor, the base of HPSv3 and VideoReward: 14-pixel patches, merged by two and two, frames in pairs."""
    marks = ["<pad>", "<unk>", "<end>", "<start>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = word_tokenizer(marks, [*WORDS, *extra_tokens], special=[*marks[3:], *extra_tokens])
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 28 * 28, "max_pixels": 16 * 28 * 28}
    Qwen2VLProcessor(image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(**sizes),
                     chat_template=QWEN_TEMPLATE).save_pretrained(folder)
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
            "bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 4096}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2,
              "temporal_patch_size": 2}
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, vision_start_token_id=4, vision_end_token_id=5,
                                                  image_token_id=6, video_token_id=7)).save_pretrained(folder)
    return folder
