"""Which samples of two folders belong together: the same prompt, the same seed; and which are still to be made.

Prompts are compared with everything they hold. A prompt that comes again in a list has the next seeds, so that no sample counts twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visalign.media import INDEX, KIND, Sample, append_index, index_rows, read_index, save_media
from visalign.resumable import claim, whole_lines
from visalign.types import Media, Prompt

SETTINGS = "sampled.json"
_NUMBERED = re.compile(r"(\d+)_(\d+)")


@dataclass(frozen=True)
class Job:
    """One sample to be had: of a prompt, from a seed; ``None`` where nobody knows the seed, then ``number`` counts a prompt's samples."""

    prompt: Prompt
    seed: int | None
    number: int = 0

    @property
    def key(self) -> str:
        """Equal for jobs that are the same."""
        return json.dumps([prompt_key(self.prompt), self.seed, self.number])


def prompt_key(prompt: Prompt) -> str:
    """Equal for prompts that are the same in every respect."""
    return json.dumps([prompt.text, prompt.negative, list(prompt.images), dict(prompt.metadata)], sort_keys=True, default=str)


def jobs_of(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Job]:
    """Every prompt with every seed; the second time a prompt comes it has seeds beyond the largest, and so on."""
    seen: dict[str, int] = {}
    step = max(seeds) - min(seeds) + 1
    jobs = []
    for prompt in prompts:
        times = _count(seen, prompt_key(prompt))
        jobs += [Job(prompt, seed + times * step) for seed in seeds]
    return jobs


def jobs_in(samples: Sequence[Sample]) -> list[Job]:
    """What a folder's samples are, in its order; samples that share prompt and seed are told apart by their number."""
    seen: dict[str, int] = {}
    jobs = []
    for sample in samples:
        job = Job(sample.prompt, sample.seed)
        jobs.append(replace(job, number=_count(seen, job.key)))
    return jobs


def _count(seen: dict[str, int], key: str) -> int:
    """How often the key came before."""
    seen[key] = seen.get(key, 0) + 1
    return seen[key] - 1


def read_samples(folder: Path, prompts: Sequence[Prompt] | None = None) -> list[Sample]:
    """A folder that ``visalign sample`` made, or files PROMPT_NUMBER.png of a list of prompts, both counted from 0.

    Args:
        prompts: what the files are of; where there is an index, prompts of the same text bring their metadata.
    Raises:
        ValueError: neither, or a file of a prompt that the list does not have.
    """
    if (folder / INDEX).is_file():
        samples = read_index(folder)
        return samples if prompts is None else [replace(sample, prompt=_dressed(sample.prompt, prompts)) for sample in samples]
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in KIND) if folder.is_dir() else []
    named = [(_NUMBERED.fullmatch(file.stem), file) for file in files]
    if prompts is None or not named or not all(match for match, _ in named):
        raise ValueError(f"{folder} has no {INDEX}, which visalign sample writes; without it, give --prompts and name the files "
                         "PROMPT_NUMBER.png, both counted from 0")
    found = sorted((int(match[1]), int(match[2]), file) for match, file in named if match)
    if (last := found[-1][0]) >= len(prompts):
        raise ValueError(f"{folder} has files of prompt {last}, but there are {len(prompts)} prompts, counted from 0")
    return [Sample(file=file, prompt=prompts[row], seed=number) for row, number, file in found]


def _dressed(prompt: Prompt, prompts: Sequence[Prompt]) -> Prompt:
    """The prompt of the list that has the same text, if the folder kept no metadata."""
    same = [one for one in prompts if (one.text, one.negative) == (prompt.text, prompt.negative)]
    return same[0] if same and not prompt.metadata else prompt


def chosen(jobs: Sequence[Job], prompts: Sequence[Prompt] | None, seeds: Sequence[int] | None) -> list[Job]:
    """The jobs of these prompts and seeds; ``None`` for all."""
    wanted = None if prompts is None else {prompt_key(prompt) for prompt in prompts}
    return [job for job in jobs if (wanted is None or prompt_key(job.prompt) in wanted) and (seeds is None or job.seed in seeds)]


def matched(jobs: Sequence[Job], samples: Sequence[Sample], side: str, exactly: bool) -> list[Sample]:
    """A side's sample of every job.

    Args:
        side: what errors call the folder.
        exactly: whether samples beyond the jobs are a mismatch as well.
    Raises:
        ValueError: names the first job without a sample, or the first sample without a job.
    """
    held = dict(zip((job.key for job in jobs_in(samples)), samples, strict=True))
    for row, job in enumerate(jobs):
        if job.key not in held:
            raise ValueError(f"both sides need the same prompts and seeds, and {side} has no sample {row}: {_difference(job, samples)}")
    keys = {job.key for job in jobs}
    if exactly and (more := [job for job in jobs_in(samples) if job.key not in keys]):
        raise ValueError(f"both sides need the same prompts and seeds, and {side} alone has {_name(more[0])} ({len(more)} samples in all); "
                         "choose with --prompts and --seeds")
    return [held[job.key] for job in jobs]


def _difference(job: Job, samples: Sequence[Sample]) -> str:
    same_prompt = [sample for sample in samples if prompt_key(sample.prompt) == prompt_key(job.prompt)]
    if same_prompt:
        return f"{_name(job)}; it has seeds {', '.join(str(sample.seed) for sample in same_prompt[:8])} for that prompt"
    same_text = [sample.prompt for sample in samples if sample.prompt.text == job.prompt.text]
    if same_text:
        there, wanted = same_text[0], job.prompt
        part = next(name for name in ("negative", "images", "metadata") if getattr(there, name) != getattr(wanted, name))
        return f"{_name(job)}; its prompt of that text has {part} {getattr(there, part)!r} instead of {getattr(wanted, part)!r}"
    return _name(job)


def _name(job: Job) -> str:
    return f"prompt {job.prompt.text[:60]!r} with seed {job.seed}"


class SampleFolder:
    """A folder that is filled job by job; a killed process leaves every finished sample, and the next one goes on.

    Args:
        settings: everything a sample depends on besides its job.
    Raises:
        ValueError: the folder holds samples of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        self.path = path
        claim(path, SETTINGS, settings, content=(INDEX,))

    def samples(self) -> list[Sample]:
        """What is there."""
        return [sample for sample in index_rows(self.path, whole_lines(self.path / INDEX)) if sample.file.is_file()]

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Jobs without a sample yet."""
        held = {job.key for job in jobs_in(self.samples())}
        return [job for job in jobs if job.key not in held]

    def fill(self, jobs: Iterable[Job], draw: Callable[[Prompt, int], Media]) -> None:
        """Make a sample of every job; the file is written before its row, so a row means a whole sample.

        Raises:
            ValueError: a job has no seed.
        """
        number = len(whole_lines(self.path / INDEX))
        for job in jobs:
            if job.seed is None:
                raise ValueError(f"prompt {job.prompt.text[:60]!r} has no seed to draw from; the folder it comes from has none")
            file = save_media(draw(job.prompt, job.seed), self.path / f"{number:05d}")
            append_index(self.path, Sample(file=file, prompt=job.prompt, seed=job.seed))
            number += 1
