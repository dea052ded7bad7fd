"""What ``visalign eval`` found, as a page of its own and as a section of the run's report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from visalign.compare.breakdown import Breakdown, primary_dimension
from visalign.compare.comparison import Contrast, Estimate, Wins
from visalign.compare.comparison_file import RESULT, ComparisonResult, DimensionsResult, Side, headline, read_pairs, read_result
from visalign.compare.set_contrast import SetContrast
from visalign.media import Sample
from visalign.report.document import REPORT, document
from visalign.report.numbers import interval_text, mean_text
from visalign.report.pictures import NUM_PAIRS, figure
from visalign.types import Measurement, Prompt

COMPARISONS = "comparisons"


def write_comparison_report(folder: Path) -> Path:
    """Write ``report.html`` beside an ``evaluation.json``.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    result = read_result(folder)
    path = folder / REPORT
    title = f"{result.model.name} against {result.base.name}"
    path.write_text(document(title, [f"<h1>{escape(title)}</h1>", *_parts(folder, result)]), encoding="utf-8")
    return path


def comparison_sections(run: Path) -> str:
    """A section for each evaluation in a run's folder."""
    folders = sorted(path.parent for path in (run / COMPARISONS).glob(f"*/{RESULT}"))
    results = [(folder, read_result(folder)) for folder in folders]
    return "".join(f"<h2>Evaluation against {escape(result.base.name)} <small>{escape(folder.name)}</small></h2>"
                   f"<section class=comparison>{''.join(_parts(folder, result))}</section>" for folder, result in results)


def _parts(folder: Path, result: ComparisonResult) -> list[str]:
    few, many = result.seeds
    seeds = f"{few} seed{'s' * (few != 1)} each" if few == many else f"{few} to {many} seeds each"
    text = (f"{result.prompts} prompts, {seeds}: {result.pairs} pairs of samples with the same prompt and seed. Brackets: 95 % bootstrap "
            "intervals over prompts, since samples of one prompt are not independent. Coloured: the interval excludes \"no difference\". "
            "Every row has its own 95 %: of twenty rows without any difference, one is coloured by chance.")
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in result.notes)
    return [f"<p>{text}</p>", notes, _tiles(result), _rewards(result), _judges(result),
            *(_dimensions(name, found) for name, found in result.dimensions.items()),
            *(_by(key, metrics) for key, metrics in result.by.items()), _sets(result), _pictures(folder, result)]


def _tiles(result: ComparisonResult) -> str:
    """One per reward and judge: what changed, and who wins."""
    tiles = []
    for name in dict.fromkeys([*result.rewards, *result.wins]):
        reward, wins = result.rewards.get(name), result.wins.get(name)
        if reward is not None and reward.whole is not None:
            value = f"<span class=from>{mean_text(reward.whole.base)} &rarr;</span> {mean_text(reward.whole.model)}"
        elif wins is not None and wins.rate is not None:
            value = f"<span class=from>wins</span> {wins.rate.mean:.1%}"
        else:
            continue
        gain = _gain(reward.whole) if reward is not None and reward.whole is not None else ""
        tiles.append(f"<div class=tile><div class=name>{escape(name)}</div><div class=value>{value}</div>"
                     f"<div class=gain>{gain}</div>{_bar(wins)}</div>")
    return f"<div class=tiles>{''.join(tiles)}</div>" if tiles else ""


def _bar(wins: Wins | None) -> str:
    """Won, tied and lost as one bar, and the win rate below it."""
    if wins is None or wins.rate is None:
        return ""
    total = wins.wins + wins.ties + wins.losses
    parts = "".join(f'<i class={kind} style="width:{100 * count / total:.2f}%"></i>' for kind, count in
                    (("won", wins.wins), ("tied", wins.ties), ("lost", wins.losses)))
    return (f"<div class=bar>{parts}</div><div class=gain>won {wins.wins}, tied {wins.ties}, lost {wins.losses}; win rate "
            f"{_rate(wins)}</div>")


def _rewards(result: ComparisonResult) -> str:
    if not result.rewards:
        return ""
    lines = []
    for name, reward in result.rewards.items():
        worse = " (smaller is better)" if reward.direction < 0 else ""
        valid = f"{reward.valid_base} and {reward.valid_model} of {result.pairs}"
        reasons = "".join(f"; {count} {escape(reason)}" for reason, count in reward.invalid.items())
        lines.append(_row([escape(name) + worse, *_contrast(reward.whole), _rate(result.wins.get(name)), valid + reasons]))
        lines += [_row([escape(axis), *_contrast(one), "", f"{one.gain.samples} of {result.pairs}"], part=True)
                  for axis, one in reward.axes.items()]
    return _titled("Rewards", "The win rate counts the pairs in which the model's sample has the better value, ties as one half. Valid: "
                   "samples of base and of model with a score; means and gains are over pairs with both.",
                   ("reward", "base", "model", "gain", "win rate", "valid"), lines)


def _judges(result: ComparisonResult) -> str:
    judges = {name: wins for name, wins in result.wins.items() if name not in result.rewards}
    if not judges:
        return ""
    lines = []
    for name, wins in judges.items():
        invalid = ", ".join(f"{count} {escape(reason)}" for reason, count in wins.invalid.items()) or "0"
        lines.append(_row([escape(name), _rate(wins), f"{wins.wins} / {wins.ties} / {wins.losses}", _number(wins.preference),
                           _share(wins.order_agreement), _share(wins.swap_inconsistency), invalid]))
        if wins.self_agreement is not None:
            lines.append(_row([f"repeats itself in {wins.self_agreement:.1%} of the answers asked for twice", *[""] * 6], part=True))
    return _titled("Judges", "Every pair is shown in both orders. A judge that prefers one position has no opinion: its pair is a tie. "
                   "Pairs that were not answered in both orders are left out and counted.",
                   ("judge", "win rate", "won / tied / lost", "mean preference", "orders agree", "swap inconsistency", "invalid"), lines)


def _sets(result: ComparisonResult) -> str:
    lines = []
    if (found := result.diversity) is not None:
        name = f"{escape(found.measure)}, {escape(found.ruler)}"
        if found.within is not None:
            lines.append(_row([f"{name}, within a prompt", "", *_contrast(found.within), ""]))
        if found.across is not None:
            lines.append(_set_row(f"{name}, across prompts", found.across))
    for name, one in result.sets.items():
        lines.append(_set_row(escape(name), one))
        lines += [_row([_measurement(base), str(base.count), f"{base.value:.4g}", f"{model.value:.4g}", "", ""], part=True)
                  for base, model in zip(one.measured_base, one.measured_model, strict=False)]
    text = ("Numbers of whole sets, larger is better or more different; distances carry a minus. A number of few samples is biased: the "
            "last column says how far those of base and model are from that of ever more samples, judged by halves of the prompts. "
            "n x d: samples and dimensions of their features. Indented: the metric on its published scale.")
    head = ("", "n x d", "base", "model", "gain", "bias")
    return _titled("Diversity and distances", text, head, lines) if lines else ""


def _measurement(one: Measurement) -> str:
    """A published metric's name, what is better, and how good the estimate is."""
    notes = ["larger is better" if one.direction > 0 else "smaller is better"]
    notes += [f"std over subsets {one.std:.2g}"] if one.std is not None else []
    notes += [f"R^2 {one.r_squared:.3f}"] if one.r_squared is not None else []
    return f"{escape(one.name)}, {', '.join(notes)}"


def _set_row(name: str, one: SetContrast) -> str:
    size = f"{one.contrast.base.samples} x {one.dims}"
    known = one.bias_base is not None and one.bias_model is not None
    return _row([name, size, *_contrast(one.contrast), f"{one.bias_base:+.1g}, {one.bias_model:+.1g}" if known else ""])


def _by(key: str, metrics: Mapping[str, Breakdown]) -> str:
    tables = {}
    for metric, table in metrics.items():
        lines = [_row([escape(row), str(one.base.prompts), *_contrast(one)]) for row, one in table.rows.items()]
        lines += _overall(table, [str(table.micro.base.prompts), str(table.macro.base.prompts)], "all samples", f"mean over {escape(key)}s")
        tables[metric] = f"<h3>{escape(metric)}</h3>" + _html_table((key, "prompts", "base", "model", "gain"), lines)
    first = headline(metrics)
    rest = "".join(table for metric, table in tables.items() if metric not in first)
    return (f"<h2>By {escape(key)}</h2>{''.join(tables[metric] for metric in first)}"
            + (f"<details><summary>other axes</summary>{rest}</details>" if rest else "")) if tables else ""


def _dimensions(name: str, found: DimensionsResult) -> str:
    """UniGenBench's table: primary dimensions with their parts."""
    lines, table = [], found.primary
    for row, one in table.rows.items():
        lines.append(_row([escape(row), str(one.base.samples), *_contrast(one)]))
        lines += [_row([escape(detail.removeprefix(row).lstrip(" -")), str(part.base.samples), *_contrast(part)], part=True)
                  for detail, part in found.detailed.rows.items() if detail != row and primary_dimension(detail) == row]
    lines += _overall(table, [str(table.micro.base.samples)] * 2, "all points", f"mean of {len(table.rows)} dimensions")
    text = (f"Fulfilled over asked points, pooled over prompts and samples. {table.invalid_base} points of base and {table.invalid_model} "
            "of model could not be judged and count nowhere.")
    return _titled(f"{name}: points fulfilled by dimension", text, ("dimension", "points", "base", "model", "gain"), lines)


def _overall(table: Breakdown, counts: Sequence[str], micro: str, macro: str) -> list[str]:
    return [_row([f"micro: {micro}", counts[0], *_contrast(table.micro)], kind="overall"),
            _row([f"macro: {macro}", counts[1], *_contrast(table.macro)], kind="overall")]


def _pictures(folder: Path, result: ComparisonResult) -> str:
    rows = read_pairs(folder, NUM_PAIRS)
    found = [(_sample(result.base, row, "base"), _sample(result.model, row, "model")) for row in rows]
    found = [(base, model) for base, model in found if base.file.is_file() and model.file.is_file()]
    if not found:
        return ""
    return (f"<h2>What it looks like</h2><p>Left {escape(result.base.name)}, right {escape(result.model.name)}: the same prompt and the "
            f"same seed. The first pair of each of the first {len(found)} prompts, not a selection.</p>"
            f"<div class=pairs>{''.join(figure(*pair, list(result.rewards)) for pair in found)}</div>")


def _sample(side: Side, row: Mapping[str, Any], name: str) -> Sample:
    return Sample(file=Path(side.samples) / row[name]["file"], prompt=Prompt(row["prompt"]), seed=row["seed"], scores=row[name]["scores"])


def _titled(title: str, text: str, head: Sequence[str], lines: Sequence[str]) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(text)}</p>{_html_table(head, lines)}"


def _html_table(head: Sequence[str], lines: Iterable[str]) -> str:
    return f"<div class=wide><table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{''.join(lines)}</table></div>"


def _row(cells: Sequence[str], part: bool = False, kind: str = "") -> str:
    """Cells are HTML."""
    first = f"<td{' class=part' if part else ''}>{cells[0]}</td>"
    return f"<tr{f' class={kind}' if kind else ''}>{first}{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>"


def _contrast(one: Contrast | None) -> tuple[str, str, str]:
    return ("", "", "") if one is None else (_number(one.base), _number(one.model), _gain(one))


def _number(one: Estimate | None) -> str:
    return "" if one is None else f"{mean_text(one)} {_interval(one)}"


def _gain(one: Contrast) -> str:
    return f"<span class={'sure' if one.gain.excludes(0) else 'unsure'}>{mean_text(one.gain, '+')}</span> {_interval(one.gain, '+')}"


def _rate(wins: Wins | None) -> str:
    if wins is None or wins.rate is None:
        return ""
    return f"<span class={'sure' if wins.rate.excludes(0.5) else 'unsure'}>{mean_text(wins.rate)}</span> {_interval(wins.rate)}"


def _interval(one: Estimate, sign: str = "") -> str:
    return f"<span class=interval>{interval_text(one, sign)}</span>"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

