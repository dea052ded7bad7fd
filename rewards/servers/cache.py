"""Answers on disk by the content of what was asked, never by a path or a server's address."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

_FORMAT = 1

Kept = TypeVar("Kept")


class AnswerCache(Generic[Kept]):
    """One small JSON file per answer, complete or absent. Processes may share a folder; every answer is there as soon as it arrived.

    Args:
        folder: made if it is missing.
        dump: an answer as the fields of a JSON object.
        load: the same backwards; a ValueError, TypeError or KeyError says that a file holds something else.
    """

    def __init__(self, folder: str | Path, dump: Callable[[Kept], Mapping[str, Any]], load: Callable[[dict[str, Any]], Kept]) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._dump, self._load = dump, load

    def get(self, key: str) -> Kept | None:
        """The answer kept under ``key``; an unreadable file counts as none, which is logged."""
        path = self._path(key)
        try:
            row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return self._load(row) if row.pop("format") == _FORMAT else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is no answer (%s); the question will be asked again", path, error)
            return None

    def put(self, key: str, answer: Kept) -> None:
        """Keep an answer; the file appears whole or not at all."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"format": _FORMAT, **self._dump(answer)}, file, ensure_ascii=False)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def key_of(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request's canonical JSON."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode("ascii")).hexdigest()
