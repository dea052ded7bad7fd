"""Where a candidate is: in a file, in a cell of a table, or kept as a latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A candidate in a file of its own."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()

    def read(self) -> bytes:
        """The file's content.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        return self.path.read_bytes()

    def stamp(self) -> str | None:
        """Changes when the content does, without reading it: path, size and time of the last change."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return f"{self.path.resolve()}|{found.st_size}|{found.st_mtime_ns}"


@dataclass(frozen=True, slots=True)
class MediaCell:
    """A candidate in a column of a table, read when it is needed: a large data set stays on disk.

    Attributes:
        cell: reads the cell: encoded bytes, ``{"bytes": ..., "path": ...}``, or nothing.
        name: for messages, e.g. ``jpg_0``.
        suffix: of the encoding, e.g. ``.jpg``.
        place: of the cell in a table of this content; ``None`` if nothing tells that without reading it.
    """

    cell: Callable[[], Any]
    name: str
    suffix: str
    place: str | None = None

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            FileNotFoundError: the cell is empty.
        """
        value = self.cell()
        if isinstance(value, Mapping):
            value = value.get("bytes") or (Path(value["path"]).read_bytes() if value.get("path") else None)
        if not value:
            raise FileNotFoundError(f"column {self.name} is empty")
        return bytes(value)

    def stamp(self) -> str | None:
        return self.place


@dataclass(frozen=True, slots=True)
class StoredLatent:
    """A candidate whose latents were kept: row ``row`` of the tensor ``latents`` (n, *latent_shape) of a safetensors file."""

    path: Path
    row: int

    @property
    def name(self) -> str:
        return f"{self.path}[{self.row}]"


Candidate: TypeAlias = MediaFile | MediaCell | StoredLatent
