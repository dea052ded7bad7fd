"""What a configuration becomes before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visalign.credit import RewardTerm
from visalign.protocols import Algorithm, Policy, Reward, Sampler
from visalign.types import Prompt


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of; built by ``build.build``, the only place that knows concrete leaves.

    Attributes:
        policy: what is trained; ``eval_policy`` is the same weights under the evaluation's call arguments.
        sampler: makes trajectories and evaluation samples.
        terms: the rewards trained on; ``guards`` are watched in evaluations only.
        save_adapter: writes the trained weights into a folder, where the pipeline's own library loads them.
    """

    policy: Policy
    eval_policy: Policy
    sampler: Sampler
    algorithm: Algorithm
    terms: Sequence[RewardTerm]
    guards: Mapping[str, Reward]
    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    save_adapter: Callable[[Path], None]
