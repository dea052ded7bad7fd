"""What an evaluation says about the current weights: scores on held-out prompts, constraints, drift from the reference, guards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from visalign.composition.adaptive import Constrained
from visalign.config import Config
from visalign.distributed import Processes
from visalign.evaluation import Evaluation, evaluate
from visalign.guards.drift import Drift, measure_drift
from visalign.guards.watch import Alarm, Watch
from visalign.maths.seeds import derive_seed
from visalign.parts import Parts
from visalign.runfolder import BEFORE, RunFolder
from visalign.types import Prompt

DRIFT_PROMPTS = 16  # twice the denoiser calls of as many samples


@dataclass(frozen=True)
class Assessed:
    """One evaluation's numbers, the same on every process.

    Attributes:
        metrics: ``eval/...`` and ``guard/...``; on the main process only.
        standing: the larger, the better a checkpoint of these weights; see ``guards.rule``.
        alarm: why the run should end here, or ``None``.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    standing: float = 0.0
    alarm: Alarm | None = None


class Assessment:
    """Makes a run's evaluations."""

    def __init__(self, parts: Parts, config: Config, folder: RunFolder, processes: Processes, watch: Watch) -> None:
        self.parts, self.config, self.folder, self.processes, self.watch = parts, config, folder, processes, watch

    def assess(self, label: str, iteration: int, autocast: Callable[[], AbstractContextManager[Any]],
               progress: Callable[[int, int], None]) -> Assessed:
        """The weights as they are after ``iteration`` updates, kept under ``label``; every process calls this."""
        parts, settings = self.parts, self.config.evaluation
        prompts = parts.eval_prompts[:settings.num_prompts]
        found = evaluate(parts.eval_policy, parts.sampler, parts.eval_rewards, prompts, seed=settings.seed, batch=settings.batch,
                         processes=self.processes, folder=self.folder.samples(label), autocast=autocast, progress=progress,
                         bandwidth=self.watch.bandwidth, latents=parts.latents,
                         opponents=self.folder.samples(BEFORE) if iteration else None)
        drift = self._drift(prompts, autocast)
        assessed = Assessed()
        if found is not None:
            found = replace(found, whole={**found.whole, **drift})
            found.write(self.folder.evaluation(label))
            metrics, standing, alarm = self.watch.of_evaluation(found, iteration)
            assessed = Assessed({**found.metrics(), **self._constraints(found, prompts), **metrics}, standing, alarm)
        if iteration == 0:
            self.watch.begin()
        shared: Assessed = self.processes.gather_objects(assessed)[0]
        return shared

    def _drift(self, prompts: Sequence[Prompt], autocast: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        """``velocity_gap`` and ``kl_per_dim`` to the reference, if there is one, on the first evaluation prompts."""
        policy = self.parts.eval_policy
        if not policy.has_role("reference"):
            return {}
        settings = self.config.evaluation
        rows = range(self.processes.rank, min(DRIFT_PROMPTS, len(prompts)), self.processes.world)
        seeds = [derive_seed(settings.seed, row) for row in rows]
        own = measure_drift(policy, [prompts[row] for row in rows], seeds, batch=settings.batch, autocast=autocast)
        return sum(self.processes.gather_objects(own), Drift()).metrics()

    def _constraints(self, found: Evaluation, prompts: Sequence[Prompt]) -> dict[str, float]:
        """The held-out test of a run's constraints: ``eval/<name>_slack``, what the bound exceeds the threshold by, and whether all hold.

        Nothing without ``data.eval_prompts``: prompts that were trained on show nothing."""
        combiner = self.parts.combiner
        if not isinstance(combiner, Constrained) or self.config.data.eval_prompts is None:
            return {}
        # Evaluations have one sample per prompt, so that rewards of whole groups or sets are not in them.
        values = {term.name: term.transform(term.reward.spec.direction * found.values[term.name], prompts)
                  for term in self.parts.terms if term.name in combiner.thresholds and term.name in found.values}
        if len(values) < len(combiner.thresholds):
            return {}
        verdicts = combiner.held_out(values)
        slack = {f"eval/{name}_slack": verdict.bound - verdict.threshold for name, verdict in verdicts.items()}
        return {**{name: value for name, value in slack.items() if math.isfinite(value)},
                "eval/constraints_hold": float(all(verdict.holds for verdict in verdicts.values()))}
