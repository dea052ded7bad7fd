"""Folders that grow row by row, survive a kill, and refuse to be continued with other settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def claim(folder: Path, name: str, settings: Mapping[str, Any], content: Sequence[str]) -> None:
    """Make a folder for samples of these settings, which ``folder / name`` keeps; or find it made for the same.

    Args:
        settings: everything the samples depend on besides their prompts and seeds.
        content: files or folders that a folder with samples has.
    Raises:
        ValueError: it holds samples of other settings, or of nobody knows which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = json.loads(json.dumps(settings, default=str))
    file = folder / name
    if file.is_file():
        held = json.loads(file.read_text(encoding="utf-8"))
        if held != given:
            changes = "; ".join(f"{key}: {held.get(key)!r} there, {given.get(key)!r} now"
                                for key in sorted(held.keys() | given.keys()) if held.get(key) != given.get(key))
            raise ValueError(f"{folder} holds samples of other settings ({changes}); choose another folder, or give the same settings")
    elif any((folder / one).exists() for one in content):
        raise ValueError(f"{folder} holds samples but no {name}; choose another folder")
    else:
        write_lines(file, [json.dumps(given, ensure_ascii=False, indent=1)])


def whole_lines(file: Path) -> list[str]:
    """The lines of a file that was appended to; a last one that was being written when the writer was killed is cut off."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as open_file:
            open_file.truncate(len(whole))
    return whole.decode("utf-8").split("\n")[:-1]  # splitlines would also cut at the line separators that texts may hold


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Replace a text file in one step: readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)
