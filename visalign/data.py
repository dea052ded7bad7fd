"""Prompts in, groups out.

    load_prompts("prompts.txt")            one prompt per line
    load_prompts("prompts.jsonl")          {"prompt": ..., "negative_prompt": ..., "images": [...], "metadata": {...}}, or GenEval's lines
    load_prompts("prompts.csv")            UniGenBench's file: prompts with test points
    load_prompts("playground:train")       the embedded world (also playground:heldout, heldout/1, another draw, and geneval)
    load_prompts(DatasetConfig(...))       a Hugging Face dataset, from the hub or a local folder

A prompt is identified by its position, never by its text: equal or differently-cased texts stay different prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visalign.compare import unigenbench
from visalign.config import DatasetConfig
from visalign.settings import did_you_mean
from visalign.types import Prompt

# Drawn in the proportions the embedded models were trained with; the whole grammar is nearly all pairs of shapes.
NUM_PLAYGROUND_PROMPTS = 2048
_MAX_SHOWN = 20
_KEYS = ("prompt", "text", "negative_prompt", "images", "metadata")


class PromptError(ValueError):
    """Every bad line of a prompt source, one message each in ``problems``."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        more = [f"... and {len(self.problems) - _MAX_SHOWN} more"] if len(self.problems) > _MAX_SHOWN else []
        noun = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{noun} in {source}:\n" + "\n".join(f"  - {line}" for line in [*self.problems[:_MAX_SHOWN], *more]))


def load_prompts(source: str | Path | DatasetConfig) -> list[Prompt]:
    """All prompts of a source, in its order.

    Raises:
        PromptError: every bad line with its number; or nothing to read.
        ValueError: the source's kind is unknown.
    """
    if isinstance(source, DatasetConfig):
        return _from_dataset(source)
    name = str(source)
    if name.startswith("playground:"):
        return _from_playground(name)
    path = Path(name)
    readers: dict[str, Callable[[str, Path], Prompt]] = {".txt": _text_line, ".jsonl": _json_line}
    if path.suffix not in (*readers, ".csv"):
        raise ValueError(f"prompts '{name}': expected a .txt, .jsonl or UniGenBench's .csv file, playground:train, playground:heldout, "
                         "playground:geneval, or {dataset: ..., column: ...} for a Hugging Face dataset")
    if not path.is_file():
        raise ValueError(f"prompts '{name}': no such file (looked in {path.parent.resolve()})")
    return _from_csv(path) if path.suffix == ".csv" else _from_lines(path, readers[path.suffix])


def _from_csv(path: Path) -> list[Prompt]:
    prompts, problems = unigenbench.read_rows(path)
    if problems or not prompts:
        raise PromptError(str(path), problems or ["no rows"])
    return prompts


def _from_lines(path: Path, read: Callable[[str, Path], Prompt]) -> list[Prompt]:
    prompts, problems = [], []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            byte = f"byte {error.object[error.start]:#04x} at column {error.start + 1}"
            problems.append(f"line {number}: not UTF-8 ({byte}); save the file as UTF-8")
            continue
        if not line:
            continue
        try:
            prompts.append(read(line, path.parent))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not prompts and not problems:
        problems.append("no prompts: every line is empty")
    if problems:
        raise PromptError(str(path), problems)
    return prompts


def _text_line(line: str, _: Path) -> Prompt:
    controls = sorted({f"{ord(c):#04x}" for c in line if ord(c) < 32 and c != "\t"})
    if controls:
        raise ValueError(f"control characters {', '.join(controls)}; is this a text file?")
    return Prompt(text=line)


def _json_line(line: str, folder: Path) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f'expected an object such as {{"prompt": "a red circle"}}, got {type(row).__name__}')
    return prompt_from_row(row, folder)


def prompt_from_row(row: Mapping[str, Any], folder: Path) -> Prompt:
    """One JSON object. Keys beside the known ones become metadata, unless they look like a misspelt known one."""
    if ("prompt" in row) == ("text" in row):
        found = "both 'prompt' and 'text'" if "prompt" in row else f"neither (keys: {', '.join(map(str, row)) or 'none'})"
        raise ValueError(f"needs exactly one of 'prompt' and 'text', found {found}")
    others = {key: value for key, value in row.items() if key not in _KEYS}
    for key in others:
        if suggestion := did_you_mean(key, _KEYS):
            raise ValueError(f"unknown key '{key}'{suggestion} (put it under 'metadata' if it is meant)")
    text, negative = row.get("prompt", row.get("text")), row.get("negative_prompt")
    images, metadata = row.get("images", []), row.get("metadata", {})
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the prompt must be a non-empty string, got {text!r}")
    if not (negative is None or isinstance(negative, str)):
        raise ValueError(f"'negative_prompt' must be a string, got {negative!r}")
    if not (isinstance(images, list) and all(isinstance(image, str) for image in images)):
        raise ValueError(f"'images' must be a list of paths, got {images!r}")
    if not isinstance(metadata, dict):
        raise ValueError(f"'metadata' must be an object, got {metadata!r}")
    if both := sorted(metadata.keys() & others.keys()):
        raise ValueError(f"{', '.join(both)} is given both beside and inside 'metadata'")
    paths = [folder / image for image in images]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ValueError(f"no such image: {', '.join(missing)} (paths are relative to the prompt file)")
    return Prompt(text=text, negative=negative, images=tuple(map(str, paths)), metadata={**others, **metadata})


def _from_playground(name: str) -> list[Prompt]:
    from visalign import playground

    which, _, draw = name.removeprefix("playground:").partition("/")
    if which == "train" and not draw:
        return [Prompt(text) for text in playground.train_prompts(NUM_PLAYGROUND_PROMPTS)]
    if which == "heldout" and (not draw or draw.isdecimal()):
        return [Prompt(text) for text in playground.heldout_prompts(seed=int(draw or 0))]
    if which == "geneval" and not draw:
        return [prompt_from_row(row, Path()) for row in playground.geneval_rows()]
    raise ValueError(f"prompts '{name}': the playground has no such set; it has train, heldout, other draws of the held-out prompts "
                     "as heldout/1, heldout/2, ..., and geneval")


def _from_dataset(source: DatasetConfig) -> list[Prompt]:
    try:
        import datasets
    except ImportError:
        raise ValueError("reading a Hugging Face dataset needs the package datasets: pip install datasets") from None
    local = Path(source.dataset)
    if (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(source.dataset)
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                raise ValueError(f"dataset '{source.dataset}' has no split '{source.split}'; it has {', '.join(loaded)}")
            loaded = loaded[source.split]
    else:
        loaded = datasets.load_dataset(source.dataset, split=source.split)
    wanted = [source.column, *([source.negative_column] if source.negative_column else []), *source.metadata_columns]
    if missing := [column for column in wanted if column not in loaded.column_names]:
        has = ", ".join(loaded.column_names)
        raise ValueError(f"dataset '{source.dataset}' has no column {', '.join(missing)}; it has {has}")
    prompts, problems = [], []
    for number, row in enumerate(loaded.select_columns(wanted)):
        if source.limit is not None and number == source.limit:
            break
        negative = row[source.negative_column] if source.negative_column else None
        metadata = {key: row[key] for key in source.metadata_columns}
        try:
            prompts.append(prompt_from_row({"prompt": row[source.column], "negative_prompt": negative, "metadata": metadata}, local))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems or not prompts:
        raise PromptError(f"dataset '{source.dataset}'", problems or ["no rows"])
    return prompts


class GroupSampler:
    """Which prompts make the groups of each iteration: shuffled epochs, without replacement, the same on every process.

    Every epoch visits each prompt once. An iteration that spans two epochs never holds a prompt twice: what the old epoch
    has just given comes last in the new one. Every process draws the whole iteration and takes its own share of it.

    Args:
        num_prompts: prompts in the data, P_data.
        groups: prompts per iteration over all processes.
        seed: of the shuffles; epoch e depends on (seed, e) and on which prompts the running iteration already holds.
    Raises:
        ValueError: fewer prompts than groups.
    """

    def __init__(self, num_prompts: int, groups: int, seed: int) -> None:
        if not 1 <= groups <= num_prompts:
            raise ValueError(f"train.groups {groups} needs at least as many prompts, got {num_prompts}; "
                             f"use train.groups={num_prompts} or more prompts")
        self.num_prompts, self.groups, self.seed = num_prompts, groups, seed
        self.epoch, self.position = 0, 0
        self._order = self._shuffled(())

    def _shuffled(self, held: Sequence[int]) -> list[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_prompts).tolist()
        return [i for i in order if i not in set(held)] + [i for i in order if i in set(held)]

    def next(self) -> list[int]:
        """Prompt indices of the next iteration, ``groups`` different ones."""
        taken = self._order[self.position:self.position + self.groups]
        self.position += self.groups
        if self.position > self.num_prompts:
            self.position -= self.num_prompts
            self.epoch += 1
            self._order = self._shuffled(taken)
            taken = taken + self._order[:self.position]
        return taken

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; restoring it continues with the same iterations."""
        return {"num_prompts": self.num_prompts, "groups": self.groups, "seed": self.seed,
                "epoch": self.epoch, "position": self.position, "order": list(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: it was taken with other data, geometry or seed.
        """
        for name in ("num_prompts", "groups", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the checkpoint was written with {name} {state[name]}, this run has {getattr(self, name)}; "
                                 "resume with the same prompts, train.groups and train.seed, or start a new run")
        self.epoch, self.position, self._order = int(state["epoch"]), int(state["position"]), list(state["order"])
