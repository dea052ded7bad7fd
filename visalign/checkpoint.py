"""Checkpoints that survive a kill at any instant, and are safe to read back.

    checkpoints/000040/            one complete checkpoint; it appears by a single rename or not at all
        weights.safetensors ...    tensors by stable name, one file per part
        state.json                 every number that is not a tensor
        manifest.json              sha256 and size of each file; written last

A folder without a manifest, or whose files do not match it, is not a checkpoint: resuming says so and takes the one before.
Only safetensors and JSON are read. A pickle runs code when it is opened, so one in a checkpoint folder is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}

Tensors = Mapping[str, Mapping[str, Tensor]]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back.

    Attributes:
        path: its folder.
        tensors: part -> name -> tensor, on the CPU.
        state: everything else.
    """

    path: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(root: Path, iteration: int, tensors: Tensors, state: Mapping[str, Any], *, keep: int, score: float | None = None) -> Path:
    """Write ``root/<iteration>`` atomically, then drop all but the last ``keep`` and the one with the highest ``score``.

    Args:
        tensors: part -> name -> tensor, each part becomes one safetensors file.
        state: JSON-serialisable; non-finite floats are refused.
        score: the larger the better; ``None`` for never best.
    Raises:
        CheckpointError: the disk is full. Nothing that was there before is touched.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    final, partial = root / f"{iteration:06d}", root / f".partial-{iteration:06d}-{os.getpid()}"
    try:
        _write(partial, tensors, {**state, "iteration": iteration}, score)
        if final.exists():  # a run resumed from before this iteration overwrites what it left behind
            final.rename(root / f".partial-{iteration:06d}-replaced")
        partial.rename(final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not _disk_is_full(error):
            raise
        last = latest(root)
        raise CheckpointError(f"no space left on the disk of {root} while saving iteration {iteration}. Free space (this checkpoint "
                              f"needs about {_megabytes(tensors)} MB), or lower checkpoint.keep, then resume the run; "
                              + (f"the last good checkpoint is {last}" if last else "no checkpoint had been written before")) from error
    _remove_leftovers(root)
    _prune(root, keep)
    return final


def load(path: Path) -> Checkpoint:
    """Read one checkpoint, verifying every file against its manifest.

    Raises:
        CheckpointError: it is incomplete, corrupt, holds a pickle, or was written by a newer visalign.
    """
    manifest = _verified_manifest(path)
    tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in manifest["files"] if name.endswith(".safetensors")}
    return Checkpoint(path=path, tensors=tensors, state=json.loads((path / STATE).read_text(encoding="utf-8")))


def latest(root: Path) -> Path | None:
    """The newest valid checkpoint; every newer folder that is not one is reported with its fault and skipped.

    Raises:
        CheckpointError: a checkpoint folder holds a pickle.
    """
    for path in reversed(_folders(root)):
        try:
            _verified_manifest(path)
        except PickleRefusedError:
            raise
        except CheckpointError as error:
            logger.warning("skipping %s: %s", path, error)
            continue
        return path
    return None


class PickleRefusedError(CheckpointError):
    """A checkpoint folder holds a file that could run code when opened."""


def _write(folder: Path, tensors: Tensors, state: Mapping[str, Any], score: float | None) -> None:
    folder.mkdir()
    for part, named in tensors.items():
        # safetensors refuses views and shared storage; a checkpoint holds plain copies on the CPU.
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}, folder / f"{part}.safetensors")
    (folder / STATE).write_text(json.dumps(state, allow_nan=False, indent=1), encoding="utf-8")
    files = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "score": score, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, allow_nan=False, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _verified_manifest(path: Path) -> dict[str, Any]:
    pickles = sorted(p.name for p in path.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise PickleRefusedError(f"{path} holds {', '.join(pickles)}: visalign never opens pickles, they run code when read. Its own "
                                 "checkpoints are safetensors and JSON only; move the file away if you trust the folder without it")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"incomplete: no {MANIFEST}; the run was stopped while writing it")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"corrupt: {MANIFEST} cannot be read ({error})") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"written in checkpoint format {manifest.get('format')}, this visalign reads {FORMAT}; "
                              "use the version that wrote it")
    for name, (digest, size) in entries.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"incomplete: {name} is missing")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise CheckpointError(f"corrupt: {name} does not match its sha256 in {MANIFEST}")
    if STATE not in entries:
        raise CheckpointError(f"incomplete: {STATE} is missing")
    return dict(manifest)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("*") if p.is_dir() and re.fullmatch(r"\d{6,}", p.name)) if root.is_dir() else []


def best(root: Path) -> Path | None:
    """The checkpoint with the highest score, the latest among equals; ``None`` where none has a score."""
    manifests = {path: path / MANIFEST for path in _folders(root)}
    scores = {path: json.loads(file.read_text(encoding="utf-8")).get("score") for path, file in manifests.items() if file.is_file()}
    scored = [path for path, score in scores.items() if score is not None]
    return max(scored, key=lambda path: (scores[path], path.name)) if scored else None


def _prune(root: Path, keep: int) -> None:
    kept = best(root)
    for path in _folders(root)[:-keep]:
        if path != kept:
            # Renamed first, so that a kill during the deletion never leaves a folder that looks like a checkpoint.
            doomed = root / f".partial-{path.name}-pruned"
            path.rename(doomed)
            shutil.rmtree(doomed)


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(".partial-*"):
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _disk_is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    # safetensors writes from Rust and reports the operating system's error in words.
    return (isinstance(error, OSError) and error.errno in full) or any(f"os error {number})" in str(error) for number in full)


def _megabytes(tensors: Tensors) -> int:
    return 1 + sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values()) // 2**20


# --- State that is not yet tensors and JSON -------------------------------------------------------------------------------------


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as tensors named ``<parameter number>.<key>`` and JSON: hyper-parameters and non-tensor entries."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in whole["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    return tensors, {"groups": whole["param_groups"], "numbers": numbers}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Inverse of :func:`flatten_optimizer`; bit-exact."""
    entries: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *state["numbers"].items()]:
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = value
    # JSON knows no tuples; torch.optim compares and unpacks betas as one.
    groups = [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in state["groups"]]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the torch (CPU and current CUDA), numpy and python generators of this process, as tensors and JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, words, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"numpy": [str(kind), int(position), int(has_gauss), float(cached)], "python": [version, list(words), gauss]}


def restore_rng(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Inverse of :func:`rng_state`."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    kind, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def truncate(path: Path, size: int) -> None:
    """Cut a log back to what it held when the checkpoint was taken, so that a resumed run does not write lines twice.

    Raises:
        CheckpointError: the file is shorter than it was then.
    """
    have = path.stat().st_size if path.exists() else 0
    if have < size:
        raise CheckpointError(f"{path} has {have} bytes, but had {size} when the checkpoint was written; "
                              "restore the file, or start a new run folder")
    if have > size:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own global generators and put the old ones back."""
    tensors, state = rng_state()
    seed_everything(seed)
    try:
        yield
    finally:
        restore_rng(tensors, state)


def seed_everything(seed: int) -> None:
    """Seed the global torch, numpy and python generators; ``seed`` is any 63-bit integer."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
