"""The page: what was gained, what it looks like, how it went, what was run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from visalign.config import Config, load_config
from visalign.report.card import write_card
from visalign.report.charts import Line, label
from visalign.report.document import REPORT, document
from visalign.report.evaluations import comparison_sections
from visalign.report.glossary import explain
from visalign.report.guards import alarm_banner, guard_section
from visalign.report.numbers import Compared, read_comparison, read_references
from visalign.report.pictures import figure, latest_label, pairs
from visalign.report.sections import chart, evaluation_line, grid, series, settings
from visalign.tracking import read_metrics

_SECTIONS = (
    ("Trust region", "How far one iteration's updates move the policy that made its samples.", ("grpo/", "policy/")),
    ("Credit", "From rewards to what the update learns from.", ("credit/",)),
    ("Optimisation", "", ("train/",)),
)


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run's folder, and a model card beside its adapter; returns the report's path.

    Whatever the run has not produced yet is left out.

    Raises:
        ValueError: the folder is not a run's.
    """
    run = Path(run_dir)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} has no config.yaml: is it the folder of a run?")
    config, rows = load_config(run / "config.yaml"), read_metrics(run)
    compared, references = read_comparison(run), read_references(run)
    done = 1 + max((int(row["iteration"]) for row in rows), default=-1)
    body = [
        f"<h1>{escape(config.recipe.description or run.resolve().name)}</h1>",
        f'<div class=meta>{escape(config.model.path)} &middot; {escape(config.algorithm.name)} &middot; '
        f"{done} of {config.train.iterations} iterations, {done * config.train.groups * config.train.group_size} samples &middot; "
        f"seed {config.train.seed}</div>",
        alarm_banner(run), _tiles(compared, config), _table(compared, references, config), _pictures(run, config),
        comparison_sections(run), _reward_curves(rows, config), guard_section(run, rows), _diagnostics(rows),
        _timings(run, rows), _settings(run),
    ]
    path = run / REPORT
    path.write_text(document(run.resolve().name, body), encoding="utf-8")
    if (run / "adapter").is_dir():
        write_card(run, config, compared, references)
    return path


def _tiles(compared: Mapping[str, Compared], config: Config) -> str:
    trained = {reward.name for reward in config.rewards}
    tiles = []
    for name, row in compared.items():
        if "/" in name:
            continue
        role = "trained on" if name in trained else "guard, not trained on"
        tiles.append(f"<div class=tile><div class=name>{escape(name)} &middot; {role}</div><div class=value><span class=from>"
                     f"{label(row.before['mean'])} &rarr;</span> {label(row.after['mean'])}</div><div class=gain>{_gain(row)}</div></div>")
    return f"<div class=tiles>{''.join(tiles)}</div>" if tiles else ""


def _gain(row: Compared) -> str:
    sure = "sure" if row.sure else "unsure"
    return f"<span class={sure}>{row.gain['mean']:+.3g}</span> <span class=interval>{_interval(row.gain, '+')}</span>"


def _interval(row: Mapping[str, float], sign: str = "") -> str:
    return f"[{row['low']:{sign}.3g}, {row['high']:{sign}.3g}]"


def _table(compared: Mapping[str, Compared], references: Mapping[str, Mapping[str, float]], config: Config) -> str:
    if not compared:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("metric", "before", "after", "gain", *references))
    lines = []
    for name in sorted(compared, key=lambda metric: (metric.partition("/")[0], metric)):
        row, (reward, _, axis) = compared[name], name.partition("/")
        cells = [f"<td{' class=part' if axis else ''}>{escape(axis or reward)}</td>",
                 *(f"<td>{label(side['mean'])} <span class=interval>{_interval(side)}</span></td>" for side in (row.before, row.after)),
                 f"<td>{_gain(row)}</td>", *(f"<td>{label(means[name]) if name in means else ''}</td>" for means in references.values())]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    count = int(next(iter(compared.values())).gain["count"])
    return ("<h2>What changed</h2><p>Evaluation prompts with fixed seeds and the deterministic sampler, before and after training. "
            f"Brackets: 95 % bootstrap intervals over up to {count} prompts; the gain is taken prompt by prompt. "
            "Coloured: its interval excludes 0.</p>"
            f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>")


def _pictures(run: Path, config: Config) -> str:
    found = pairs(run)
    if not found:
        return ""
    latest, names = latest_label(run), [reward.name for reward in config.rewards]
    when = "after training" if latest == "after" else f"at {latest}"
    return (f"<h2>What it looks like</h2><p>Left before, right {when}: the same prompt and the same noise. "
            f"The first {len(found)} evaluation prompts, not a selection.</p>"
            f"<div class=pairs>{''.join(figure(*pair, names) for pair in found)}</div>")


def _reward_curves(rows: Sequence[Mapping[str, float]], config: Config) -> str:
    """Training means, and evaluations with their intervals: rewards first, then guards, then the axes of each."""
    names = [reward.name for reward in config.rewards]
    charts = [chart(f"{name}, training", [Line(name, *series(rows, f"reward/{name}/mean"))], explain(f"{name}/mean")) for name in names]
    metrics = {name for row in rows for name in row}
    for name in [*names, *(guard.name for guard in config.guards)]:
        role = "" if name in names else "Watched, not trained on: if it worsens while the reward improves, the reward is being hacked. "
        charts.append(chart(f"{name}, evaluation", [evaluation_line(rows, name)], f"{role}Held-out prompts, fixed seeds, 95 % interval."))
        axes = sorted(metric for metric in metrics if metric.startswith(f"eval/{name}/") and not metric.endswith(("_low", "_high")))
        whole = series(rows, f"eval/{name}")
        lines = [Line(axis.removeprefix(f"eval/{name}/"), *series(rows, axis), points=True) for axis in axes
                 if series(rows, axis) != whole][:6]
        charts.append(chart(f"{name} by part, evaluation", lines, "Means over held-out prompts."))
    return grid("Rewards", "", charts)


def _diagnostics(rows: Sequence[Mapping[str, float]]) -> str:
    """A chart per number that moved; those that did not share a table at the end."""
    metrics, sections, still = sorted({name for row in rows for name in row}), [], []
    for title, text, prefixes in _SECTIONS:
        known = {name: series(rows, name) for name in metrics if name.startswith(prefixes)}
        moved = {name: line for name, line in known.items() if _moves(line[1])}
        still += [(name, line[1][-1]) for name, line in known.items() if line[1] and name not in moved]
        sections.append(grid(title, text, [chart(name, [Line(name, *line)], explain(name)) for name, line in moved.items()]))
    if still:
        lines = "".join(f"<tr><td>{escape(name)}</td><td>{label(value) if math.isfinite(value) else 'unknown'}</td>"
                        f"<td class=text>{escape(explain(name))}</td></tr>" for name, value in still)
        sections.append(f"<h2>What did not move</h2><div class=wide><table>{lines}</table></div>")
    return "".join(sections)


def _moves(values: Sequence[float]) -> bool:
    """Whether a curve shows more than rounding."""
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and max(known) - min(known) > 1e-5 * max(map(abs, known))


def _timings(run: Path, metrics: Sequence[Mapping[str, float]]) -> str:
    """Where the time goes, and how the rewards' calls went."""
    path = run / "timings.jsonl"
    if not path.is_file():
        return ""
    rows = read_metrics(run, path.name)
    return grid("Time", "", [
        chart("seconds per iteration", _lines(rows, "time/", ""), "Wall clock, by phase."),
        chart("seconds per call of a reward", _lines(rows, "reward/", "/seconds"), "Wall clock of scoring all samples of an iteration."),
        chart("latency of single requests",
               sorted((line for part in ("p50", "p95") for line in _lines(rows, "judge/", f"/latency_{part}", f" {part}")),
                      key=lambda line: line.name)[:6],
               "Seconds, of judges and rewards behind servers: half and 95 % of an iteration's requests were faster."),
        chart("valid samples", [line for line in _lines(metrics, "reward/", "/valid_rate") if min(line.y) < 1],
               "Share of an iteration's samples that each reward could score; rewards that never failed are left out."),
    ])


def _lines(rows: Sequence[Mapping[str, float]], start: str, end: str, label: str = "") -> list[Line]:
    """A line for each of the first six numbers whose names start and end so, named by what is between, with a label."""
    names = sorted({name for row in rows for name in row if name.startswith(start) and name.endswith(end)})
    return [Line(name.removeprefix(start).removesuffix(end) + label, *series(rows, name)) for name in names[:6]]


def _settings(run: Path) -> str:
    return settings((run / "config.yaml").read_text(encoding="utf-8"), "visalign train config.yaml")
