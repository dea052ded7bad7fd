"""The folder that is a run's result, and the only writer of its logs.

    config.yaml      the resolved configuration
    metrics.jsonl    one row per iteration; equal runs have equal files
    timings.jsonl    wall-clock seconds per phase, kept apart for that reason
    samples/LABEL    media of an evaluation, before, after and between; evaluations/LABEL.json has their scores
    evaluation.json  before against after, with intervals
    stopping.json    why the guards ended the run, if they did; adapter and "after" are then those of the best evaluation
    checkpoints/     see ``checkpoint``
    adapter/         the trained weights, for the pipeline's own library
    report.html      all of it to look at
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from visalign import checkpoint
from visalign.checkpoint import Checkpoint
from visalign.config import Config, dump_config
from visalign.evaluation import Evaluation, write_comparison
from visalign.guards.alarm import Alarm
from visalign.tracking import METRICS, JsonlTracker, Tracker, open_trackers

TIMINGS = "timings.jsonl"
BEFORE, AFTER = "before", "after"


def evaluation_label(iteration: int) -> str:
    """What the evaluation after so many iterations is kept under while the run goes on."""
    return f"iteration-{iteration:06d}" if iteration else BEFORE


class RunFolder:
    """One run's folder; on other processes than the main one (``writes`` false) nothing is opened or written."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.checkpoints, self.adapter, self.stopping = path / "checkpoints", path / "adapter", path / "stopping.json"
        self._trackers: list[Tracker] = []
        self._timings: Tracker | None = None

    def samples(self, label: str) -> Path:
        return self.path / "samples" / label

    def evaluation(self, label: str) -> Path:
        return self.path / "evaluations" / f"{label}.json"

    def open(self, config: Config, saved: Checkpoint | None) -> None:
        """Cut the logs back to what they held at the checkpoint (to nothing without one), and open them.

        Raises:
            ValueError: a tracker is not installed.
            CheckpointError: ``metrics.jsonl`` is shorter than it was then.
        """
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        metrics, timings = self.path / METRICS, self.path / TIMINGS
        if saved is not None or metrics.exists():
            checkpoint.truncate(metrics, 0 if saved is None else int(saved.state["metrics_bytes"]))
        if timings.exists():
            # By row, not by size: wall-clock digits would make the checkpoints of equal runs differ.
            rows = timings.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = 0 if saved is None else int(saved.state["iteration"]) + 1  # the row of the first evaluation precedes iteration 0
            timings.write_text("".join(rows[:kept]), encoding="utf-8")
        if saved is not None and int(saved.state["iteration"]) < config.train.iterations:
            self._reopen(int(saved.state["iteration"]))
        (self.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        self._trackers = open_trackers(config.tracking, self.path, config.model_dump(mode="json"))
        self._timings = JsonlTracker(timings)

    def _reopen(self, iteration: int) -> None:
        """A run that had come to its end goes on: its last evaluation becomes one among others, which later ones are compared with."""
        kept = self.evaluation(evaluation_label(iteration))
        if self.evaluation(AFTER).is_file() and not kept.is_file() and not self.stopping.is_file():
            if self.samples(AFTER).is_dir():
                self.samples(AFTER).replace(self.samples(evaluation_label(iteration)))
            self.evaluation(AFTER).replace(kept)

    def log(self, iteration: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """One row in every tracker, and one of wall-clock numbers beside them."""
        for tracker in self._trackers:
            tracker.log(iteration, metrics)
        if self._timings is not None:
            self._timings.log(iteration, timings)

    def metrics_bytes(self) -> int:
        """Size of ``metrics.jsonl`` now; rows are flushed as they are logged."""
        return (self.path / METRICS).stat().st_size

    def settle(self, alarm: Alarm | None, last: int) -> None:
        """If an alarm ended the run, say so in ``stopping.json`` and make the evaluation of its best weights the one after training."""
        if not self.writes:
            return
        if alarm is None:
            self.stopping.unlink(missing_ok=True)
            return
        alarm.write(self.stopping)  # first: whoever resumes from here on must not judge the evaluation that follows as the latest
        if alarm.best != last:
            label = evaluation_label(alarm.best)
            shutil.copyfile(self.evaluation(label), self.evaluation(AFTER))
            shutil.rmtree(self.samples(AFTER), ignore_errors=True)
            shutil.copytree(self.samples(label), self.samples(AFTER))

    def conclude(self) -> None:
        """Write before against after, and the report."""
        before, after = self.evaluation(BEFORE), self.evaluation(AFTER)
        if before.exists() and after.exists():
            write_comparison(self.path / "evaluation.json", Evaluation.read(before), Evaluation.read(after))
        from visalign.report import write_report  # matplotlib is slow to import and only needed here

        write_report(self.path)

    def close(self) -> None:
        for tracker in [*self._trackers, *([self._timings] if self._timings is not None else [])]:
            tracker.close()
