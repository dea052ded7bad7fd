"""Before and after on the same prompts and seeds, with bootstrap intervals, so that a gain can be told from luck.

Sample k of every evaluation comes from prompt k and one fixed seed, by the deterministic sampler. Two sets of weights are therefore
compared pair by pair, which removes the prompts' and the seeds' variance from the difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.compare.comparison import ask_both_orders
from visalign.distributed import Processes
from visalign.guards.observe import observe
from visalign.maths.bootstrap import Interval, bootstrap_gain, bootstrap_mean
from visalign.maths.seeds import derive_seed
from visalign.media import load_media, read_index, save_samples
from visalign.protocols import AnyReward, LatentSource, PairwiseReward, Policy, Sampler, ValuesSets
from visalign.scoring import latent_media, score, spaces
from visalign.types import Media, Prompt, Scores

BANDWIDTH = "bandwidth"


@dataclass(frozen=True)
class Evaluation:
    """What one set of weights got.

    Attributes:
        values: per metric (``reward`` or ``reward/axis``) one number per sample on the reward's raw scale, float64 (n,), NaN where invalid;
            ``media/<name>`` are the statistics of ``guards.observe``.
        seeds: one per sample.
        whole: numbers about all samples together, finite: their ``diversity``, and the ``bandwidth`` it was measured with; of a run also
            how far its policy is from the reference (``guards.drift``).
    """

    values: Mapping[str, Tensor]
    seeds: tuple[int, ...]
    whole: Mapping[str, float] = field(default_factory=dict)

    def intervals(self) -> dict[str, Interval]:
        """Mean and 95 % interval per metric; metrics without a single valid sample are left out."""
        return {name: bootstrap_mean(values) for name, values in self.values.items() if bool(torch.isfinite(values).any())}

    def metrics(self) -> dict[str, float]:
        """``eval/<metric>`` means, and their intervals as ``eval/<metric>_low`` and ``_high``."""
        found: dict[str, float] = {}
        for name, interval in self.intervals().items():
            found |= {f"eval/{name}": interval.mean, f"eval/{name}_low": interval.low, f"eval/{name}_high": interval.high}
        return {**found, **{f"eval/{name}": value for name, value in self.whole.items() if name != BANDWIDTH}}

    def write(self, path: Path) -> None:
        """As JSON; NaN becomes null."""
        rows = {name: [None if v != v else v for v in values.tolist()] for name, values in self.values.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seeds": list(self.seeds), "values": rows, "whole": dict(self.whole)}), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Evaluation:
        """Inverse of :meth:`write`."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        values = {name: torch.tensor([float("nan") if v is None else v for v in row], dtype=torch.float64)
                  for name, row in stored["values"].items()}
        return Evaluation(values=values, seeds=tuple(stored["seeds"]), whole=stored.get("whole", {}))


def evaluate(policy: Policy, sampler: Sampler, rewards: Mapping[str, AnyReward], prompts: Sequence[Prompt], *, seed: int, batch: int,
             processes: Processes, folder: Path | None = None, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
             progress: Callable[[int, int], None] = lambda done, total: None, bandwidth: float | None = None,
             latents: LatentSource | None = None, opponents: Path | None = None) -> Evaluation | None:
    """One sample per prompt, scored by every reward that judges samples one by one, as a whole set or in pairs.

    Rewards of groups are not asked: a group of one says nothing. Judges of pairs give the probability that a sample is better than its
    opponent; without opponents that is one half, by definition.

    Args:
        rewards: by name.
        seed: sample k is made from ``derive_seed(seed, k)``.
        batch: samples generated and decoded at once.
        folder: where media and their index are written.
        autocast: precision of the denoiser, as in training.
        progress: called with (samples made, samples in all).
        bandwidth: ruler of the diversity, from the evaluation this one is to be compared with; ``None`` makes one of these samples.
        latents: for rewards of latents; without it they are not asked.
        opponents: folder of an earlier evaluation's samples; needs ``folder``, for both sides are judged as they were written.
    Returns:
        On the main process the evaluation, on the others ``None``: media are made on all of them and scored together on one.
    """
    seeds = [derive_seed(seed, k) for k in range(len(prompts))]
    mine = range(processes.rank, len(prompts), processes.world)
    judges = {name: reward for name, reward in rewards.items() if not isinstance(reward, PairwiseReward)
              and reward.spec.arity in ("pointwise", "set") and (latents is not None or reward.spec.space == "media")}
    made: list[tuple[int, Media]] = []
    before_decoding: list[tuple[int, Media]] = []
    for start in range(0, len(mine), batch):
        rows = mine[start:start + batch]
        with autocast():
            clean = sampler.generate(policy, [prompts[k] for k in rows], [seeds[k] for k in rows])
        with torch.no_grad():
            if latents is not None and "latent" in spaces(judges.values()):
                before_decoding += zip(rows, latent_media(clean, [prompts[k] for k in rows], latents, judges.values()), strict=True)
            made += zip(rows, policy.decode(clean, [prompts[k] for k in rows]), strict=True)
        progress(min(len(prompts), len(made) * processes.world), len(prompts))
    media, kept = ([one for _, one in sorted((pair for part in processes.gather_objects(own) for pair in part), key=lambda pair: pair[0])]
                   for own in (made, before_decoding))
    if not processes.is_main:
        return None
    scores = score(judges, media, prompts, list(range(len(prompts))), kept)
    alone = {name: one for name, one in scores.items() if one.features is None}
    if folder is not None:
        save_samples(folder, media, prompts, seeds, {name: one.value for name, one in alone.items()})
    seen = observe(media)
    ruler = seen.bandwidth() if bandwidth is None else bandwidth
    whole = {"diversity": seen.diversity(ruler), BANDWIDTH: ruler, **_of_sets(rewards, scores)}
    duels = _duels({name: reward for name, reward in rewards.items() if isinstance(reward, PairwiseReward)}, prompts, folder, opponents)
    return Evaluation(values={**_values(alone), **duels, **{f"media/{name}": column for name, column in seen.statistics.items()}},
                      seeds=tuple(seeds), whole={name: value for name, value in whole.items() if math.isfinite(value)})


def _of_sets(rewards: Mapping[str, AnyReward], scores: Mapping[str, Scores]) -> dict[str, float]:
    """What set-level rewards say of all samples together, larger is better."""
    found = {}
    for name, one in scores.items():
        reward = rewards[name]
        if one.features is not None and isinstance(reward, ValuesSets) and int(one.valid.sum()) > 1:
            found[name] = reward.value(one.features[one.valid])
    return found


def _duels(judges: Mapping[str, PairwiseReward], prompts: Sequence[Prompt], folder: Path | None,
           opponents: Path | None) -> dict[str, Tensor]:
    """``P(the sample is better than its opponent)`` by judge, and how far the two orders contradict each other; float64 (n,)."""
    if opponents is None or folder is None:
        return {name: torch.full((len(prompts),), 0.5, dtype=torch.float64) for name in judges}
    own, others = ([load_media(sample.file) for sample in read_index(side)] for side in (folder, opponents)) if judges else ([], [])
    found: dict[str, Tensor] = {}
    for name, judge in judges.items():
        both = ask_both_orders(judge, own, others, prompts)
        found |= {name: both.prob.double(), f"{name}/swap_inconsistency": both.inconsistency.double()}
    return found


def write_comparison(path: Path, before: Evaluation, after: Evaluation) -> None:
    """``evaluation.json``: per metric the two means and the paired gain, each with its interval."""
    rows = {}
    for name in before.intervals().keys() & after.intervals().keys():
        pair = before.values[name], after.values[name]
        if bool(torch.isfinite(pair[1] - pair[0]).any()):
            rows[name] = {"before": vars(bootstrap_mean(pair[0])), "after": vars(bootstrap_mean(pair[1])),
                          "gain": vars(bootstrap_gain(*pair))}
    path.write_text(json.dumps(dict(sorted(rows.items())), indent=1), encoding="utf-8")


def _values(scores: Mapping[str, Scores]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name, one in scores.items():
        values[name] = one.raw.double()
        values |= {f"{name}/{axis}": detail.double() for axis, detail in one.details.items()}
    return values
