"""Requests: samples or pairs with their prompts, as rows of objects on both sides and as a body between them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visalign.media import load_media, save_media
from visalign.types import Media, Prompt
from visalign.wire.body import Array, WireError, pack, unpack
from visalign.wire.media import decode, encode, size_of
from visalign.wire.schema import MediaPart, PromptPart, Request


@dataclass(frozen=True)
class ScoreRow:
    """A sample to score."""

    media: Media
    prompt: Prompt
    group: int

    @property
    def samples(self) -> tuple[Media, ...]:
        return (self.media,)


@dataclass(frozen=True)
class PairRow:
    """Two samples to compare, in this order."""

    first: Media
    second: Media
    prompt: Prompt

    @property
    def samples(self) -> tuple[Media, ...]:
        return self.first, self.second


Row = ScoreRow | PairRow


def row_bytes(row: Row) -> int:
    """What a row adds to a request at most: its samples, not encoded."""
    return sum(map(size_of, row.samples))


def cut(rows: Sequence[Row], whole_groups: bool, max_rows: int, max_bytes: float = float("inf")) -> list[list[int]]:
    """Row numbers in parts of at most ``max_rows`` rows and ``max_bytes`` bytes, in order; a unit that is larger stands alone.

    Args:
        whole_groups: a unit is a group, whose rows stay together, instead of a row.
    """
    units: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        units.setdefault(row.group if whole_groups and isinstance(row, ScoreRow) else number, []).append(number)
    parts: list[list[int]] = []
    size = 0
    for unit in units.values():
        added = sum(row_bytes(rows[number]) for number in unit)
        if not parts or len(parts[-1]) + len(unit) > max_rows or size + added > max_bytes:
            parts.append([])
            size = 0
        parts[-1] += unit
        size += added
    return parts


class _Writer:
    """Collects each distinct sample, prompt and picture once, by identity."""

    def __init__(self, allowed: Collection[str]) -> None:
        self.allowed = allowed
        self.arrays: dict[str, Array] = {}
        self.media: list[MediaPart] = []
        self.prompts: list[PromptPart] = []
        self._known: dict[object, int] = {}

    def add_media(self, media: Media, key: object = None) -> int:
        key = id(media) if key is None else key
        if key not in self._known:
            self._known[key] = len(self.media)
            part, arrays = encode(media, f"media.{len(self.media)}", self.allowed)
            self.media.append(part)
            self.arrays |= arrays
        return self._known[key]

    def add_prompt(self, prompt: Prompt) -> int:
        key = ("prompt", id(prompt))
        if key not in self._known:
            images = tuple(self._known[path] if path in self._known else self.add_media(load_media(Path(path)), path)
                           for path in prompt.images)
            self._known[key] = len(self.prompts)
            self.prompts.append(PromptPart(text=prompt.text, negative=prompt.negative, images=images, metadata=_plain(prompt)))
        return self._known[key]

    def body(self, rows: Sequence[tuple[int, int, int]]) -> bytes:
        return pack(Request(prompts=tuple(self.prompts), media=tuple(self.media), rows=tuple(rows)), self.arrays)


def pack_rows(rows: Sequence[Row], allowed: Collection[str]) -> bytes:
    """A request about samples or about pairs.

    Args:
        allowed: encodings the other side reads, besides "raw".
    Raises:
        WireError: a prompt's metadata is not plain JSON.
    """
    writer = _Writer(allowed)
    return writer.body([(writer.add_media(row.media), writer.add_prompt(row.prompt), row.group) if isinstance(row, ScoreRow)
                        else (writer.add_media(row.first), writer.add_media(row.second), writer.add_prompt(row.prompt)) for row in rows])


def pack_prompts(prompts: Sequence[Prompt], allowed: Collection[str]) -> bytes:
    """A request about prompts alone, in their order.

    Raises:
        WireError: as ``pack_rows``.
    """
    writer = _Writer(allowed)
    for prompt in prompts:
        writer.add_prompt(prompt)
    return writer.body([])


def unpack_rows(body: bytes, compare: bool, max_bytes: int, folder: Path) -> list[Row]:
    """The samples or pairs of a request, sharing what was sent once.

    Args:
        max_bytes: of all samples together, decoded.
        folder: where condition images are written; ``Prompt.images`` are their paths.
    Raises:
        WireError: says what is wrong; ``TooLargeError``, ``VersionError``.
    """
    request, media, prompts = _read(body, max_bytes, folder)
    try:
        if compare:
            return [PairRow(media[first], media[second], prompts[prompt]) for first, second, prompt in request.rows]
        return [ScoreRow(media[sample], prompts[prompt], group) for sample, prompt, group in request.rows]
    except IndexError:
        raise WireError(f"a row names a sample or prompt beyond the {len(media)} and {len(prompts)} there are") from None


def unpack_prompts(body: bytes, max_bytes: int, folder: Path) -> list[Prompt]:
    """The prompts of a request; as ``unpack_rows``."""
    return _read(body, max_bytes, folder)[2]


def _read(body: bytes, max_bytes: int, folder: Path) -> tuple[Request, list[Media], list[Prompt]]:
    request, arrays = unpack(body, Request)
    media: list[Media] = []
    for number, part in enumerate(request.media):
        media.append(decode(part, f"media.{number}", arrays, max_bytes))
        max_bytes -= size_of(media[-1])
    files: dict[int, str] = {}
    for number in {number for prompt in request.prompts for number in prompt.images}:
        if number >= len(media) or media[number].kind != "image":
            raise WireError(f"a prompt names media.{number} as its condition image, which is no image of this request")
        files[number] = str(save_media(media[number], folder / f"{number}"))
    prompts = [Prompt(part.text, part.negative, tuple(files[number] for number in part.images), part.metadata) for part in request.prompts]
    return request, media, prompts


def _plain(prompt: Prompt) -> dict[str, Any]:
    """Metadata as it will arrive, refused if it would arrive otherwise."""
    metadata = dict(prompt.metadata)
    try:
        if json.loads(json.dumps(metadata, allow_nan=False)) == metadata:
            return metadata
        problem = "keys that are no strings, or tuples"
    except (TypeError, ValueError, RecursionError) as error:
        problem = str(error)
    raise WireError(f"prompt {prompt.text[:60]!r}: its metadata cannot be sent as JSON ({problem}); use strings, numbers, lists and "
                    "objects")
