"""``visalign eval``: a model against a base on the same prompts and seeds, by rewards, judges, diversity and distances."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from visalign.commands import quiet_libraries
from visalign.commands.evaluate_panel import build_panel, find_encoder, spread_of
from visalign.commands.evaluate_sides import Candidate, Fixture, candidates, fixture, read_prompts, samples_of
from visalign.commands.evaluate_table import tables
from visalign.commands.models import is_run
from visalign.commands.sample import parse_seeds
from visalign.compare.breakdown import JudgesPoints, labels_of
from visalign.compare.comparison_file import RESULT, ComparisonResult, Side, read_result, write_result
from visalign.compare.measurement import Answers, Panel, ask
from visalign.compare.summary import summarise
from visalign.config import load_config
from visalign.media import Sample
from visalign.report import COMPARISONS, write_comparison_report, write_report
from visalign.rewards.detector import DetectedObjects

FEW_PROMPTS = 16


def run(model: str, call: list[str], *, against: str | None, adapter: Path | None, texts: list[str], source: str | None,
        num_prompts: int | None, rewards: list[str], judges: list[str], config: str | None, encoder: str | None, by: list[str],
        seeds: str | None, dtype: str | None, device: str, out: Path | None) -> Path:
    """Draw what is missing, ask everybody, write and print; returns the folder of the result."""
    sides = candidates(model, call, against, adapter, dtype)
    first, second = sides
    settings = load_config(config) if config is not None else first.config or second.config
    shared = fixture(sides, read_prompts(sides, texts, source, num_prompts), None if seeds is None else parse_seeds(seeds))
    folder = out or default_folder(first, against, source)
    if is_run(str(folder)):
        raise ValueError(f"--out {folder} is a run's folder, whose own evaluation.json and report.html would be lost; leave --out out to "
                         "put the result inside it, or choose another folder")
    quiet_libraries()
    panel = build_panel(rewards, judges, settings)
    refuse_other_results(folder, (first.name, second.name), [*panel.rewards, *panel.judges])
    panel.admit(shared.prompts)
    for key in by:
        labels_of(key, shared.prompts)  # complains before anything is drawn
    ruler = find_encoder(encoder, panel.rewards)
    console = Console(stderr=True)
    folders = [Path(side.name) if side.source is None else folder / "samples" / label
               for side, label in zip(sides, ("model", "base"), strict=True)]
    base = samples_of(second, folders[1], shared, device, console)
    drawn = samples_of(first, folders[0], shared, device, console)
    panel = replace(panel, spread=spread_of(ruler, [*base, *drawn]))
    answers = asked(panel, base, drawn, console)
    described, its_base = (Side(side.name, side.kind, str(place.resolve())) for side, place in zip(sides, folders, strict=True))
    result = summarise(panel, answers, described, its_base, by, notes(panel, answers, shared))
    keep(first, folder, result, answers)
    shown = Console()
    for table in tables(result):
        shown.print(table)
    for note in result.notes:
        shown.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    for what, path in (("result", folder / RESULT), ("report", folder / "report.html")):
        shown.print(f"{what:<8} {path}", highlight=False, markup=False, soft_wrap=True)
    return folder


def asked(panel: Panel, base: Sequence[Sample], model: Sequence[Sample], console: Console) -> Answers:
    """Everybody's answers, with a bar."""
    with Progress(console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("judge", total=len(base))
        return ask(panel, base, model, lambda done, _: bars.update(bar, completed=done))


def notes(panel: Panel, answers: Answers, shared: Fixture) -> list[str]:
    """What a reader must know before he believes the numbers."""
    counts = Counter(answers.clusters.tolist())
    found = []
    if len(counts) < FEW_PROMPTS:
        found.append(f"{len(counts)} prompts are few: intervals are rough, and say little about other prompts")
    if max(counts.values()) == 1:
        found.append("one seed per prompt: diversity within a prompt is not known")
    if any(job.seed is None for job in shared.jobs):
        found.append("the samples' seeds are not known: pairs share their prompt, and nobody can check that they share their noise")
    if panel.spread is None:
        found.append("diversity is not measured: without --encoder it compares pixels, and these are not images of one size")
    for name, reward in panel.rewards.items():
        if isinstance(reward, DetectedObjects):
            found.append(f"'{name}' is GenEval-like: its detector ({reward.spec.model_ids[0]}) is not the benchmark's own, and the numbers "
                         "do not belong on its leaderboard. 'correct' is GenEval's verdict (at least as many objects), 'strict' "
                         f"{'the same' if reward.counts == 'at_least' else 'wants exactly as many'}; GenEval's overall score is the macro "
                         "average over tags")
        if isinstance(reward, JudgesPoints):
            found.append(f"'{name}' was judged by {', '.join(reward.spec.model_ids)}; UniGenBench's published numbers are by Gemini 2.5 "
                         "Pro or by its own model, and another judge gives others. Its script defines no overall score: micro pools all "
                         "points, macro is the mean of its primary dimensions")
    return found


def keep(first: Candidate, folder: Path, result: ComparisonResult, answers: Answers) -> None:
    """Write the result and its page; a run's own report shows it as well."""
    write_result(folder, result, list(answers.rows()))
    write_comparison_report(folder)
    if first.kind == "run":
        own = Path(first.name) / COMPARISONS
        if folder.resolve().parent != own.resolve():
            write_result(own / slug(folder.name), result, list(answers.rows()))
        write_report(first.name)


def default_folder(first: Candidate, against: str | None, source: str | None) -> Path:
    """For a run a place in its folder, named after what it is compared with and on."""
    if first.kind != "run":
        return Path("evaluation")
    words = [Path(text).stem if Path(text).exists() else text for text in (against or "base", source or "prompts")]
    return Path(first.name) / COMPARISONS / slug("-".join(words))


def slug(text: str) -> str:
    """A file name that still tells where it comes from."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[-80:] or "evaluation"


def refuse_other_results(folder: Path, sides: tuple[str, str], names: Sequence[str]) -> None:
    """A result is only replaced by one of the same two sides and the same rewards and judges, or more.

    Raises:
        ValueError: it holds some that this command would not make again.
    """
    if not (folder / RESULT).is_file():
        return
    held = read_result(folder)
    if sides != (held.model.name, held.base.name):
        raise ValueError(f"{folder / RESULT} compares {held.model.name} with {held.base.name}; give this comparison another --out, or "
                         "remove the file")
    if lost := {*held.rewards, *held.wins, *held.sets} - set(names):
        raise ValueError(f"{folder / RESULT} holds {', '.join(sorted(lost))}, which this command would not make again; name them too, give "
                         "another --out, or remove the file")
