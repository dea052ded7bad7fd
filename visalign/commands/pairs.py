"""``visalign pairs``: groups of samples of a policy, their rewards, and the preferences these make, as a data set to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from visalign import scoring
from visalign.commands import quiet_libraries
from visalign.commands.models import model_source
from visalign.commands.pipelines import check_call, load_pipeline
from visalign.config import RewardConfig
from visalign.credit import RewardTerm, asked
from visalign.data import load_prompts
from visalign.maths.preference_selection import Agreement
from visalign.maths.seeds import derive_seed
from visalign.media import save_media
from visalign.preferences.groups import LATENTS, MEDIA, Choice, GroupFolder, ScoredGroup, Selection, choose, scored_group
from visalign.preferences.readers import INDEX
from visalign.preferences.stored import write_latents
from visalign.protocols import SetReward
from visalign.resumable import write_lines
from visalign.reward_entries import load, parse_reward, unique_names
from visalign.samplers.identity import pipeline_identity
from visalign.samplers.latent_source import PipelineLatents
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import generate
from visalign.types import Media, Prompt


@dataclass(frozen=True)
class Wanted:
    """Which pairs to take from the groups; see ``preferences.groups.choose``."""

    rule: Choice
    margin: float
    per_prompt: int | None
    agreement: Agreement
    temperature: float


def run(model: str, call: list[str], *, adapter: Path | None, texts: list[str], source: str | None, rewards: list[str], group_size: int,
        wanted: Wanted, seed: int, batch: int, dtype: str | None, device: str, out: Path) -> None:
    prompts = [Prompt(text) for text in texts] + (load_prompts(source) if source else [])
    if not prompts:
        raise ValueError("nothing to draw: give -p 'a prompt' (several times if you like) or --prompts FILE")
    if not rewards:
        raise ValueError("which rewards? -r clip, -r '{name: clip, weight: 2, params: {model: ...}}', -r my_file.py:function")
    if group_size < 2 or batch < 1:
        raise ValueError(f"--group-size must be at least 2 and --batch at least 1, got {group_size} and {batch}")
    terms = build_terms(rewards)
    named = asked(terms)
    scoring.admit(named, prompts)
    select(wanted, [], terms, seed)  # complains before anything is drawn
    drawn = model_source(model, call, adapter, dtype)
    folder = GroupFolder(out, {**drawn.identity, "seed": seed, "group_size": group_size,
                               "rewards": [parse_reward(text).model_dump() for text in rewards]})
    groups = folder.read(prompts)
    console = Console(stderr=True)
    if len(groups) < len(prompts):
        quiet_libraries()
        pipeline = load_pipeline(drawn.path, drawn.dtype, device, drawn.adapter)
        check_call(pipeline, drawn.call)
        policy = PipelinePolicy(pipeline, drawn.call, probe=prompts[0])
        identity = pipeline_identity(policy)
        todo = range(len(groups), len(prompts))
        try:
            for group in track(todo, description="pairs", console=console, disable=not console.is_terminal):
                groups.append(draw(policy, identity, folder, group, prompts[group], terms, group_size, seed, batch))
        finally:  # also after Ctrl-C or an error: whole groups are kept, the same command continues
            if len(groups) < len(prompts):
                console.print(f"{len(groups)} of {len(prompts)} groups in {out}; the same command continues", highlight=False)
    groups = groups[:len(prompts)]
    found = select(wanted, groups, terms, seed)
    write_lines(out / INDEX, found.lines)
    Console().print(table(groups, found, wanted))
    if found.lines:
        Console().print(f"preferences: {out / INDEX}", highlight=False)
    else:
        raise ValueError(f"no group gave a pair; lower --margin (now {wanted.margin:g}), or raise --group-size")


def select(wanted: Wanted, groups: Sequence[ScoredGroup], terms: Sequence[RewardTerm], seed: int) -> Selection:
    return choose(groups, terms, rule=wanted.rule, margin=wanted.margin, per_prompt=wanted.per_prompt, agreement=wanted.agreement,
                  temperature=wanted.temperature, seed=seed)


def build_terms(rewards: Sequence[str]) -> list[RewardTerm]:
    """Rewards with their weights, each under a name of its own.

    Raises:
        ValueError: one judges sets of samples, which prefers no sample of a prompt to another.
    """
    entries = unique_names([parse_reward(text) for text in rewards])
    terms = [RewardTerm(name=name, reward=load(entry), weight=entry.weight, required=entry.required)
             for name, entry in entries.items() if isinstance(entry, RewardConfig)]
    if sets := [term.name for term in terms if isinstance(term.reward, SetReward)]:
        raise ValueError(f"{', '.join(sets)} judges a set of samples as a whole and makes no pairs; use rewards of samples here, and "
                         "set-level rewards in visalign train")
    return terms


def draw(policy: PipelinePolicy, identity: str, folder: GroupFolder, group: int, prompt: Prompt, terms: Sequence[RewardTerm],
         size: int, seed: int, batch: int) -> ScoredGroup:
    """One group: sampled, decoded, scored and written."""
    seeds = [derive_seed(seed, group, k) for k in range(size)]
    latents = generate(policy, [prompt] * size, seeds, microbatch=batch)
    media: list[Media] = []
    for part in latents.split(batch):
        media += policy.decode(part, [prompt] * len(part))
    usable = torch.isfinite(latents.flatten(1)).all(dim=1).tolist()
    rewards, source = asked(terms), PipelineLatents(policy)
    scoring.admit_latents(rewards, source)
    kept = scoring.latent_media(latents, [prompt] * size, source, rewards.values()) if "latent" in scoring.spaces(rewards.values()) else ()
    scores = scoring.score(rewards, media, [prompt] * size, [0] * size, kept)
    (folder.path / MEDIA).mkdir(exist_ok=True)
    files = [save_media(one, folder.path / MEDIA / f"{group:06d}-{k:02d}") for k, one in enumerate(media)]
    found = scored_group(group, prompt, seeds, [f"{MEDIA}/{file.name}" for file in files], scores, usable)
    write_latents(folder.path / LATENTS / Path(found.latents).name, latents, identity)
    folder.append(found)
    return found


def table(groups: Sequence[ScoredGroup], found: Selection, wanted: Wanted) -> Table:
    """What became of the samples."""
    num_samples = sum(len(group.seeds) for group in groups)
    lists = wanted.rule == "list"
    title = f"{num_samples} samples of {len(groups)} prompt{'s' if len(groups) > 1 else ''}"
    shown = Table(title=title, title_justify="left", show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    shown.add_row("lists" if lists else "pairs", str(len(found.lines)))
    if found.margins:
        margins = torch.tensor(found.margins)
        shown.add_row("margin, mean", f"{float(margins.mean()):.4g}")
        shown.add_row("margin, smallest to largest", f"{float(margins.min()):.4g} to {float(margins.max()):.4g}")
    for reason, count in sorted(found.without.items()):
        shown.add_row(f"prompts without one: {reason}", str(count))
    for (name, reason), count in sorted(found.invalid.items()):
        shown.add_row(f"invalid samples: {name}, {reason}", str(count))
    return shown
