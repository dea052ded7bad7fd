"""Preference data sets of any layout as ``PreferenceDataset``.

    load_preferences("pairs.jsonl")                                 our own format, see ``jsonl``
    load_preferences("pairs/")                                      a folder that ``visalign pairs`` wrote
    load_preferences("pickapic/data", ties="skip")                  parquet or arrow files, or a saved Hugging Face data set
    load_preferences("org/dataset", split="train", limit=10_000)    from the hub
    load_preferences("HPDv2/train.json", folder="HPDv2/train")      a JSON list, media relative to ``folder``

The layout is recognised by its columns or named with ``format`` (see ``layouts``). Every row that cannot be used is reported; nothing
is left out unless the caller says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from visalign.preferences.candidates import Candidate, MediaCell
from visalign.preferences.jsonl import media_files, parse_prompt, parse_row, read_jsonl
from visalign.preferences.layouts import FORMATS, Layout, sniff
from visalign.preferences.records import Broken, Content, PreferenceDataset, PreferenceRecord, Problem, RowError, Ties, collect

INDEX = "preferences.jsonl"
_READERS: Mapping[str, Callable[[Any, list[str]], Any]] = {
    ".parquet": lambda datasets, files: datasets.Dataset.from_parquet(files),
    ".arrow": lambda datasets, files: datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files]),
}


def load_preferences(source: str | Path, *, format: str | None = None, ties: Ties = "error", broken: Broken = "error",
                     folder: str | Path | None = None, split: str = "train", limit: int | None = None,
                     content: Content = "latents") -> PreferenceDataset:
    """All judgements of a source, in its order.

    Files are looked for and judgements checked; media are opened when their latents are made (``latents.cached_latents``).

    Args:
        format: "jsonl", "pickapic", "hpd" or "align_anything"; ``None`` recognises it by the columns.
        ties: judgements that prefer nothing: "error" reports them, "skip" leaves them out, "keep" keeps them.
        broken: any other row that cannot be used: "error" reports it, "skip" leaves it out and counts it.
        folder: what media paths are relative to; ``None`` for the folder of the source.
        split: of a Hugging Face data set.
        limit: rows to read.
        content: what rows of our format that hold both latents and media are read as; "media" to train a reward.
    Raises:
        PreferenceError: rows that cannot be used, all of them.
        ValueError: there is no such source, its layout is unknown, or no row can be used.
    """
    path = Path(source)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if format is not None and format != "jsonl" and format not in FORMATS:
        raise ValueError(f"format '{format}': use jsonl, {', '.join(FORMATS)}")
    path = path / INDEX if (path / INDEX).is_file() else path
    base = Path(folder) if folder is not None else path.parent
    if path.suffix == ".jsonl" and path.is_file() and format in (None, "jsonl"):
        rows = read_jsonl(path, base, content)
    elif path.suffix in (".json", ".jsonl"):
        rows = _from_objects(path, base, format, content)
    else:
        table = _open_table(str(source), path, split)
        rows = _from_table(table, str(source), Path(folder) if folder is not None else path, format)
    taken = rows if limit is None else (found for found, _ in zip(rows, range(limit), strict=False))
    return collect(str(source), taken, ties=ties, broken=broken)


def _from_objects(path: Path, folder: Path, format: str | None, content: Content) -> Iterator[PreferenceRecord | Problem]:
    """A JSON list of objects, or one object per line in a layout that is not ours."""
    if not path.is_file():
        raise ValueError(f"preferences '{path}': no such file (looked in {path.parent.resolve()})")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, one per judgement")
    if not rows:
        return
    ours = format == "jsonl" or (format is None and ("media" in rows[0] or "chosen" in rows[0] or "latents" in rows[0]))
    layout = None if ours else _layout(format, list(rows[0]), str(path))
    for number, values in enumerate(rows):
        try:
            if layout is None:
                yield parse_row(values, folder, number, content)
            else:
                media = media_files(layout.media(values), folder)
                yield _record(layout, values, media, folder, number)
        except RowError as error:
            yield Problem(number, error.fault, str(error))


def _from_table(table: Any, source: str, folder: Path, format: str | None) -> Iterator[PreferenceRecord | Problem]:
    """Rows of a ``datasets.Dataset``; columns of media are not read."""
    layout = _layout(format, table.column_names, source)
    media = [column for column in layout.columns if column in table.column_names]
    table = _undecoded(table, media)
    binary = [column for column in media if _is_binary(table.features[column])]
    cells, light = {column: table.select_columns([column]) for column in binary}, table.remove_columns(binary)
    for number, values in enumerate(light):
        try:
            candidates: tuple[Candidate, ...]
            if binary:
                candidates = tuple(MediaCell(partial(_cell, cells[column], number, column), column, layout.suffix,
                                             f"{table._fingerprint}|{number}|{column}") for column in binary)
            else:
                candidates = media_files(layout.media(values), folder)
            yield _record(layout, values, candidates, folder, number)
        except RowError as error:
            yield Problem(number, error.fault, str(error))


def _record(layout: Layout, values: Mapping[str, Any], candidates: tuple[Candidate, ...], folder: Path, row: int) -> PreferenceRecord:
    scores = layout.scores(values, len(candidates))
    user = values.get(layout.user) if layout.user else None
    extra = {} if user is None else {"user": str(user)}
    prompt = parse_prompt({"prompt": next((values[key] for key in layout.prompt if values.get(key) is not None), None)}, folder, extra)
    return PreferenceRecord(prompt, candidates, scores, row, extra.get("user"))


def _layout(format: str | None, columns: Sequence[str], source: str) -> Layout:
    found = sniff(columns, format)
    if found is None:
        known = "; ".join(f"{name}: {' or '.join(', '.join(layout.signature) for layout in layouts)}"
                          for name, layouts in FORMATS.items() if format in (None, name))
        raise ValueError(f"{source}: no known layout has the columns {', '.join(columns)}. Known are {known}. "
                         "Write it as JSONL: {\"prompt\": ..., \"media\": [...], \"scores\": [...]}")
    return found


def _open_table(source: str, path: Path, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"preferences '{source}': reading tables needs datasets: pip install 'visalign[data]' (or give a .jsonl file)"
                         ) from None
    if path.suffix in _READERS and path.is_file():
        return _READERS[path.suffix](datasets, [str(path)])
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise ValueError(f"{source} has no split '{split}'; it has {', '.join(loaded)}")
                return loaded[split]
            return loaded
        for suffix, read in _READERS.items():
            files = sorted(map(str, path.rglob(f"*{suffix}")))
            if chosen := [file for file in files if Path(file).name.startswith(split)] or files:
                return read(datasets, chosen)
        raise ValueError(f"preferences '{source}': no {INDEX}, parquet or arrow file in {path.resolve()}")
    if path.exists() or source.startswith((".", "/", "~")) or path.suffix:
        raise ValueError(f"preferences '{source}': {'not a known kind of file' if path.exists() else 'no such file or folder'}; expected "
                         ".jsonl, .json, .parquet, .arrow, a folder of them, or org/name of a data set on the hub")
    return datasets.load_dataset(source, split=split)


def _undecoded(table: Any, columns: Sequence[str]) -> Any:
    """Image, audio and video features as their encoded bytes, which is what the cache is keyed by."""
    import datasets

    for column in columns:
        feature = table.features[column]
        for kind in (datasets.Image, datasets.Audio, getattr(datasets, "Video", datasets.Image)):
            if isinstance(feature, kind):
                table = table.cast_column(column, kind(decode=False))
    return table


def _is_binary(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary") or type(feature).__name__ in ("Image", "Audio", "Video")


def _cell(table: Any, row: int, column: str) -> Any:
    return table[row][column]
