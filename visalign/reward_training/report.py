"""``report.html`` of a trained reward: how often it is right, whether it knows, and how it was learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from visalign.report.charts import Line
from visalign.report.document import REPORT, document
from visalign.report.sections import chart, grid, settings

_NAMES = {"heldout": "held-out judgements", "gold": "second opinion on them"}
_STATISTICS = {"accuracy": "ranking accuracy", "ece": "calibration error", "log_loss": "log-loss"}


def write_report(folder: Path, title: str, config: str, evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> Path:
    """Write the page; ``evaluation`` and ``rows`` are what ``evaluation.json`` and ``metrics.jsonl`` hold."""
    body = [f"<h1>{escape(title)}</h1>", f"<div class=meta>{escape(_counts(evaluation))}</div>", _table(evaluation),
            grid("Does it know when it is right?", "A point is the comparisons that were stated with about that confidence. On the "
                 "diagonal they are right as often as stated; below it the reward is too sure.",
                 [_reliability(_NAMES[name], evaluation[name]) for name in _NAMES if name in evaluation]),
            grid("Training", "", [chart(name, _curves(rows, name), text, "epoch") for name, text in (
                ("loss", "Of the training judgements, after treatment."), ("calibration/loss", "Log-loss of the calibration judgements, as "
                 "labelled: rising again is overfitting."), ("calibration/accuracy", "Ranking accuracy on them."))]),
            settings(config, "visalign reward-train config.yaml --out DIR")]
    path = folder / REPORT
    path.write_text(document(title, body), encoding="utf-8")
    return path


def _counts(evaluation: Mapping[str, Any]) -> str:
    parts = evaluation["data"]
    return " · ".join(f"{name}: {parts[name]['judgements']} judgements of {parts[name]['prompts']} prompts" for name in parts)


def _table(evaluation: Mapping[str, Any]) -> str:
    lines = []
    for name, title in _NAMES.items():
        if name in evaluation:
            cells = "".join(f"<td>{_number(evaluation[name][key])}</td>" for key in _STATISTICS)
            lines.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
            if name in evaluation.get("encoder", {}):
                own = _number(evaluation["encoder"][name])
                lines.append(f"<tr><td class=part>the encoder's own score</td><td>{own}</td><td></td><td></td></tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *_STATISTICS.values()))
    return ("<h2>On prompts it never saw</h2><p>Brackets: 95 % bootstrap intervals over prompts.</p>"
            f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>")


def _number(row: Mapping[str, float]) -> str:
    return f"{row['value']:.3f} <span class=interval>[{row['low']:.3f}, {row['high']:.3f}]</span>"


def _reliability(title: str, judged: Mapping[str, Any]) -> str:
    rows = judged["reliability"]
    stated = [100 * row["confidence"] for row in rows]
    lines = [Line("found", stated, [100 * row["accuracy"] for row in rows], points=True), Line("ideal", [50, 100], [50, 100])]
    return chart(title, lines, "Share that is right, in %.", "stated confidence, %")


def _curves(rows: Sequence[Mapping[str, float]], name: str) -> list[Line]:
    members = sorted({int(row["member"]) for row in rows if name in row})[:6]
    lines = []
    for member in members:
        own = [(row["epoch"], row[name]) for row in rows if name in row and row["member"] == member]
        lines.append(Line(f"member {member}", [x for x, _ in own], [y for _, y in own]))
    return lines
