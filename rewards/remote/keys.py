"""What makes two questions to a remote reward the same: the reward's own declaration, every byte of the samples, and the prompt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from visalign.types import Media, Prompt
from visalign.wire.rows import PairRow, Row
from visalign.wire.schema import SpecPart


def row_key(row: Row, scorer: str, spec: SpecPart) -> str:
    """SHA-256 of the reward's name and spec (with its version), the samples in their order, and the prompt.

    Neither a server's address nor a file's path nor the sample's group is in it: pointwise and pairwise answers depend on none of them.
    """
    digest = hashlib.sha256(f"{'compare' if isinstance(row, PairRow) else 'score'} {scorer}\n{spec.model_dump_json()}\n".encode())
    for media in row.samples:
        _add_media(digest, media)
    _add_prompt(digest, row.prompt)
    return digest.hexdigest()


def _add_media(digest: hashlib._Hash, media: Media) -> None:
    digest.update(f"{media.kind} {media.rate} {media.convention}\n".encode())
    for name, tensor in (("data", media.data), ("faces", media.faces), ("prompt_embeds", media.prompt_embeds)):
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))


def _add_prompt(digest: hashlib._Hash, prompt: Prompt) -> None:
    asked = [prompt.text, prompt.negative, dict(prompt.metadata)]
    digest.update(json.dumps(asked, sort_keys=True, ensure_ascii=True).encode("ascii"))
    for path in prompt.images:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
