"""A tiny random open_clip model in a folder of its own."""

import json

import torch
from open_clip.model import CLIP

CONFIG = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


def clip_folder(folder, seed):
    torch.manual_seed(seed)
    model = CLIP(embed_dim=16, vision_cfg=CONFIG["vision_cfg"], text_cfg=CONFIG["text_cfg"])
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)
