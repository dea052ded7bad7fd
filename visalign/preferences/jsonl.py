"""Our own format: one JSON object per line, media by path relative to the file.

    {"prompt": "a red circle", "media": ["a.png", "b.png"], "scores": [0.7, 0.2]}
    {"prompt": "a red circle", "chosen": "a.png", "rejected": "b.png"}
    {"prompt": "a red circle", "media": ["a.png", "b.png", "c.png"], "ranking": [2, 1, 3]}             place of each, 1 the best
    {"prompt": "a red circle", "media": ["a.mp4", "b.mp4"], "label": [1, 0], "user": "u7", "weight": 0.5}
    {"prompt": "a red circle", "latents": "000012.safetensors", "rows": [3, 0], "scores": [0.7, 0.2]}   no encoder needed; or a
                                                                        list of files, with "rows" all 0 unless they are given

    {"prompt": "a red circle", "media": ["a.png", "b.png"], "label": [1, 0], "ratings": {"colour": [0.9, 0.1], "shape": [null, 1]}}

``media`` may be images (png, jpg, webp, bmp), videos (mp4, mov, webm) or audio (wav, flac). Where both are given, generators are
trained on ``latents`` and rewards on ``media``. ``ratings`` hold a number or null per candidate for every aspect, see ``ratings``.
``negative_prompt``, ``images`` (conditions) and ``metadata`` are those of prompt files; every further key becomes metadata of the prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visalign.data import prompt_from_row
from visalign.preferences.candidates import Candidate, MediaFile, StoredLatent
from visalign.preferences.content import KINDS
from visalign.preferences.judgements import as_scores, scores_of_ranking
from visalign.preferences.records import Content, PreferenceDataset, PreferenceRecord, Problem, RowError
from visalign.resumable import write_lines
from visalign.settings import did_you_mean
from visalign.types import Prompt

KEYS = ("media", "chosen", "rejected", "latents", "rows", "scores", "ranking", "label", "user", "weight")
_JUDGEMENTS = ("scores", "ranking", "label")
_PROMPT_KEYS = ("prompt", "text", "negative_prompt", "images", "metadata", "ratings")


def read_jsonl(path: Path, folder: Path | None = None, content: Content = "latents") -> Iterator[PreferenceRecord | Problem]:
    """Every non-empty line of a file as a record, or as what is wrong with it; rows count those lines from 0.

    Paths are relative to ``folder``, or to the file.
    """
    row = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield parse_row(_object(raw, number), folder or path.parent, row, content)
            except RowError as error:
                yield Problem(row, error.fault, f"(line {number}) {error}")
            row += 1


def _object(raw: bytes, number: int) -> Mapping[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("format", f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise RowError("format", f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise RowError("format", f"expected an object, got {type(value).__name__}")
    return value


def parse_row(values: Mapping[str, Any], folder: Path, row: int, content: Content = "latents") -> PreferenceRecord:
    """One object of our format as a record; every path is looked for.

    Args:
        content: what the candidates of a row with both are; rows with one of them give that one.
    Raises:
        RowError: what is wrong with it.
    """
    for key in values:
        if key not in (*KEYS, *_PROMPT_KEYS) and (suggestion := did_you_mean(str(key), KEYS)):
            raise RowError("format", f"unknown key '{key}'{suggestion} (put it under 'metadata' if it is meant)")
    stored = "latents" in values and not (content == "media" and "media" in values)
    candidates = _latents(values, folder) if stored else _media(values, folder)
    user, weight = values.get("user"), values.get("weight", 1.0)
    if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
        raise RowError("format", f"'weight' must be a number above 0, got {weight!r}")
    extra = {"user": str(user)} if user is not None else {}
    prompt = parse_prompt({key: value for key, value in values.items() if key not in KEYS}, folder,
                          {**extra, **({"weight": float(weight)} if "weight" in values else {})})
    return PreferenceRecord(prompt, candidates, _scores(values, len(candidates)), row, extra.get("user"), float(weight))


def parse_prompt(values: Mapping[str, Any], folder: Path, metadata: Mapping[str, Any]) -> Prompt:
    """The prompt of a row, with ``metadata`` beside its own.

    Raises:
        RowError: it is missing, empty or of a wrong type.
    """
    text = values.get("prompt", values.get("text"))
    if text is None or (isinstance(text, str) and not text.strip()):
        raise RowError("empty prompt", "the prompt is missing or empty")
    try:
        prompt = prompt_from_row(values, folder)
    except ValueError as error:
        raise RowError("format", str(error)) from None
    return Prompt(prompt.text, prompt.negative, prompt.images, {**prompt.metadata, **metadata})


def _media(values: Mapping[str, Any], folder: Path) -> tuple[Candidate, ...]:
    if ("media" in values) == ("chosen" in values or "rejected" in values):
        raise RowError("format", f"needs 'media', or 'chosen' and 'rejected', or 'latents' (keys: {', '.join(values) or 'none'})")
    paths = values["media"] if "media" in values else [values.get("chosen"), values.get("rejected")]
    return media_files(paths, folder)


def media_files(paths: Any, folder: Path) -> tuple[Candidate, ...]:
    """Paths relative to ``folder`` as candidates.

    Raises:
        RowError: not paths, a file is missing, or no reader knows its suffix.
    """
    if not isinstance(paths, Sequence) or isinstance(paths, str) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise RowError("format", f"expected the paths of the candidates, got {paths!r}")
    files = [folder / path for path in paths]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise RowError("missing file", f"no such file: {', '.join(missing)}")
    if unknown := [file.name for file in files if file.suffix.lower() not in KINDS]:
        raise RowError("unreadable", f"unknown suffix: {', '.join(unknown)}; expected {', '.join(sorted(KINDS))}")
    return tuple(MediaFile(file) for file in files)


def _latents(values: Mapping[str, Any], folder: Path) -> tuple[Candidate, ...]:
    """``latents`` is one file, whose ``rows`` are the candidates, or one file per candidate."""
    given = values["latents"]
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) and Path(name).suffix == ".safetensors" for name in names):
        raise RowError("format", f"'latents' must be the path of a safetensors file, or one per candidate, got {given!r}")
    rows = values.get("rows", [0] * len(names) if isinstance(given, list) else None)
    if not isinstance(rows, list) or not rows or not all(isinstance(k, int) and k >= 0 for k in rows):
        raise RowError("format", f"'rows' must list the rows of 'latents' that are the candidates, got {rows!r}")
    names = names if isinstance(given, list) else names * len(rows)
    if len(names) != len(rows) or len(values.get("media", rows)) != len(rows):
        raise RowError("candidates", f"{len(rows)} rows of {len(names)} files of latents for {len(values.get('media', rows))} media")
    if missing := sorted({str(folder / name) for name in names if not (folder / name).is_file()}):
        raise RowError("missing file", f"no such file: {', '.join(missing)}")
    return tuple(StoredLatent(folder / name, k) for name, k in zip(names, rows, strict=True))


def _scores(values: Mapping[str, Any], num: int) -> tuple[float, ...]:
    given = [key for key in _JUDGEMENTS if key in values]
    if "chosen" in values and not given:
        return 1.0, 0.0
    if len(given) != 1:
        raise RowError("judgement", f"needs exactly one of {', '.join(_JUDGEMENTS)}, found {' and '.join(given) or 'none'}")
    read = scores_of_ranking if given[0] == "ranking" else as_scores
    return read(values[given[0]], num, given[0])


def write_jsonl(dataset: PreferenceDataset, path: Path) -> None:
    """A data set whose candidates are files as one file of our format: read back, it is the same data set.

    After ``cached_latents`` this is a data set that needs no encoder, and whose media need not be read again.

    Raises:
        ValueError: a candidate is a cell of a table; keep latents of it first.
    """
    lines = []
    for record in dataset.records:
        media, latents = [], []
        for candidate in record.candidates:
            if isinstance(candidate, MediaFile):
                media.append(_relative(candidate.path, path.parent))
            elif isinstance(candidate, StoredLatent):
                latents.append(candidate)
            else:
                raise ValueError(f"row {record.row}: {candidate.name} is in a table, not in a file; call cached_latents first")
        if media and latents:
            raise ValueError(f"row {record.row} has both media and latents; call cached_latents first")
        metadata = {key: value for key, value in record.prompt.metadata.items() if key not in ("user", "weight")}
        values = {"prompt": record.prompt.text, "negative_prompt": record.prompt.negative,
                  "images": [_relative(Path(image), path.parent) for image in record.prompt.images], "metadata": metadata,
                  "media": media, "latents": [_relative(one.path, path.parent) for one in latents], "rows": [one.row for one in latents],
                  "scores": list(record.scores), "user": record.user, "weight": record.prompt.metadata.get("weight")}
        lines.append(json.dumps({key: value for key, value in values.items() if value not in (None, [], {})}, ensure_ascii=False))
    write_lines(path, lines)


def _relative(path: Path, folder: Path) -> str:
    """Relative to ``folder`` where it lies below, else absolute: what it is joined with when it is read."""
    path, folder = path.resolve(), folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
