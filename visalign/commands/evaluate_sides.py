"""The two sides of ``visalign eval``: runs, pipelines or folders of samples; what they are compared on; drawing what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from visalign.commands.models import ModelSource, is_run, model_source, pipeline_draw
from visalign.compare.pairing import Job, SampleFolder, chosen, jobs_in, jobs_of, matched, prompt_key, read_samples
from visalign.config import Config, load_config
from visalign.data import load_prompts
from visalign.media import INDEX, Sample
from visalign.types import Prompt

DEFAULT_SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Candidate:
    """One side.

    Attributes:
        name: what the user called it.
        source: what it is drawn from; ``None`` for a folder of samples.
    """

    name: str
    kind: Literal["run", "pipeline", "samples"]
    source: ModelSource | None = None

    @property
    def config(self) -> Config | None:
        """Of a run."""
        return load_config(Path(self.name) / "config.yaml") if self.kind == "run" else None


def candidates(model: str, words: Sequence[str], against: str | None, adapter: Path | None,
               dtype: str | None) -> tuple[Candidate, Candidate]:
    """MODEL and BASE; without ``against``, BASE is MODEL without its adapter.

    Args:
        words: arguments of the call, for every side that is drawn.
        adapter: of MODEL.
    Raises:
        ValueError: there is nothing to compare with, or arguments for samples that are there already.
    """
    first = _candidate(model, words, adapter, dtype)
    if adapter is not None and first.source is None:
        raise ValueError(f"--adapter belongs to a model, and {model} is a folder of samples")
    if against is not None:
        second = _candidate(against, words, None, dtype)
    elif first.source is not None and first.source.adapter is not None:
        second = Candidate(first.source.path, "pipeline", replace(first.source, adapter=None))
    else:
        raise ValueError(f"{model} has no base of its own; compare it --against BASE: a run's folder, a pipeline or a folder of samples")
    if words and first.source is None and second.source is None:
        raise ValueError(f"both sides are folders of samples, and nothing is drawn: leave out {' '.join(words)}")
    return first, second


def _candidate(name: str, words: Sequence[str], adapter: Path | None, dtype: str | None) -> Candidate:
    if is_run(name):
        return Candidate(name, "run", model_source(name, words, adapter, dtype))
    if (Path(name) / INDEX).is_file() or (Path(name).is_dir() and not (Path(name) / "model_index.json").is_file()):
        return Candidate(name, "samples")
    return Candidate(name, "pipeline", model_source(name, words, adapter, dtype))


def read_prompts(sides: Sequence[Candidate], texts: Sequence[str], source: str | None, limit: int | None) -> list[Prompt] | None:
    """The prompts asked for; a run's evaluation prompts where nothing is drawn before and none are given; ``None``: those of the samples.

    Raises:
        ValueError: nobody says which.
    """
    given = [Prompt(text) for text in texts] + (load_prompts(source) if source else [])
    config = next((side.config for side in sides if side.kind == "run"), None)
    if not given and any(side.source is None for side in sides):
        if limit is not None:
            raise ValueError("--num-prompts takes the first of --prompts; give that file, or leave it out for all samples of the folder")
        return None
    if not given and config is not None and (own := config.data.eval_prompts or config.data.prompts) is not None:
        given, limit = load_prompts(own), limit or config.evaluation.num_prompts
    if not given:
        raise ValueError("which prompts? give --prompts FILE or -p 'a prompt' (several times if you like)")
    if limit is not None and limit > len(given):
        raise ValueError(f"--num-prompts {limit}, but there are {len(given)} prompts")
    return given[:limit]


@dataclass(frozen=True)
class Fixture:
    """What the two sides are compared on.

    Attributes:
        jobs: prompt and seed of every pair.
        held: samples of the sides that are folders, by name.
        exactly: whether a folder must hold nothing else.
    """

    jobs: Sequence[Job]
    held: dict[str, list[Sample]]
    exactly: bool

    @property
    def prompts(self) -> list[Prompt]:
        """Each prompt once."""
        return list({prompt_key(job.prompt): job.prompt for job in self.jobs}.values())


def fixture(sides: Sequence[Candidate], prompts: Sequence[Prompt] | None, seeds: Sequence[int] | None) -> Fixture:
    """Prompts and seeds: as given, or those of the first folder of samples.

    Raises:
        ValueError: a folder cannot be read, or has none of them.
    """
    held = {side.name: read_samples(Path(side.name), prompts) for side in sides if side.source is None}
    if not held:
        assert prompts is not None, "sides that are drawn have prompts"
        return Fixture(jobs_of(prompts, seeds or DEFAULT_SEEDS), held, exactly=False)
    name, samples = next(iter(held.items()))
    jobs = chosen(jobs_in(samples), prompts, seeds)
    found = {prompt_key(job.prompt) for job in jobs}
    if missing := [prompt for prompt in prompts or () if prompt_key(prompt) not in found]:
        raise ValueError(f"{name} has no sample of the prompt {missing[0].text[:60]!r}" + (" with these seeds" if seeds else ""))
    if not jobs:
        raise ValueError(f"{name} has no samples with seeds {', '.join(map(str, seeds or ()))}")
    return Fixture(jobs, held, exactly=prompts is None and seeds is None)


def samples_of(side: Candidate, folder: Path, shared: Fixture, device: str, console: Console) -> list[Sample]:
    """A side's sample of every job; what is missing is drawn into ``folder``, by a pipeline that is loaded for it and let go again.

    Raises:
        ValueError: a folder lacks samples, or ``folder`` holds those of something else.
    """
    if side.source is None:
        return matched(shared.jobs, shared.held[side.name], side.name, shared.exactly)
    kept = SampleFolder(folder, side.source.identity)
    missing = kept.missing(shared.jobs)
    if missing:
        if there := len(shared.jobs) - len(missing):
            console.print(f"{there} of {len(shared.jobs)} samples of {side.name} are there already", highlight=False)
        draw = pipeline_draw(side.source, device, [job.prompt for job in missing])
        shown = track(missing, description=f"sample {side.name}", console=console, disable=not console.is_terminal)
        try:
            kept.fill(shown, draw)
        finally:  # also after Ctrl-C or an error: what was made is on disk
            if left := len(kept.missing(shared.jobs)):
                console.print(f"{len(shared.jobs) - left} of {len(shared.jobs)} samples in {folder}; the same command continues",
                              highlight=False)
    return matched(shared.jobs, kept.samples(), side.name, exactly=False)
