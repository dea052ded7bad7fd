"""What the guards saw: why a run ended, falls from the peak, win rates, distance, diversity, media statistics, how judges agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from visalign.guards.alarm import Alarm
from visalign.report.charts import Line
from visalign.report.glossary import explain
from visalign.report.sections import chart, evaluation_line, grid, series
from visalign.tracking import read_metrics

Rows = Sequence[Mapping[str, float]]


def alarm_banner(run: Path) -> str:
    """Why the run ended before its last iteration, if it did."""
    path = run / "stopping.json"
    if not path.is_file():
        return ""
    alarm = Alarm.read(path)
    causes = "".join(f"<li>{escape(cause)}</li>" for cause in alarm.causes)
    return (f"<div class=alarm><h3>Stopped by its guards at iteration {alarm.iteration}: {escape(alarm.kind)}</h3><ul>{causes}</ul>"
            f"The adapter and everything called \"after\" are those of iteration {alarm.best}, the best evaluation.</div>")


def guard_section(run: Path, rows: Rows) -> str:
    """Everything that is watched and not trained on."""
    metrics = sorted({name for row in rows for name in row})
    drops = [Line(name.removeprefix("guard/").removesuffix("_drop"), *series(rows, name), points=True)
             for name in metrics if name.startswith("guard/") and name.endswith("_drop")]
    charts = [chart("Fall from the peak", drops[:6], "By guard, in standard deviations between prompts. Rising lines are falling guards.")]
    charts += [chart(f"{name.removeprefix('eval/').removesuffix('_win_rate')}, win rate",
                     [evaluation_line(rows, name.removeprefix("eval/"))],
                     "Share of prompts whose sample is better than before training: same prompt, same noise. 95 % interval.")
               for name in metrics if name.startswith("eval/") and name.endswith("_win_rate")]
    charts += [chart(title, [Line(title, *series(rows, name), points=True)], explain(name)) for title, name in (
        ("Distance from the reference, KL", "eval/kl_per_dim"), ("Distance from the reference, velocity", "eval/velocity_gap"),
        ("Diversity across prompts", "eval/diversity"))]
    charts += [_statistic(rows, name.removeprefix("media/")) for name in metrics if name.startswith("media/")]
    charts += _judges(run, rows)
    return grid("Guards", "Watched, not trained on. A reward that rises while these move is worth a look at the pictures.", charts)


def _statistic(rows: Rows, name: str) -> str:
    lines = [Line("training samples", *series(rows, f"media/{name}"))]
    held_out = series(rows, f"eval/media/{name}")
    if held_out[0]:
        lines.append(Line("evaluation", *held_out, points=True))
    title = "Diversity within groups" if name == "diversity" else name.replace("_", " ").capitalize()
    return chart(title, lines, explain(f"media/{name}"))


def _judges(run: Path, rows: Rows) -> list[str]:
    """How consistent judges were: contradictions between the two orders, ties, agreement with themselves."""
    told = read_metrics(run, "timings.jsonl") if (run / "timings.jsonl").is_file() else []
    charts = []
    for ending in ("swap_inconsistency", "tie_rate", "cyclic_triads", "self_agreement"):
        lines = [Line(name.split("/")[1], *series(log, name)) for log, area in ((rows, "reward/"), (told, "judge/"))
                 for name in sorted({name for row in log for name in row}) if name.startswith(area) and name.endswith(f"/{ending}")]
        charts.append(chart(f"Judges: {ending.replace('_', ' ')}", lines[:6], explain(f"/{ending}")))
    return charts
