"""``visalign reward-train``: a reward from preferences, and what it is worth on prompts it never saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from visalign.commands import quiet_libraries
from visalign.reward_training.config import load_reward_config

_ROWS = {"accuracy": "ranking accuracy", "ece": "calibration error", "log_loss": "log-loss"}


def run(name: str, overrides: list[str], *, out: Path) -> None:
    config = load_reward_config(name, overrides)
    from visalign.commands.pipelines import choose_device
    from visalign.reward_training.parts import build_parts
    from visalign.reward_training.train import train_reward
    from visalign.reward_training.workfolder import refuse_used
    from visalign.rewards.feature_encoders import load_encoder

    build_parts(config)  # complains before the encoder's weights are read
    refuse_used(out)
    device = choose_device(config.device, "device")
    quiet_libraries()
    encoder = load_encoder(config.encoder, None if config.device == "auto" else device)
    errors = Console(stderr=True)
    with Progress(console=errors, disable=not errors.is_terminal, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            tasks[what] = tasks[what] if what in tasks else bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        evaluation = train_reward(config, encoder, out, progress)
    Console().print(table(evaluation))
    Console().print(f"reward: {{name: trained, params: {{path: {out}}}}}\nreport: {out / 'report.html'}", highlight=False, markup=False)


def table(evaluation: Mapping[str, Any]) -> Table:
    """Held-out statistics with their intervals, and against the second opinion where there is one."""
    sides = {"heldout": "held-out judgements", **({"gold": "against gold"} if "gold" in evaluation else {})}
    first = evaluation["heldout"]
    shown = Table(title=f"{first['judgements']} held-out judgements of {first['prompts']} prompts, {len(evaluation['members'])} member"
                  + "s" * (len(evaluation["members"]) > 1), title_justify="left")
    shown.add_column("")
    for heading in sides.values():
        shown.add_column(heading, justify="right")
    for key, label in _ROWS.items():
        shown.add_row(label, *(_interval(evaluation[side][key]) for side in sides))
        if key == "accuracy" and "encoder" in evaluation:
            shown.add_row("  of the encoder's own score", *(_interval(evaluation["encoder"][side]) for side in sides))
            shown.add_row("  gain over it", *[""] * (len(sides) - 1), _interval(evaluation["encoder"]["gain"]))
    told = evaluation["noise"] if any("labels_right" not in name for name in evaluation["noise"]) else {}
    for name, value in told.items():
        shown.add_row(name.removeprefix("noise/").replace("_", " "), f"{value:.3f}")
    return shown


def _interval(row: Mapping[str, float]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
