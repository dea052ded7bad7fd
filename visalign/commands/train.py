"""``visalign train``: choose the configuration and the run folder, then plan, start or resume."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from rich.console import Console

from visalign.commands import quiet_libraries
from visalign.config import Config, load_config

RUNS = Path("runs")


def run(name: str | None, overrides: list[str], *, plan: bool, resume: Path | None, out: Path | None) -> None:
    if name is not None and "=" in name:  # `train --resume RUN train.iterations=200`: the first word is an override
        overrides, name = [name, *overrides], None
    if resume is not None:
        if name is not None or out is not None:
            raise ValueError(f"--resume continues {resume} with its own configuration and folder; leave out CONFIG and --out")
        if not (resume / "config.yaml").is_file():
            raise ValueError(f"{resume} has no config.yaml: is it the folder of a run?")
        config, folder = load_config(resume / "config.yaml", overrides), resume
    elif name is None:
        raise ValueError("which configuration? visalign train CONFIG [key=value ...]; visalign configs lists the recipes")
    else:
        if out is None and not plan and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("several processes need one folder: give --out, the default carries each process's own clock")
        config, folder = load_config(name, overrides), out or default_folder(Path(name).stem)
    if plan:
        from visalign.commands.plan import show

        show(config)
        return
    if resume is None and is_main():
        refuse_used_folder(folder)
    train(config, folder, resume=resume is not None)


def train(config: Config, folder: Path, *, resume: bool) -> None:
    """Run the loop with progress bars and say where everything is."""
    from visalign.commands.pipelines import choose_device
    from visalign.loop import train as loop
    from visalign.progress import Bars

    choose_device(config.model.device, "model.device")
    quiet_libraries()
    console = Console(stderr=True, quiet=not is_main())
    console.print(f"run folder: {folder}", highlight=False)
    loop(config, folder, resume=resume, callback=Bars(console))
    for what, path in (("adapter", folder / "adapter"), ("metrics", folder / "metrics.jsonl"), ("report", folder / "report.html")):
        if path.exists():
            console.print(f"{what:<8} {path}", highlight=False)


def is_main() -> bool:
    """Whether this is the process that writes; known before any library is loaded."""
    return int(os.environ.get("RANK", "0")) == 0


def default_folder(name: str) -> Path:
    return RUNS / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def refuse_used_folder(folder: Path) -> None:
    """A new run never mixes with an old one.

    Raises:
        ValueError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; continue that run with visalign train --resume {folder}, or choose another --out")
