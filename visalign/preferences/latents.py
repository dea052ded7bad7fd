"""Latents of a data set's media, encoded once and kept on disk.

    folder/3f/3f9c...e1.safetensors      one file per content: "latents" (1, *latent_shape), float32

A file's name is the SHA-256 of the medium's bytes, of the pipeline's identity and of whether it was resized: a file that is
overwritten, another VAE or another size never meets an old latent, and a picture that is in many pairs is encoded once. Files appear by
a rename after they are complete, so that a killed run continues where it was and several processes may share the folder.

    folder/keys/8c1f...02.txt            names of a data set's contents, so that what has not changed need not be read again
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from visalign.preferences.candidates import Candidate, MediaCell, MediaFile, StoredLatent
from visalign.preferences.content import KINDS, check_header, decode, fit
from visalign.preferences.records import Broken, PreferenceDataset, PreferenceError, Problem, RowError
from visalign.preferences.stored import check_stored, header, write_latents
from visalign.resumable import write_lines
from visalign.types import Media, Prompt

logger = logging.getLogger(__name__)


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
    keys = _Keys(folder / "keys", cache.identity, [candidate for record in dataset.records for candidate in record.candidates])
    size = _Size(policy, resize)
    remedy = "broken='skip' leaves these rows out" + ("" if resize else "; resize=True scales and crops media of other sizes")
    plan = _plan(dataset, cache, keys, size, identity)
    if plan.problems and broken == "error":
        raise PreferenceError(dataset.source, plan.problems, remedy)
    keys.save()
    failed = _encode(policy, plan.pending, cache, size, batch, progress)
    for row, places in plan.places.items():
        if lost := [place for place in places if place in failed]:
            plan.problems.append(Problem(row, failed[lost[0]].fault, str(failed[lost[0]])))
    kept = dataset.without(plan.problems, broken, remedy)
    records = tuple(replace(record, candidates=plan.places[record.row]) for record in kept.records)
    return Cached(PreferenceDataset(kept.source, records, kept.dropped), encoded=len(plan.pending) - len(failed), found=plan.found)


@dataclass
class _Plan:
    """By row, where its latents will be; by key, what is to be encoded for that; rows that cannot be used; what was there."""

    places: dict[int, tuple[StoredLatent, ...]] = field(default_factory=dict)
    pending: dict[str, MediaFile | MediaCell] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    found: int = 0


def _plan(dataset: PreferenceDataset, cache: _Cache, keys: _Keys, size: _Size, identity: str) -> _Plan:
    plan = _Plan()
    for record in dataset.records:
        places: list[StoredLatent] = []
        try:
            for candidate in record.candidates:
                if isinstance(candidate, StoredLatent):
                    places.append(check_stored(candidate, cache.shape, identity))
                    plan.found += 1
                    continue
                key = keys.known(candidate)
                if key is None or not cache.holds(key):
                    key = keys.learn(candidate, _check(candidate, cache, size))
                places.append(cache.place(key))
                if key in plan.pending or cache.holds(key):
                    plan.found += 1
                else:
                    plan.pending[key] = candidate
        except RowError as error:
            plan.problems.append(Problem(record.row, error.fault, str(error)))
        else:
            plan.places[record.row] = tuple(places)
    return plan


def _check(candidate: MediaFile | MediaCell, cache: _Cache, size: _Size) -> str:
    """The candidate's key; its header is looked at unless its latents are there."""
    try:
        content = candidate.read()
    except OSError as error:
        raise RowError("missing file", f"{candidate.name}: {error}") from None
    key = cache.key(content)
    if not cache.holds(key) and KINDS.get(candidate.suffix) == "image" and size.like.kind == "image":
        check_header(content, candidate.name, size.like, size.resize)
    return key


def _encode(policy: MediaEncoder, pending: Mapping[str, MediaFile | MediaCell], cache: _Cache, size: _Size, batch: int,
            progress: Callable[[int, int], None] | None) -> dict[StoredLatent, RowError]:
    """Encode what is pending; returns what could not be, and why."""
    failed: dict[StoredLatent, RowError] = {}
    keys = list(pending)
    for start in range(0, len(keys), batch):
        media: dict[str, Media] = {}
        for key in keys[start:start + batch]:
            try:
                media[key] = fit(decode(pending[key]), size.like, size.resize, pending[key].name)
            except RowError as error:
                failed[cache.place(key)] = error
        if media:
            latents = policy.encode_media(list(media.values())).detach().float().cpu()
            for key, latent in zip(media, latents, strict=True):
                if not bool(torch.isfinite(latent).all()):
                    failed[cache.place(key)] = RowError("unreadable", f"{pending[key].name}: its latents are not finite")
                else:
                    cache.write(key, latent)
        if progress is not None:
            progress(min(start + batch, len(keys)), len(keys))
    return failed


class _Size:
    """What the pipeline makes, decoded once and only if something has to be encoded; and whether media of other sizes are fitted to it."""

    def __init__(self, policy: MediaEncoder, resize: bool) -> None:
        self.policy, self.resize = policy, resize

    @cached_property
    def like(self) -> Media:
        return self.policy.decode(torch.zeros(1, *self.policy.latent_shape))[0]


class _Keys:
    """Keys of a data set's media by their stamps, kept in one file for the whole data set as it is."""

    def __init__(self, folder: Path, identity: str, candidates: Sequence[Candidate]) -> None:
        stamps = [candidate.stamp() for candidate in candidates if not isinstance(candidate, StoredLatent)]
        self.stamps = list(dict.fromkeys(stamp for stamp in stamps if stamp is not None))
        self.path = folder / (hashlib.sha256("\n".join([identity, *self.stamps]).encode()).hexdigest() + ".txt")
        lines = self.path.read_text(encoding="ascii").splitlines() if self.path.is_file() else []
        self.by_stamp = dict(zip(self.stamps, lines, strict=True)) if len(lines) == len(self.stamps) else {}
        self.is_new = not self.by_stamp

    def known(self, candidate: MediaFile | MediaCell) -> str | None:
        """The key, if the data set's media are as they were when it was last encoded."""
        stamp = candidate.stamp()
        return None if stamp is None else self.by_stamp.get(stamp) or None

    def learn(self, candidate: MediaFile | MediaCell, key: str) -> str:
        if (stamp := candidate.stamp()) is not None:
            self.by_stamp[stamp] = key
        return key

    def save(self) -> None:
        """Keep what was learnt; media that could not be read stay unknown."""
        if self.stamps and self.is_new:
            write_lines(self.path, [self.by_stamp.get(stamp, "") for stamp in self.stamps])


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
            return header(path)[0] == (1, *self.shape)
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s is damaged (%s); encoding it again", path, error)
            return False

    def write(self, key: str, latent: Tensor) -> None:
        write_latents(self.place(key).path, latent[None], self.identity)
