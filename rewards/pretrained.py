"""Models, processors and tokenizers of transformers from a folder or the hub: whole, or not at all."""

from __future__ import annotations

from typing import Any

import torch

from visalign.rewards.weights import fetching


def pretrained(kind: Any, location: str, *, owner: str, cache_dir: str | None = None, **options: Any) -> Any:
    """``kind.from_pretrained(location)``: a configuration, a processor, a tokenizer.

    Args:
        owner: whom it is for, in errors.
        options: passed on.
    Raises:
        ValueError: it is neither in that folder nor to be had from the hub.
    """
    with fetching(owner, location):
        return kind.from_pretrained(location, cache_dir=cache_dir, **options)


def pretrained_model(kind: Any, location: str, *, owner: str, cache_dir: str | None = None,
                     dtype: str | torch.dtype = torch.float32) -> Any:
    """A frozen model in evaluation mode, every tensor of it out of the checkpoint: transformers makes up what is missing, with no more than
    a warning.

    Raises:
        ValueError: it is not there, or lacks tensors; names the first.
    """
    network, found = pretrained(kind, location, owner=owner, cache_dir=cache_dir, dtype=dtype, output_loading_info=True)
    lacking = sorted([*map(str, found["missing_keys"]), *map(str, found["mismatched_keys"])])
    if lacking:
        raise ValueError(f"{owner}: {location} lacks {len(lacking)} tensors of a {type(network).__name__} (the first is {lacking[0]}), "
                         "which would stay random; give a complete checkpoint of that architecture")
    return network.requires_grad_(False).eval()
