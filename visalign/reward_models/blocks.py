"""What a head sees of a sample: blocks of its embeddings, side by side.

    media      the embedding m of the sample
    text       the embedding t of its prompt; a linear head cannot use it, for it is the same for both samples of a comparison
    product    m * t, element by element: with it a linear head contains the encoder's own score <m, t>, and can weigh its parts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Block = Literal["media", "text", "product"]
BLOCKS: tuple[Block, ...] = get_args(Block)


def check_blocks(blocks: Sequence[Block], media_dim: int, text_dim: int) -> None:
    """
    Raises:
        ValueError: no block of the sample itself, one twice, or one that these embeddings (``text_dim`` 0 without text) cannot fill.
    """
    if not blocks or len(set(blocks)) < len(blocks) or set(blocks) <= {"text"}:
        raise ValueError(f"features {list(blocks)}: name media, text and product once each, and not text alone: no sample would be in it")
    if text_dim == 0 and set(blocks) != {"media"}:
        raise ValueError(f"features {list(blocks)}: this encoder embeds no text; use features: [media], which sees no prompt, or an "
                         "encoder of both such as {reward: clip, ...}")
    if "product" in blocks and text_dim != media_dim:
        raise ValueError(f"features {list(blocks)}: media and text embeddings have {media_dim} and {text_dim} elements, and no product; "
                         "use [media, text]")


def possible_blocks(media_dim: int, text_dim: int) -> tuple[Block, ...]:
    """All blocks that these embeddings can fill."""
    if text_dim == 0:
        return ("media",)
    return BLOCKS if media_dim == text_dim else ("media", "text")


def num_features(blocks: Sequence[Block], media_dim: int, text_dim: int) -> int:
    return sum(text_dim if block == "text" else media_dim for block in blocks)
