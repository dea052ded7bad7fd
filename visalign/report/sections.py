"""What the sections of a page are made of: curves out of the log, charts with a sentence, grids of charts, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from visalign.report.charts import Line, line_chart
from visalign.versions import versions


def series(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Iterations (1-based) and values of a metric where it was logged."""
    known = [(row["iteration"] + 1, row[name]) for row in rows if name in row]
    return [x for x, _ in known], [y for _, y in known]


def evaluation_line(rows: Sequence[Mapping[str, float]], name: str) -> Line:
    """An evaluated metric with its interval, if it has one."""
    x, y = series(rows, f"eval/{name}")
    (x_low, low), (x_high, high) = (series(rows, f"eval/{name}_{side}") for side in ("low", "high"))
    band = x == x_low == x_high
    return Line(name, x, y, low if band else None, high if band else None, points=True)


def chart(title: str, lines: Sequence[Line], text: str, x_label: str = "iteration") -> str:
    """A titled drawing; nothing where there is nothing to draw."""
    drawing = line_chart(lines, x_label)
    return f"<div class=chart><h3>{escape(title)}</h3><p>{escape(text)}</p>{drawing}</div>" if drawing else ""


def grid(title: str, text: str, charts: Sequence[str]) -> str:
    """A titled section of charts; nothing without any."""
    drawn = "".join(charts)
    about = f"<p>{escape(text)}</p>" if text else ""
    return f"<h2>{escape(title)}</h2>{about}<div class=charts>{drawn}</div>" if drawn else ""


def settings(config: str, command: str) -> str:
    """The configuration's text and the versions of this machine, folded."""
    listed = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in versions().items())
    return (f"<h2>Settings</h2><p>The resolved configuration: <code>{escape(command)}</code> runs it again.</p>"
            f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"
            f"<details><summary>versions of the machine that wrote this report</summary><table>{listed}</table></details>")
