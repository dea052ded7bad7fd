"""What a run tells whoever is watching. The loop calls these; the command line draws bars, a notebook may print, tests record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Callback(Protocol):
    """Calls come on the main process only, in this order: start, (phase ..., iteration) ..., end."""

    def on_start(self, first: int, total: int) -> None:
        """Iterations ``first`` .. ``total - 1`` will run; ``first`` > 0 after a resume."""

    def on_phase(self, name: str, done: int, total: int) -> None:
        """Inside an iteration: ``done`` of ``total`` parts of phase ``name`` ("sample", "score", "update", "evaluate", "save")."""

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Iteration ``iteration`` is complete; its metrics as logged."""

    def on_end(self) -> None:
        """The run is over, whether it succeeded or not."""


class Silent:
    """Watches nothing."""

    def on_start(self, first: int, total: int) -> None: ...

    def on_phase(self, name: str, done: int, total: int) -> None: ...

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None: ...

    def on_end(self) -> None: ...


class Bars:
    """Two live bars: the run with its remaining time, and the phase it is in; the latest numbers beside them.

    On anything but a terminal it prints one line every ``every`` seconds instead, so that logs stay readable.
    """

    def __init__(self, console: Console | None = None, every: float = 30.0) -> None:
        self.console = console or Console(stderr=True)
        self.every = every
        self._live = self.console.is_terminal
        self._progress = Progress(SpinnerColumn(), TextColumn("{task.description:<9}"), BarColumn(bar_width=28), MofNCompleteColumn(),
                                  TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
                                  console=self.console)
        self._started = self._printed = 0.0
        self._first = self._total = 0

    def on_start(self, first: int, total: int) -> None:
        self._started = self._printed = time.monotonic()
        self._first, self._total = first, total
        if self._live:
            self._run = self._progress.add_task("iteration", total=total, completed=first, note="")
            self._phase = self._progress.add_task("", total=None, note="")
            self._progress.start()

    def on_phase(self, name: str, done: int, total: int) -> None:
        if self._live:
            self._progress.update(self._phase, description=name, completed=done, total=total)

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        note = summary(metrics)
        if self._live:
            self._progress.update(self._run, completed=iteration + 1, note=note)
        elif (now := time.monotonic()) - self._printed >= self.every or iteration + 1 == self._total:
            done = iteration + 1 - self._first
            left = (now - self._started) / done * (self._total - iteration - 1)
            self._printed = now
            self.console.print(f"iteration {iteration + 1}/{self._total}  {note}  left {left:.0f} s", highlight=False)

    def on_end(self) -> None:
        if self._live:
            self._progress.remove_task(self._phase)
            self._progress.stop()


def summary(metrics: Mapping[str, float]) -> str:
    """The numbers worth a glance: the mean of each reward, and what the last evaluation gave if there was one."""
    rewards = {name.split("/")[1]: value for name, value in metrics.items() if name.startswith("reward/") and name.endswith("/mean")}
    shown = [f"{name} {value:.3f}" + (f" (held out {metrics[f'eval/{name}']:.3f})" if f"eval/{name}" in metrics else "")
             for name, value in rewards.items()]
    return "  ".join(shown[:4])
