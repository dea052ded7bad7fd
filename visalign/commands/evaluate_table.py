"""A comparison in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.markup import escape
from rich.table import Table

from visalign.compare.breakdown import Breakdown, primary_dimension
from visalign.compare.comparison import Contrast, Estimate, Wins
from visalign.compare.comparison_file import ComparisonResult, DimensionsResult, headline
from visalign.compare.set_contrast import SetContrast
from visalign.report.numbers import interval_text, mean_text


def tables(result: ComparisonResult) -> Iterator[Table]:
    """Everything a result holds, most important first."""
    seeds = f"{result.seeds[0]}" if result.seeds[0] == result.seeds[1] else f"{result.seeds[0]} to {result.seeds[1]}"
    title = (f"{result.model.name} against {result.base.name}: {result.prompts} prompts, {seeds} seed{'s' if seeds != '1' else ''} each, "
             "95 % intervals over prompts")
    if result.rewards:
        yield _rewards(result, title)
    if judges := {name: wins for name, wins in result.wins.items() if name not in result.rewards}:
        yield _judges(judges, title if not result.rewards else "judges, asked in both orders; a judge that changes its mind gives a tie")
    if result.diversity is not None or result.sets:
        yield _sets(result)
    for key, metrics in result.by.items():
        if metrics:
            yield _by(key, metrics)
    for name, found in result.dimensions.items():
        yield _dimensions(f"{name}: points fulfilled by dimension", found)


def _table(title: str, *headings: str) -> Table:
    """Narrow: most results fit a terminal of 80 columns."""
    shown = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, caption_justify="left")
    for heading in headings:
        shown.add_column(heading, justify="right" if shown.columns else "left", no_wrap=bool(shown.columns), overflow="fold")
    return shown


def _rewards(result: ComparisonResult, title: str) -> Table:
    shown = _table(title, "reward", "base", "model", "gain", "win rate")
    for name, reward in result.rewards.items():
        shown.add_row(name, *_contrast(reward.whole, reward.direction), _rate(result.wins.get(name)))
        for axis, one in reward.axes.items():
            shown.add_row(f"  {axis}", *_contrast(one, 0), "")
    invalid = [f"{name} could score {reward.valid_base} of {result.pairs} samples of base, {reward.valid_model} of model"
               for name, reward in result.rewards.items() if min(reward.valid_base, reward.valid_model) < result.pairs]
    if invalid:
        shown.caption = "; ".join(invalid)
    return shown


def _judges(judges: Mapping[str, Wins], title: str) -> Table:
    shown = _table(title, "judge", "win rate", "won/tied/lost", "invalid", "agree", "swap gap")
    for name, wins in judges.items():
        invalid = ", ".join(f"{count} {reason}" for reason, count in wins.invalid.items()) or "0"
        shown.add_row(name, _rate(wins), f"{wins.wins}/{wins.ties}/{wins.losses}", invalid, _share(wins.order_agreement),
                      _share(wins.swap_inconsistency))
    return shown


def _sets(result: ComparisonResult) -> Table:
    shown = _table("whole sets: larger is better or more different, distances carry a minus", "", "base", "model", "gain", "bias")
    if (diversity := result.diversity) is not None:
        name = f"{diversity.measure}, {diversity.ruler}"
        if diversity.within is not None:
            shown.add_row(f"{name}, within", *_contrast(diversity.within, 0), "")
        if diversity.across is not None:
            shown.add_row(f"{name}, across", *_contrast(diversity.across.contrast, 0), _bias(diversity.across))
    for name, one in result.sets.items():
        shown.add_row(name, *_contrast(one.contrast, 1), _bias(one))
        for base, model in zip(one.measured_base, one.measured_model, strict=False):
            shown.add_row(f"  {base.name}", f"{base.value:.4g}", f"{model.value:.4g}", "", "")
    shown.caption = "within a prompt, across prompts; bias of few samples, nearly the same on both sides"
    return shown


def _by(key: str, metrics: Mapping[str, Breakdown]) -> Table:
    """Rewards and their all-or-nothing axes; the others are in the report."""
    shown = _table(f"by {key}", key, "prompts", "base", "model", "gain")
    chosen = headline(metrics)
    for metric in chosen:
        table = metrics[metric]
        shown.add_row(f"[bold]{escape(metric)}[/]")
        for row, one in table.rows.items():
            shown.add_row(f"  {escape(row)}", str(one.base.prompts), *_contrast(one, 0))
        shown.add_row("  micro, all samples", str(table.micro.base.prompts), *_contrast(table.micro, 0))
        shown.add_row(f"  macro, mean over {key}s", str(table.macro.base.prompts), *_contrast(table.macro, 0))
    if left := len(metrics) - len(chosen):
        shown.caption = f"{left} more axes in the report"
    return shown


def _dimensions(title: str, found: DimensionsResult) -> Table:
    shown = _table(title, "dimension", "points", "base", "model", "gain")
    for name, one in found.primary.rows.items():
        shown.add_row(escape(name), str(one.base.samples), *_contrast(one, 1))
        for detail, part in found.detailed.rows.items():
            if detail != name and primary_dimension(detail) == name:
                shown.add_row(f"  {escape(detail.removeprefix(name).lstrip(' -'))}", str(part.base.samples), *_contrast(part, 1))
    points, table = str(found.primary.micro.base.samples), found.primary
    shown.add_row("micro, all points", points, *_contrast(table.micro, 1))
    shown.add_row(f"macro, mean of {len(table.rows)} dimensions", points, *_contrast(table.macro, 1))
    if table.invalid_base or table.invalid_model:
        shown.caption = f"points that could not be judged: {table.invalid_base} of base, {table.invalid_model} of model"
    return shown


def _contrast(one: Contrast | None, direction: int) -> tuple[str, str, str]:
    """Base, model, gain; the gain is green or red where its interval excludes 0 and a direction is known."""
    if one is None:
        return "-", "-", "-"
    return mean_text(one.base), mean_text(one.model), _coloured(one.gain, 0.0, direction, "+")


def _rate(wins: Wins | None) -> str:
    return "" if wins is None or wins.rate is None else _coloured(wins.rate, 0.5, 1)


def _coloured(one: Estimate, null: float, direction: int, sign: str = "") -> str:
    return f"[{_colour(one, null, direction)}]{mean_text(one, sign)}[/] [dim]{escape(interval_text(one, sign))}[/]"


def _colour(one: Estimate, null: float, direction: int) -> str:
    if not one.excludes(null) or not direction:
        return "default"
    return "green" if (one.mean - null) * direction > 0 else "red"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _bias(one: SetContrast) -> str:
    return "" if one.bias_model is None else f"{one.bias_model:+.2g}"
