"""``visalign configs``: recipes, where their numbers come from, and what was really run."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from visalign.config import load_config, read_source, recipe_names
from visalign.reward_training.config import load_reward_config

_STYLE = {"published weights": "green", "embedded world": "green", "tiny random weights": "yellow", "not yet run": "dim"}


def run(name: str | None) -> None:
    if name is not None:
        typer.echo(read_source(name)[0], nl=False)
        return
    table = Table(title="recipes",
                  caption="visalign configs NAME prints one, with how it was verified; visalign train NAME --plan shows what it would do; "
                  "those named reward_ are for visalign reward-train")
    table.add_column("name", no_wrap=True)
    for heading in ("what", "source", "verified on"):
        table.add_column(heading, overflow="fold")
    about = {name: load_config(name).recipe for name in recipe_names("run")} | {
        name: load_reward_config(name).recipe for name in recipe_names("reward")}
    for name, recipe in about.items():
        table.add_row(name, recipe.description, recipe.source, f"[{_STYLE[recipe.verification]}]{recipe.verification}[/]")
    Console().print(table)
