"""Embeddings of a corpus, made once per content and encoder and kept.

    FOLDER/3f9c.../8c1f....safetensors     shards: "embeddings" (n, d), and their keys: SHA-256 of each medium's bytes or of a prompt

The first folder is the encoder's hash, so that another encoder never meets old embeddings. A shard appears by a rename when it is whole: a
killed run continues behind the last one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visalign.preferences.candidates import MediaCell, MediaFile
from visalign.preferences.content import decode
from visalign.preferences.records import Broken, Problem, RowError
from visalign.reward_models.encoder import FeatureEncoder
from visalign.reward_training.examples import Corpus
from visalign.tensorfile import write_tensors
from visalign.types import Media

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """Tables that ``Examples`` point into: ``media`` float32 (U, d), ``text`` float32 (T, e) or ``None`` without."""

    media: Tensor
    text: Tensor | None


def embed(encoder: FeatureEncoder, corpus: Corpus, folder: Path, *, batch: int = 256, broken: Broken = "error",
          progress: Callable[[int, int], None] = lambda done, total: None) -> tuple[Corpus, Embeddings]:
    """Embeddings of all media and texts, and the corpus without the rows that have none.

    Args:
        folder: of the cache.
        batch: media per call of the encoder and per shard.
        broken: "error" reports media that cannot be read or embedded, "skip" leaves their rows out.
        progress: called with (media embedded, media to embed).
    Raises:
        PreferenceError: such media, with their rows.
    """
    cache = EmbeddingCache(folder, encoder.hash)
    keys, failed = _media_keys(corpus.media)
    todo = [row for row, key in enumerate(keys) if key and key not in cache]
    todo = list({keys[row]: row for row in todo}.values())
    for start in range(0, len(todo), batch):
        loaded = {row: found for row in todo[start:start + batch] if (found := _load(corpus.media[row], encoder, row, failed)) is not None}
        if loaded:
            cache.add([keys[row] for row in loaded], encoder.media(list(loaded.values())).float().cpu())
        progress(min(start + batch, len(todo)), len(todo))
    logger.info("%d media embedded, %d found in %s", len(todo), len(keys) - len(todo), cache.folder)
    text = _texts(encoder, corpus.texts, cache) if encoder.has_text else None
    width = next((len(cache[key]) for key in keys if key in cache), 0)
    rows = [cache[key] if key in cache else torch.full((width,), torch.nan) for key in keys]
    media = torch.stack(rows)
    for row in (~torch.isfinite(media).all(dim=1)).nonzero().flatten().tolist():
        failed.setdefault(row, RowError("unreadable", f"{corpus.media[row].name}: {encoder.name} gives no embedding of it"))
    return _without(corpus, failed, broken), Embeddings(media, text)


def _media_keys(media: Sequence[MediaFile | MediaCell]) -> tuple[list[str], dict[int, RowError]]:
    """A key per medium, empty where it cannot be read."""
    keys, failed = [], {}
    for row, candidate in enumerate(media):
        try:
            keys.append(hashlib.sha256(candidate.read()).hexdigest())
        except OSError as error:
            failed[row] = RowError("missing file", f"{candidate.name}: {error}")
            keys.append("")
    return keys, failed


def _load(candidate: MediaFile | MediaCell, encoder: FeatureEncoder, row: int, failed: dict[int, RowError]) -> Media | None:
    """The medium, or nothing and why."""
    try:
        media = decode(candidate)
        if media.kind in encoder.modality:
            return media
        kinds = " and ".join(sorted(encoder.modality))
        raise RowError("size", f"{candidate.name} is of kind {media.kind}, and {encoder.name} reads {kinds}"
                       + ("; {reward: clip, video_frames: 8} reads video" if media.kind == "video" else ""))
    except RowError as error:
        failed[row] = error
        return None


def _texts(encoder: FeatureEncoder, texts: Sequence[str], cache: EmbeddingCache) -> Tensor:
    keys = [hashlib.sha256(f"text {text}".encode()).hexdigest() for text in texts]
    new = [row for row, key in enumerate(keys) if key not in cache]
    if new:
        cache.add([keys[row] for row in new], encoder.texts([texts[row] for row in new]).float().cpu())
    return torch.stack([cache[key] for key in keys])


def _without(corpus: Corpus, failed: dict[int, RowError], broken: Broken) -> Corpus:
    """The corpus without the rows that show a failed medium; its tables of media and texts stay."""
    problems, kept = [], torch.ones(len(corpus.examples), dtype=torch.bool)
    for k, (record, media) in enumerate(zip(corpus.dataset.records, corpus.examples.media.tolist(), strict=True)):
        if lost := [row for row in media if row in failed]:
            problems.append(Problem(record.row, failed[lost[0]].fault, str(failed[lost[0]])))
            kept[k] = False
    dataset = corpus.dataset.without(problems, broken, "broken: skip leaves these rows out")
    return replace(corpus, dataset=dataset, examples=corpus.examples.select(kept))


class EmbeddingCache:
    """Embeddings by key, in memory and on disk."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder / identity[:32]
        self._rows: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(str(file), framework="pt") as handle:
                    keys, rows = json.loads((handle.metadata() or {})["keys"]), handle.get_tensor("embeddings")
            except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
                logger.warning("%s is damaged (%s); embedding its media again", file, error)
                continue
            self._rows.update(zip(keys, rows, strict=True))

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Tensor:
        return self._rows[key]

    def add(self, keys: Sequence[str], rows: Tensor) -> None:
        """Keep embeddings (n, d) as one shard."""
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]
        write_tensors(self.folder / f"{name}.safetensors", {"embeddings": rows}, {"keys": json.dumps(list(keys))})
        self._rows.update(zip(keys, rows, strict=True))
