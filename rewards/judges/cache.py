"""Answers on disk by the content of what was asked: pixels, words, model and decoding, never a path or a server's address."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visalign.rewards.judges.question import Answer

logger = logging.getLogger(__name__)

_FORMAT = 1


class AnswerCache:
    """One small file per answer, complete or absent. Processes may share a folder; every answer is there as soon as it arrived."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Answer | None:
        """The answer kept under ``key``; an unreadable file counts as none, which is logged."""
        path = self._path(key)
        try:
            row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if row.pop("format") != _FORMAT:
                return None
            return Answer(**row)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is no answer (%s); the question will be asked again", path, error)
            return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; the file appears whole or not at all."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"format": _FORMAT, **asdict(answer)}, file, ensure_ascii=False)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def key_of(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request's canonical JSON."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode("ascii")).hexdigest()
