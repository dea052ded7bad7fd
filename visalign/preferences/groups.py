"""Preferences out of scored samples: a folder that grows group by group, and the choice of pairs from it.

    FOLDER/pairs.json            the settings that made the samples; another call with other settings is refused
    FOLDER/groups.jsonl          one line per prompt: seeds, files, every reward's values; written last, so a line means a whole group
    FOLDER/media, latents        the samples to look at and to train on
    FOLDER/preferences.jsonl     the chosen pairs, in our format; made anew by every call, so that rule and margin can be changed

Sample k of group g depends on (seed, g, k) alone: a killed run continues where it was, and more prompts may be appended.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from visalign.credit import RewardTerm, assign_credit
from visalign.maths.preference_selection import Agreement, select_pairs
from visalign.maths.seeds import derive_seed
from visalign.resumable import claim, whole_lines
from visalign.types import Prompt, Scores

GROUPS, SETTINGS, MEDIA, LATENTS = "groups.jsonl", "pairs.json", "media", "latents"
SELECT = 4  # what a seed is for: derive_seed(seed, group, SELECT)

Choice = Literal["best_worst", "random", "all", "rso", "list"]


@dataclass(frozen=True)
class ScoredGroup:
    """One prompt's G samples.

    Attributes:
        group: position of the prompt.
        prompt: of all of them.
        seeds: of the samples.
        media: files relative to the folder.
        values: by reward, larger is better; ``None`` where the sample is invalid.
        reasons: by reward, why a sample is invalid.
    """

    group: int
    prompt: Prompt
    seeds: tuple[int, ...]
    media: tuple[str, ...]
    values: Mapping[str, tuple[float | None, ...]]
    reasons: Mapping[str, tuple[str | None, ...]]

    @property
    def latents(self) -> str:
        """File of the latents (G, *latent_shape), relative to the folder."""
        return f"{LATENTS}/{self.group:06d}.safetensors"


@dataclass(frozen=True)
class Selection:
    """What was chosen from the groups.

    Attributes:
        lines: of ``preferences.jsonl``.
        margins: one per line.
        without: groups that gave nothing, counted by why.
        invalid: samples that a reward could not score, counted by (reward, reason).
    """

    lines: tuple[str, ...]
    margins: tuple[float, ...]
    without: Mapping[str, int] = field(default_factory=dict)
    invalid: Mapping[tuple[str, str], int] = field(default_factory=dict)


class GroupFolder:
    """The folder.

    Args:
        settings: everything the samples depend on besides their prompts.
    Raises:
        ValueError: the folder holds samples of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        claim(path, SETTINGS, settings, content=(GROUPS, MEDIA, LATENTS))

    def read(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        """The groups that are whole, one per prompt from the first on; what a killed run began to write is cut off.

        Raises:
            ValueError: they are of other prompts, or the file is damaged.
        """
        file = self.path / GROUPS
        groups: list[ScoredGroup] = []
        for number, line in enumerate(whole_lines(file)):
            try:
                row = json.loads(line)
                prompt = Prompt(row["prompt"], row["negative_prompt"], tuple(row["images"]), row["metadata"])
                group = ScoredGroup(int(row["group"]), prompt, tuple(row["seeds"]), tuple(row["media"]),
                                    {name: tuple(values) for name, values in row["values"].items()},
                                    {name: tuple(reasons) for name, reasons in row["reasons"].items()})
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number + 1}: not a group ({error!r}); remove the line and those after it") from error
            if group.group != number:
                raise ValueError(f"{file}, line {number + 1}: group {group.group} where {number} was expected")
            if number < len(prompts) and _asked(prompts[number]) != _asked(prompt):
                raise ValueError(f"{file}: prompt {number} was {prompt.text[:60]!r} there and is {prompts[number].text[:60]!r} now; "
                                 "give the same prompts (more may be appended), or choose another folder")
            groups.append(group)
        return groups

    def append(self, group: ScoredGroup) -> None:
        """Add a group whose files are written."""
        row = {"group": group.group, **_asked(group.prompt), "seeds": list(group.seeds), "media": list(group.media),
               "values": {name: list(values) for name, values in group.values.items()},
               "reasons": {name: list(reasons) for name, reasons in group.reasons.items()}}
        with (self.path / GROUPS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def scored_group(group: int, prompt: Prompt, seeds: Sequence[int], media: Sequence[str], scores: Mapping[str, Scores],
                 usable: Sequence[bool]) -> ScoredGroup:
    """Scores as they are stored; a sample that is not ``usable`` (its latents are not finite) is invalid under every reward."""
    values, reasons = {}, {}
    for name, answer in scores.items():
        valid = [bool(ok) and good for ok, good in zip(answer.valid.tolist(), usable, strict=True)]
        values[name] = tuple(float(value) if ok else None for value, ok in zip(answer.value.tolist(), valid, strict=True))
        reasons[name] = tuple(None if ok else ("nonfinite latents" if not good else reason or "invalid")
                              for ok, good, reason in zip(valid, usable, answer.reasons, strict=True))
    return ScoredGroup(group, prompt, tuple(seeds), tuple(media), values, reasons)


def choose(groups: Sequence[ScoredGroup], terms: Sequence[RewardTerm], *, rule: Choice = "best_worst", margin: float = 0.0,
           per_prompt: int | None = None, agreement: Agreement = "combined", temperature: float = 1.0, seed: int = 0) -> Selection:
    """Pairs (or, with rule "list", whole groups) of samples and their combined rewards.

    The combined reward is the weighted sum of the rewards' values (``credit.assign_credit``), which is also what ``margin`` and the
    stored scores mean. A group needs valid scores for more than half of its samples and for at least two.

    Args:
        rule, margin, agreement, temperature: as in ``maths.preference_selection.select_pairs``; rule "list" keeps every sample of
            groups that are wholly valid, with the spread of their rewards as margin.
        per_prompt: most pairs per group; ``None`` for one under "random", every qualifying pair otherwise.
        seed: of the rules that draw; each group has its own.
    Raises:
        ValueError: an unknown rule, or options that do not go together.
    """
    for name, value, allowed in (("rule", rule, get_args(Choice)), ("agreement", agreement, get_args(Agreement))):
        if value not in allowed:
            raise ValueError(f"{name} '{value}': use {', '.join(allowed)}")
    if not (margin >= 0 and temperature > 0):
        raise ValueError(f"margin must be at least 0 and temperature above 0, got {margin} and {temperature}")
    if per_prompt is not None and per_prompt < 1:
        raise ValueError(f"per_prompt must be at least 1, got {per_prompt}")
    lines: list[str] = []
    margins: list[float] = []
    without: Counter[str] = Counter()
    invalid = Counter((name, reason) for group in groups for name, reasons in group.reasons.items() for reason in reasons if reason)
    for group in groups:
        picked, nothing, reward = _pick(group, terms, rule, margin, per_prompt, agreement, temperature, seed)
        if not picked:
            without[nothing] += 1
        for rows, gap in picked:
            lines.append(_line(group, rows, reward, gap))
            margins.append(gap)
    return Selection(tuple(lines), tuple(margins), dict(without), dict(invalid))


def _pick(group: ScoredGroup, terms: Sequence[RewardTerm], rule: Choice, margin: float, per_prompt: int | None, agreement: Agreement,
          temperature: float, seed: int) -> tuple[list[tuple[list[int], float]], str, list[float]]:
    """(samples, margin) per preference of one group; why there is none, if so; and the combined rewards."""
    scores = {name: Scores.from_values(values) for name, values in group.values.items()}
    size = len(group.seeds)
    credit = assign_credit(terms, scores, torch.zeros(size, dtype=torch.int64))
    usable, reward = credit.reward[credit.valid], credit.reward.tolist()
    if len(usable) < 2:
        return [], "too few valid samples", reward
    spread = float(usable.max() - usable.min())
    nothing = "ties" if spread == 0 else "below the margin" if spread <= margin else "rewards disagree or nothing was drawn"
    if rule == "list":
        whole = bool(credit.valid.all())
        return [(list(range(size)), spread)] if whole and spread > margin else [], nothing if whole else "invalid samples", reward
    criteria = torch.stack([math.copysign(1, term.weight) * scores[term.name].value for term in terms], dim=-1)
    found = select_pairs(credit.reward[None], credit.valid[None], rule, margin, max_pairs=per_prompt, agreement=agreement,
                         criteria=criteria[None], temperature=temperature,
                         generator=torch.Generator().manual_seed(derive_seed(seed, group.group, SELECT)))
    members = torch.stack([found.chosen, found.rejected], dim=1).tolist()
    return list(zip(members, found.margin.tolist(), strict=True)), nothing, reward


def _line(group: ScoredGroup, members: Sequence[int], reward: Sequence[float], margin: float) -> str:
    row = {key: value for key, value in _asked(group.prompt).items() if value}
    pair = {"group": group.group, "margin": margin, "seeds": [group.seeds[k] for k in members],
            "rewards": {name: [values[k] for k in members] for name, values in group.values.items()}}
    row |= {"media": [group.media[k] for k in members], "latents": group.latents, "rows": list(members),
            "scores": [reward[k] for k in members], "metadata": {**group.prompt.metadata, "pair": pair}}
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _asked(prompt: Prompt) -> dict[str, Any]:
    """The prompt as it is stored; condition images by absolute path."""
    return {"prompt": prompt.text, "negative_prompt": prompt.negative, "images": [str(Path(image).resolve()) for image in prompt.images],
            "metadata": json.loads(json.dumps(dict(prompt.metadata), default=str))}
