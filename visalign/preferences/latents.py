"""Latents of a data set's media, encoded once and kept on disk.

    folder/3f/3f9c...e1.safetensors      one file per content: "latents" (1, *latent_shape), float32

A file's name is the SHA-256 of the medium's bytes, of the pipeline's identity and of whether it was resized: a file that is
overwritten, another VAE or another size never meets an old latent, and a picture that is in many pairs is encoded once. Files appear by
a rename after they are complete, so that a killed run continues where it was and several processes may share the folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visalign.preferences.content import KINDS, check_header, decode, fit
from visalign.preferences.records import (
    Broken,
    Candidate,
    MediaCell,
    MediaFile,
    PreferenceDataset,
    PreferenceError,
    Problem,
    RowError,
    StoredLatent,
)
from visalign.types import Media, Prompt

logger = logging.getLogger(__name__)

NAME = "latents"


class MediaEncoder(Protocol):
    """The part of a policy that caching needs."""

    latent_shape: tuple[int, ...]

    def encode_media(self, media: Sequence[Media]) -> Tensor:
        """Media of one size as clean latents (B, *latent_shape)."""

    def decode(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> list[Media]:
        """Clean latents as media."""


@dataclass(frozen=True)
class Cached:
    """A data set whose every candidate is a ``StoredLatent``, and what it took.

    Attributes:
        dataset: the rows that could be used.
        encoded: media that were encoded now.
        found: candidates whose latents were there, or were encoded for an earlier row.
    """

    dataset: PreferenceDataset
    encoded: int
    found: int


def cached_latents(policy: MediaEncoder, dataset: PreferenceDataset, folder: Path, *, identity: str, resize: bool = False,
                   broken: Broken = "error", batch: int = 8, progress: Callable[[int, int], None] | None = None) -> Cached:
    """Latents of every candidate, encoding what ``folder`` does not hold yet.

    All media are read and checked before the first is encoded; what only decoding shows is reported after everything else has
    been encoded, so that nothing is done twice.

    Args:
        identity: of what turns media into latents (``samplers.identity.pipeline_identity``).
        resize: scale and crop media of other sizes than the pipeline makes; without it they are problems.
        broken: "error" reports every unusable row, "skip" leaves them out and counts them.
        batch: media per call of the encoder.
        progress: called with (encoded, to encode).
    Raises:
        PreferenceError: missing, unreadable or differently sized media, or stored latents of another pipeline; with their rows.
        ValueError: no row is left.
    """
    cache = _Cache(folder, identity + ("+resize" if resize else ""), policy.latent_shape)
    example: list[Media] = []  # what the pipeline makes; decoded only if something needs to be encoded

    def like() -> Media:
        if not example:
            example.extend(policy.decode(torch.zeros(1, *policy.latent_shape)))
        return example[0]

    remedy = "broken='skip' leaves these rows out" + ("" if resize else "; resize=True scales and crops media of other sizes")
    problems: list[Problem] = []
    places: dict[int, tuple[StoredLatent, ...]] = {}
    pending: dict[str, tuple[int, MediaFile | MediaCell]] = {}
    found = 0
    for record in dataset.records:
        try:
            stored = []
            for candidate in record.candidates:
                key = None if isinstance(candidate, StoredLatent) else _check(candidate, cache, like, resize)
                stored.append(_check_stored(candidate, policy.latent_shape, identity) if key is None else cache.place(key))
                if key is None or key in pending or cache.holds(key):
                    found += 1
                else:
                    pending[key] = (record.row, candidate)  # type: ignore[assignment]
            places[record.row] = tuple(stored)
        except RowError as error:
            problems.append(Problem(record.row, error.fault, str(error)))
    if problems and broken == "error":
        raise PreferenceError(dataset.source, problems, remedy)
    failed = _encode(policy, pending, cache, like, resize, batch, progress)
    for record in dataset.records:
        if lost := [place for place in places.get(record.row, ()) if place in failed]:
            problems.append(Problem(record.row, failed[lost[0]].fault, str(failed[lost[0]])))
    kept = dataset.without(problems, broken, remedy)
    records = tuple(replace(record, candidates=places[record.row]) for record in kept.records)
    return Cached(PreferenceDataset(kept.source, records, kept.dropped), encoded=len(pending) - len(failed), found=found)


def _check(candidate: MediaFile | MediaCell, cache: _Cache, like: Callable[[], Media], resize: bool) -> str:
    """The candidate's key; its header is looked at unless its latents are there."""
    try:
        content = candidate.read()
    except OSError as error:
        raise RowError("missing file", f"{candidate.name}: {error}") from None
    key = cache.key(content)
    if not cache.holds(key) and KINDS.get(candidate.suffix) == "image" and like().kind == "image":
        check_header(content, candidate.name, like(), resize)
    return key


def _encode(policy: MediaEncoder, pending: dict[str, tuple[int, MediaFile | MediaCell]], cache: _Cache, like: Callable[[], Media],
            resize: bool, batch: int, progress: Callable[[int, int], None] | None) -> dict[StoredLatent, RowError]:
    """Encode what is pending; returns what could not be, and why."""
    failed: dict[StoredLatent, RowError] = {}
    keys = list(pending)
    for start in range(0, len(keys), batch):
        media: dict[str, Media] = {}
        for key in keys[start:start + batch]:
            candidate = pending[key][1]
            try:
                media[key] = fit(decode(candidate), like(), resize, candidate.name)
            except RowError as error:
                failed[cache.place(key)] = error
        if media:
            latents = policy.encode_media(list(media.values())).detach().float().cpu()
            for key, latent in zip(media, latents, strict=True):
                if not bool(torch.isfinite(latent).all()):
                    failed[cache.place(key)] = RowError("unreadable", f"{pending[key][1].name}: its latents are not finite")
                else:
                    cache.write(key, latent)
        if progress is not None:
            progress(min(start + batch, len(keys)), len(keys))
    return failed


class _Cache:
    """The folder."""

    def __init__(self, folder: Path, identity: str, shape: tuple[int, ...]) -> None:
        self.folder, self.identity, self.shape = folder, identity, shape

    def key(self, content: bytes) -> str:
        return hashlib.sha256(hashlib.sha256(content).digest() + self.identity.encode()).hexdigest()

    def place(self, key: str) -> StoredLatent:
        return StoredLatent(self.folder / key[:2] / f"{key}.safetensors", 0)

    def holds(self, key: str) -> bool:
        """Whether there is a whole file; a damaged one is removed and made again."""
        path = self.place(key).path
        if not path.is_file():
            return False
        try:
            return _header(path)[0] == (1, *self.shape)
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s is damaged (%s); encoding it again", path, error)
            return False

    def write(self, key: str, latent: Tensor) -> None:
        write_latents(self.place(key).path, latent[None], self.identity)


def write_latents(path: Path, latents: Tensor, identity: str | None) -> None:
    """Latents (n, *latent_shape) as a file that is complete or not there; ``identity`` says which pipeline can use them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        save_file({NAME: latents.detach().float().cpu().contiguous().clone()}, partial,
                  metadata=None if identity is None else {"identity": identity})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_latents(candidates: Sequence[Candidate]) -> Tensor:
    """The K candidates' latents, float32 (K, *latent_shape).

    Raises:
        ValueError: one of them is not stored as a latent, or its file is missing or damaged.
    """
    rows = []
    for candidate in candidates:
        if not isinstance(candidate, StoredLatent):
            raise ValueError(f"{candidate.name} is a medium, not a latent; encode the data set first with cached_latents")
        try:
            with safe_open(candidate.path, framework="pt") as file:
                rows.append(file.get_slice(NAME)[candidate.row:candidate.row + 1])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{candidate.name}: cannot be read ({error}); run cached_latents again to make it anew") from error
    return torch.cat(rows).float()


def _check_stored(candidate: Candidate, shape: tuple[int, ...], identity: str) -> StoredLatent:
    assert isinstance(candidate, StoredLatent)
    try:
        stored, made_by = _header(candidate.path)
    except (SafetensorError, OSError, KeyError) as error:
        raise RowError("latents", f"{candidate.name}: not a readable file of latents ({error})") from None
    if stored[1:] != shape:
        raise RowError("latents", f"{candidate.name}: latents of shape {stored[1:]}, the pipeline's are {shape}")
    if candidate.row >= stored[0]:
        raise RowError("latents", f"{candidate.name}: the file has {stored[0]} rows, counted from 0")
    if made_by is not None and made_by.removesuffix("+resize") != identity:
        raise RowError("latents", f"{candidate.name}: latents of another pipeline (another VAE, size or scaling)")
    return candidate


def _header(path: Path) -> tuple[tuple[int, ...], Any]:
    """Shape of the stored latents, and the identity of the pipeline they are for, if the file says so."""
    with safe_open(path, framework="pt") as file:
        return tuple(file.get_slice(NAME).get_shape()), (file.metadata() or {}).get("identity")
