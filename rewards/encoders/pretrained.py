"""Loading a transformers model whose every weight comes from its files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel

from visalign.rewards.weights import fetching


def load_model(path: str, *, unused: tuple[str, ...] = (), cache_dir: str | None = None) -> Any:
    """The bare model of a folder or hub id, float32, frozen, in evaluation mode.

    A checkpoint may lack parts of the bare model, such as the pooler of a classifier; transformers then draws them at random with a
    warning, and features would differ from one start to the next.

    Args:
        unused: prefixes of parameters that do not matter here and may be missing.
    Raises:
        ValueError: the model was not found, or weights that matter are missing.
    """
    with fetching("encoder", path):
        model, found = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, cache_dir=cache_dir)
    # Names may carry the part they belong to: "pooler.dense.bias" of a tower, "vision_model.pooler..." of a whole.
    lacking = sorted(name for name in found["missing_keys"]
                     if not any(part.startswith(unused) for part in (name, name.partition(".")[2])))
    if lacking:
        raise ValueError(f"{path} has no weights for {', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''} of "
                         f"{type(model).__name__}, which would be random; use a checkpoint of the whole model, or a pooling that does not "
                         "need them")
    return model.requires_grad_(False).eval()
