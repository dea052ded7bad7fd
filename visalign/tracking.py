"""Where metrics go: ``metrics.jsonl`` always, tensorboard, wandb or trackio when a run asks for them.

Metrics are ``dict[str, float]`` with ``area/name`` keys, one call per iteration, on the main process only. A tracker's
package is imported when it is opened, and a missing one is an error before anything is generated.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Receives the numbers of every iteration."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Numbers of iteration ``iteration``; -1 is the state before the first. A name may be absent in some (evaluations)."""

    def close(self) -> None:
        """Flush and release; nothing is logged afterwards."""


class JsonlTracker:
    """One JSON object per line, ``{"iteration": 3, "reward/captions": 0.61, ...}``; a non-finite number becomes ``null``."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        row = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"iteration": iteration, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorboardTracker:
    """Event files under ``<run>/tensorboard``; look with ``tensorboard --logdir <run>``."""

    def __init__(self, run_dir: Path) -> None:
        self._writer = _require("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration + 1)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run named after the run folder; project and mode come from wandb's own environment variables."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        # A stable id makes a resumed run continue the same curves.
        self._run = _require("wandb").init(dir=str(run_dir), name=run_dir.name, id=run_dir.name, resume="allow", config=dict(settings))

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=iteration + 1)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """A trackio run named after the run folder, in the project ``visalign``."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._run = _require("trackio").init(project="visalign", name=run_dir.name, resume="allow", config=dict(settings))

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=iteration + 1)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Sequence[str], run_dir: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Trackers by the names of ``tracking`` in a configuration.

    Args:
        settings: the resolved configuration, shown by the trackers that can.
    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    makers: Mapping[str, Callable[[], Tracker]] = {
        "jsonl": lambda: JsonlTracker(run_dir / METRICS),
        "tensorboard": lambda: TensorboardTracker(run_dir),
        "wandb": lambda: WandbTracker(run_dir, settings),
        "trackio": lambda: TrackioTracker(run_dir, settings),
    }
    if unknown := [name for name in names if name not in makers]:
        raise ValueError(f"unknown tracker {', '.join(unknown)}; use {', '.join(makers)}")
    return [makers[name]() for name in names]


def read_metrics(run_dir: Path, name: str = METRICS) -> list[dict[str, float]]:
    """Rows of ``metrics.jsonl`` (or another log of the run) in order, each with its ``iteration``; ``null`` reads as NaN.

    Raises:
        ValueError: there is no such file, or a line in the middle is damaged. A torn last line (a killed run) is left out.
    """
    path = run_dir / name
    if not path.is_file():
        raise ValueError(f"{run_dir} has no {name}: is it the folder of a run?")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append({key: math.nan if value is None else value for key, value in json.loads(line).items()})
        except (json.JSONDecodeError, AttributeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
    return rows


def _require(module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        name = package or module
        raise ValueError(f"tracking: {name} is not installed; pip install {name} (or 'visalign[track]'), "
                         "or take it out of tracking") from None
