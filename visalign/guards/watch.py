"""The guards of a run, as the loop asks them: what its samples are like, and what an evaluation says about hacking."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from visalign.compare.comparison import outcomes
from visalign.config import StoppingConfig
from visalign.credit import RewardTerm
from visalign.distributed import Processes
from visalign.evaluation import BANDWIDTH, Evaluation
from visalign.guards.alarm import Alarm
from visalign.guards.observe import group_diversity, observe
from visalign.guards.rule import Fall, Look, Shift, Verdict, judge, shifts
from visalign.maths.bootstrap import bootstrap_mean
from visalign.parts import Parts
from visalign.runfolder import AFTER, BEFORE, RunFolder, evaluation_label
from visalign.types import Media

logger = logging.getLogger(__name__)

MEDIA = "media/"


class Watch:
    """What a run's guards have seen. Its memory is the folder's evaluations, so that a resumed run remembers exactly as much."""

    def __init__(self, parts: Parts, settings: StoppingConfig, folder: RunFolder, processes: Processes) -> None:
        self.terms, self.settings, self.folder, self.processes = parts.terms, settings, folder, processes
        self.directions = {name: reward.spec.direction for name, reward in
                           [*parts.guards.items(), *((term.name, term.reward) for term in parts.terms)]}
        self.stopping = [name for name in parts.guards if name in parts.stopping]
        self.bandwidth: float | None = None
        if settings.max_kl is not None and not parts.eval_policy.has_role("reference"):
            raise ValueError(f"stopping.max_kl {settings.max_kl:g} needs a reference to be far from, and this policy keeps none; train an "
                             "adapter (trainable.mode: lora), or leave max_kl out")

    def begin(self) -> None:
        """Take the ruler of diversities from the evaluation before training; every process calls this once."""
        path = self.folder.evaluation(BEFORE)
        found = Evaluation.read(path).whole.get(BANDWIDTH) if self.folder.writes and path.is_file() else None
        self.bandwidth = self.processes.gather_objects(found)[0]

    def recall(self, iteration: int, last: int) -> Alarm | None:
        """The alarm of the evaluation a resumed run stands at, after ``iteration`` of ``last`` updates; every process calls this."""
        alarm = None
        if self.folder.writes and iteration:
            told = Alarm.read(self.folder.stopping) if self.folder.stopping.is_file() else None
            path = self.folder.evaluation(AFTER if iteration == last else evaluation_label(iteration))
            if told is not None and told.iteration == iteration:
                alarm = told
            elif path.is_file():
                alarm = self.of_evaluation(Evaluation.read(path), iteration)[2]
        shared: Alarm | None = self.processes.gather_objects(alarm)[0]
        return shared

    def of_samples(self, media: Sequence[Media], group_id: Tensor) -> dict[str, float]:
        """``media/<statistic>`` over the samples of all processes, and ``media/diversity`` within groups; every process calls this."""
        seen = observe(media)
        columns = {name: values[torch.isfinite(values)] for name, values in seen.statistics.items()}
        if self.bandwidth:
            within = torch.tensor(group_diversity(seen, group_id, self.bandwidth), dtype=torch.float64)
            columns["diversity"] = within[torch.isfinite(within)]
        sums: dict[str, tuple[float, int]] = {}
        for part in self.processes.gather_objects({name: (float(values.sum()), len(values)) for name, values in columns.items()}):
            for name, (total, count) in part.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = (before[0] + total, before[1] + count)
        return {MEDIA + name: total / count for name, (total, count) in sums.items() if count}

    def of_evaluation(self, found: Evaluation, iteration: int) -> tuple[dict[str, float], float, Alarm | None]:
        """What the evaluation after ``iteration`` updates says beside those before it; on the main process.

        Returns:
            Metrics (``guard/<name>_drop``, win rates against the start), the evaluation's standing (``guards.rule``), and an alarm.
        """
        earlier = self._earlier(iteration)
        if not earlier:
            return {}, 0.0, None
        first, looks = earlier[0][1], [self._look(one, at) for at, one in [*earlier, (iteration, found)]]
        verdict = judge(looks, fall=self.settings.fall, confidence=self.settings.confidence)
        moved = [] if self.settings.statistics == "ignore" else self._shifts(first, found)
        metrics = {f"guard/{fall.guard}_drop": fall.drop for fall in verdict.falls}
        metrics |= {"guard/alarms": float(len(verdict.alarms)), "guard/shifts": float(len(moved)),
                    "guard/best_iteration": float(looks[verdict.best].iteration)}
        alarm = self._alarm(verdict, moved, looks, found.whole.get("kl_per_dim", 0.0))
        return {**metrics, **win_rates(first, found, self.directions)}, verdict.standing, alarm

    def _alarm(self, verdict: Verdict, moved: Sequence[Shift], looks: Sequence[Look], kl: float) -> Alarm | None:
        now, best = looks[-1], looks[verdict.best].iteration
        rises = float((now.reward - looks[0].reward).nanmean()) > 0
        if moved and rises:
            changes = ", ".join(shift.describe() for shift in moved)
            logger.warning("iteration %d: the reward rises while the media change (%s since the start); look at the pictures before "
                           "you believe the reward", now.iteration, changes)
            if self.settings.statistics == "stop":
                return Alarm(now.iteration, "shift", (f"the reward rises while the media change: {changes}",), best)
        if not verdict.alarms:
            return self._too_far(kl, now.iteration, best)
        kind = "collapse" if all(fall.kind == "collapse" for fall in verdict.alarms) else "hacking"
        alarm = Alarm(now.iteration, kind, tuple(_cause(fall) for fall in verdict.alarms), best)
        logger.warning("%s", alarm.message)
        return alarm if self._persists(looks) else self._too_far(kl, now.iteration, best)

    def _too_far(self, kl: float, iteration: int, best: int) -> Alarm | None:
        limit = self.settings.max_kl
        if limit is None or kl <= limit:
            return None
        alarm = Alarm(iteration, "drift", (f"the policy is {kl:.2g} nats per latent dimension from its reference, beyond {limit:g}",), best)
        logger.warning("%s", alarm.message)
        return alarm

    def _persists(self, looks: Sequence[Look]) -> bool:
        """Whether the last ``patience`` evaluations all showed an alarm."""
        rule = self.settings
        ends = range(len(looks), len(looks) - rule.patience, -1)
        return all(end > 0 and judge(looks[:end], fall=rule.fall, confidence=rule.confidence).alarms for end in ends)

    def _earlier(self, iteration: int) -> list[tuple[int, Evaluation]]:
        """The evaluations before this one, in order."""
        paths = {at: self.folder.evaluation(evaluation_label(at)) for at in range(iteration)}
        return [(at, Evaluation.read(path)) for at, path in paths.items() if path.is_file()]

    def _look(self, found: Evaluation, iteration: int) -> Look:
        guards = {name: self.directions[name] * found.values[name] for name in self.stopping if name in found.values}
        return Look(iteration, training_reward(self.terms, found), guards)

    def _shifts(self, first: Evaluation, now: Evaluation) -> list[Shift]:
        before, after = ({name.removeprefix(MEDIA): values for name, values in one.values.items() if name.startswith(MEDIA)}
                         for one in (first, now))
        known = "diversity" in first.whole and "diversity" in now.whole
        return shifts(before, after, self.settings.shift, (first.whole["diversity"], now.whole["diversity"]) if known else None)


def training_reward(terms: Sequence[RewardTerm], found: Evaluation) -> Tensor:
    """Weighted sum of the standardised training rewards that evaluations hold, float64 (n,); NaN where one is missing.

    Before shapes, which are monotone; rewards of whole groups or sets are not in evaluations.
    """
    parts = [term.weight * (term.reward.spec.direction * found.values[term.name] - term.shift) / term.scale
             for term in terms if term.name in found.values]
    return torch.stack(parts).sum(dim=0) if parts else torch.full((len(found.seeds),), math.nan, dtype=torch.float64)


def win_rates(first: Evaluation, now: Evaluation, directions: Mapping[str, int]) -> dict[str, float]:
    """``eval/<reward>_win_rate``: the share of prompts whose sample is now better than before training, ties counting half, and its
    interval; same prompts, same seeds."""
    rates: dict[str, float] = {}
    for name, direction in directions.items():
        if name not in first.values or name not in now.values:
            continue
        wins = outcomes(direction * first.values[name], direction * now.values[name])
        if bool(torch.isfinite(wins).any()):
            interval = bootstrap_mean(wins)
            rates |= {f"eval/{name}_win_rate": interval.mean, f"eval/{name}_win_rate_low": interval.low,
                      f"eval/{name}_win_rate_high": interval.high}
    return rates


def _cause(fall: Fall) -> str:
    reward = ("nobody knows how the training reward changed" if math.isnan(fall.reward_change)
              else f"the training reward changed by {fall.reward_change:+.2g} sd")
    return f"guard '{fall.guard}' fell by {fall.drop:.2g} sd since iteration {fall.peak}, {reward}"
