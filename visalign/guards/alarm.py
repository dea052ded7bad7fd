"""Why a run ended before its last iteration, and its way to disk and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Alarm:
    """Why a run should end.

    Attributes:
        iteration: of the evaluation that showed it.
        kind: "hacking" or "collapse" (``guards.rule``), "shift" for media that have changed, or "drift" for a policy too far from its
            reference.
        causes: one line each.
        best: iteration of the best evaluation, whose weights are the run's result if it ends here.
    """

    iteration: int
    kind: str
    causes: tuple[str, ...]
    best: int

    @property
    def message(self) -> str:
        return (f"{self.kind} seen at iteration {self.iteration}: {'; '.join(self.causes)}. The best evaluation was that of iteration "
                f"{self.best}")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({**asdict(self), "message": self.message}, indent=1), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Alarm:
        """Inverse of :meth:`write`."""
        row = json.loads(path.read_text(encoding="utf-8"))
        return Alarm(int(row["iteration"]), str(row["kind"]), tuple(row["causes"]), int(row["best"]))
