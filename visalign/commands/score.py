"""``visalign score``: any rewards on a folder of media; a table with intervals, and one row per sample."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from visalign.commands import quiet_libraries
from visalign.config import GuardConfig, RewardConfig, load_config
from visalign.data import load_prompts
from visalign.maths.bootstrap import bootstrap_mean
from visalign.media import INDEX, KIND, Sample, load_media, read_index
from visalign.protocols import Measures, Reward, SetReward, ValuesSets
from visalign.reward_entries import load, parse_reward, unique_names
from visalign.scoring import admit, score
from visalign.types import Measurement, Prompt, Scores


def run(folder: Path, rewards: list[str], *, config: str | None, source: str | None, out: Path | None) -> None:
    wanted: list[RewardConfig | GuardConfig] = [parse_reward(text) for text in rewards]
    if config is not None:
        loaded = load_config(config)
        wanted += [*loaded.rewards, *loaded.guards]
    if not wanted:
        raise ValueError("which rewards? -r clip, -r '{name: clip, params: {model: ...}}', -r my_file.py:function, or --config CONFIG")
    quiet_libraries()
    samples = find_samples(folder, source)
    named = unique_names(wanted)
    path = out or folder / "scores.jsonl"
    if out is None:
        refuse_other_scores(path, named)
    path.parent.mkdir(parents=True, exist_ok=True)
    loaded_rewards = {name: load(entry) for name, entry in named.items()}
    refuse_unknown_prompts(loaded_rewards, samples)
    admit(loaded_rewards, [sample.prompt for sample in samples])
    media = [load_media(sample.file) for sample in samples]
    # Samples of one prompt are a group: rewards that compare need to know.
    groups: dict[str, int] = {}
    keys = [json.dumps([sample.prompt.text, dict(sample.prompt.metadata)], sort_keys=True, default=str) for sample in samples]
    group_id = [groups.setdefault(key, len(groups)) for key in keys]
    scores = score(loaded_rewards, media, [sample.prompt for sample in samples], group_id)
    sets = {name: of_set(name, loaded_rewards[name], one) for name, one in scores.items() if one.features is not None}
    alone = {name: one for name, one in scores.items() if name not in sets}
    if alone:
        write_scores(path, samples, alone)
    console = Console()
    console.print(table(scores, sets, num_prompts=len(groups)))
    if alone:
        console.print(f"per-sample scores: {path}", highlight=False)


def of_set(name: str, reward: Reward | SetReward, answer: Scores) -> dict[str, float]:
    """What a set-level reward says of all samples together, larger is better, and its metric on the published scale.

    Raises:
        ValueError: it gives no value of a set, or fewer than two samples have features.
    """
    if not isinstance(reward, ValuesSets):
        raise ValueError(f"'{name}' judges whole sets and says nothing but which samples of a run to keep; list it in the run itself")
    assert answer.features is not None, "scoring gives the features of a set-level reward"
    features = answer.features[answer.valid]
    if len(features) < 2:
        raise ValueError(f"'{name}' judges whole sets, and {len(features)} of {len(answer.valid)} samples have features; it needs at least "
                         "two")
    measured: tuple[Measurement, ...] = reward.measure(features) if isinstance(reward, Measures) else ()
    return {name: reward.value(features), **{f"  {one.name}": one.value for one in measured}}


def refuse_other_scores(path: Path, rewards: Collection[str]) -> None:
    """The default file is only replaced by scores of the same rewards.

    Raises:
        ValueError: it holds scores that this command would not make again.
    """
    if not path.is_file():
        return
    try:
        held = {name for line in path.read_text(encoding="utf-8").splitlines() for name in json.loads(line)} - {"file", "prompt", "seed"}
    except (TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} exists and was not written by visalign score; name another file with --out") from None
    if lost := held - set(rewards):
        raise ValueError(f"{path} holds scores of {', '.join(sorted(lost))}, which this command would not make again; "
                         f"give --out {path.with_name('scores-' + '-'.join(rewards) + '.jsonl')}, or remove it")


def refuse_unknown_prompts(rewards: Mapping[str, Reward | SetReward], samples: Sequence[Sample]) -> None:
    """Files whose prompts nobody knows can only be scored by rewards that read none.

    Raises:
        ValueError: says which reward reads them, and where prompts can come from.
    """
    reading = [name for name, reward in rewards.items() if "prompt" in reward.spec.requires]
    if reading and not any(sample.prompt.text for sample in samples):
        first = samples[0].file
        raise ValueError(f"{reading[0]} reads prompts, and nobody knows those of the files in {first.parent}: give --prompts FILE with one "
                         f"per file, in the order of file names, or put each in a .txt file beside it ({first.with_suffix('.txt').name})")


def find_samples(folder: Path, source: str | None) -> list[Sample]:
    """Samples with their prompts: from the folder's index, from ``source`` in file-name order, or from ``.txt`` files beside them.

    Raises:
        ValueError: no media, or the numbers of files and prompts differ.
    """
    if source is None and (folder / INDEX).is_file():
        return read_index(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in KIND)
    if not files:
        raise ValueError(f"{folder} holds no media; expected files ending in {', '.join(sorted(KIND))}")
    if source is not None:
        prompts = load_prompts(source)
        if len(prompts) != len(files):
            raise ValueError(f"{len(files)} files in {folder} but {len(prompts)} prompts in {source}; "
                             "give one prompt per file, in the order of file names")
        return [Sample(file=file, prompt=prompt) for file, prompt in zip(files, prompts, strict=True)]
    captions = [file.with_suffix(".txt") for file in files]
    if any(caption.is_file() for caption in captions):
        if missing := [caption.name for caption in captions if not caption.is_file()]:
            raise ValueError(f"{len(missing)} of {len(files)} files have no caption beside them: {', '.join(missing[:5])}")
        return [Sample(file=file, prompt=Prompt(caption.read_text(encoding="utf-8").strip()))
                for file, caption in zip(files, captions, strict=True)]
    return [Sample(file=file, prompt=Prompt("")) for file in files]


def write_scores(path: Path, samples: Sequence[Sample], scores: dict[str, Scores]) -> None:
    """One row per sample: raw scores and details by reward, or why there is none."""
    rows = []
    for i, sample in enumerate(samples):
        row: dict[str, object] = {"file": sample.file.name, "prompt": sample.prompt.text, "seed": sample.seed}
        for name, answer in scores.items():
            if answer.valid[i]:
                details = {key: float(column[i]) for key, column in answer.details.items() if math.isfinite(float(column[i]))}
                row[name] = {"raw": float(answer.raw[i]), **details}
            else:
                row[name] = {"invalid": answer.reasons[i]}
        rows.append(json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def table(scores: dict[str, Scores], sets: Mapping[str, Mapping[str, float]], num_prompts: int) -> Table:
    """Mean with its 95 % bootstrap interval, range and validity per reward, and the mean of each detail; one number for all samples where
    a reward judges sets."""
    count = len(next(iter(scores.values())).valid)
    shown = Table(title=f"{count} samples of {num_prompts} prompt{'s' if num_prompts > 1 else ''}", title_justify="left")
    for heading in ("reward", "mean", "95 % interval", "min", "max", "valid"):
        shown.add_column(heading, justify="left" if heading == "reward" else "right")
    for name, answer in scores.items():
        if name in sets:
            for label, value in sets[name].items():
                shown.add_row(label, f"{value:.4g}", "of the whole set", "", "", f"{int(answer.valid.sum())}/{count}")
            continue
        if not answer.valid.any():
            shown.add_row(name, "-", "-", "-", "-", f"0/{count} ({answer.reasons[0]})")
            continue
        interval, raw = bootstrap_mean(answer.raw), answer.raw[answer.valid]
        shown.add_row(name, f"{interval.mean:.4g}", f"{interval.low:.4g} to {interval.high:.4g}", f"{raw.min():.4g}", f"{raw.max():.4g}",
                      f"{int(answer.valid.sum())}/{count}")
        for key, column in answer.details.items():
            if column.isfinite().any():
                part = bootstrap_mean(column)
                shown.add_row(f"  {key}", f"{part.mean:.4g}", f"{part.low:.4g} to {part.high:.4g}", "", "", f"{part.count}/{count}")
    return shown
