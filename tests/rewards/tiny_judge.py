"""A vision-language model of 100 kB with random weights, made in a folder: LLaVA with a word-level tokenizer and a chat template."""

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
)

TEMPLATE = ("{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
            "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
            "{% endif %}{% endfor %}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
WORDS = ["Yes", "No", "1", "2", "Image", "is", "better", ".", ":", "user", "assistant", " "]


def make(folder, extra_tokens=(), verdict=None):
    """Write the model and its processor; with a ``verdict`` that is all it ever says, whatever it is shown."""
    spoken = [] if verdict is None else [verdict]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<end>", "<image>", *WORDS, *extra_tokens, *spoken])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|[^\w\s]"), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<end>",
                                        additional_special_tokens=["<image>", *extra_tokens])
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
