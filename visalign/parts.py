"""What a configuration becomes before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from visalign.composition.fixed import Weighted
from visalign.composition.table import Combiner
from visalign.credit import RewardTerm
from visalign.protocols import Algorithm, AnyReward, AsksJudge, LatentSource, Policy, RecordedScores, Sampler
from visalign.types import Prompt


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of; built by ``build.build``, the only place that knows concrete leaves.

    Attributes:
        policy: what samples; the same weights under other call arguments are ``eval_policy`` (evaluations) and ``train_policy`` (updates).
        sampler: makes trajectories and evaluation samples.
        terms: the rewards trained on, ``combiner`` what makes one of them; ``guards`` are watched in evaluations only (judges of pairs
            compare with the samples before training), and those named in ``stopping`` may end the run.
        latents: tells rewards of latents what the policy's latents are; ``None`` where the policy cannot.
        save_adapter: writes the trained weights into a folder, where the pipeline's own library loads them.
    """

    policy: Policy
    train_policy: Policy
    eval_policy: Policy
    sampler: Sampler
    algorithm: Algorithm
    terms: Sequence[RewardTerm]
    guards: Mapping[str, AnyReward]
    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    save_adapter: Callable[[Path], None]
    combiner: Combiner = field(default_factory=Weighted)
    stopping: frozenset[str] = frozenset()
    latents: LatentSource | None = None

    @property
    def eval_rewards(self) -> dict[str, AnyReward]:
        """What evaluations ask: the rewards trained on (of win rates within groups the judge) and the guards."""
        trained = {term.name: term.reward.judge if isinstance(term.reward, AsksJudge) else term.reward for term in self.terms
                   if not isinstance(term.reward, RecordedScores)}
        return {**trained, **self.guards}
