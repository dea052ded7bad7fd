"""``visalign configs``: recipes, where their numbers come from, and what was really run."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from visalign.config import load_config, read_source, recipe_names

_STYLE = {"published weights": "green", "embedded world": "green", "tiny random weights": "yellow", "not yet run": "dim"}


def run(name: str | None) -> None:
    if name is not None:
        typer.echo(read_source(name)[0], nl=False)
        return
    table = Table(title="recipes",
                  caption="visalign configs NAME prints one, with how it was verified; visalign train NAME --plan shows what it would do")
    table.add_column("name", no_wrap=True)
    for heading in ("what", "source", "verified on"):
        table.add_column(heading, overflow="fold")
    for recipe in recipe_names():
        about = load_config(recipe).recipe
        table.add_row(recipe, about.description, about.source, f"[{_STYLE[about.verification]}]{about.verification}[/]")
    Console().print(table)
