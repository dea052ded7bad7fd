"""A whole run whose reward is a judge behind HTTP: the Gaussian oracle policy draws pictures, win rates over a judge score them.

    python tests/judged_run.py RUN_DIR ANSWERS_DIR URL [URL ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import gaussian_run
from visalign.algorithms.grpo import GRPO
from visalign.config import Config
from visalign.credit import RewardTerm
from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.parts import Parts
from visalign.rewards.function import FunctionReward
from visalign.rewards.judges.pairwise import PairwiseJudge
from visalign.rewards.pairwise import WinRate
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.types import Experience, Media, Prompt


@dataclass(frozen=True)
class Watching(GRPO):
    """Keeps what every update learned from."""

    seen: list[Experience] = field(default_factory=list)

    def prepare(self, policy: Any, experience: Experience, microbatch: int) -> Experience:
        self.seen.append(experience)
        return super().prepare(policy, experience, microbatch)


def config(*overrides: str) -> Config:
    return gaussian_run.config("train.groups=4", "train.microbatch=8", "train.learning_rate=0.05", "algorithm.clip=0.2",
                               "algorithm.kl_weight=0", "train.max_failed=1.0", "evaluation.every=0", *overrides)


def brightness(media: Sequence[Media], prompts: Sequence[Prompt]) -> list[float]:
    return [float(sample.data.float().mean()) / 255 for sample in media]


def go(run_dir: Path, urls: Sequence[str], answers: Path | None, settings: Config, resume: bool = False, swap: bool = True,
       **backend: Any) -> Parts:
    """Run; the returned parts hold the trained policy and a ``Watching`` algorithm."""
    world = GaussianWorld(mean=torch.zeros(3, 2, 2), var=0.09)
    policy = GaussianPolicy(world, flow_schedule(dance_sigmas(5, 3.0)), media="image")
    server = {"base_urls": list(urls), "model": "judge", "cache_dir": answers, "pause": 0.001, "retries": 3, "timeout": 3.0,
              "concurrency": 4, **backend}
    judge = WinRate(PairwiseJudge(server, rechecks=0), swap=swap, name="judge")
    algorithm = Watching(clip=settings.algorithm.clip, iterations=settings.train.iterations)
    return gaussian_run.go(run_dir, settings, resume=resume, policy=policy, train_policy=policy, eval_policy=policy, algorithm=algorithm,
                           terms=[RewardTerm("judge", judge)], guards={"brightness": FunctionReward(brightness)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    go(Path(sys.argv[1]), sys.argv[3:], Path(sys.argv[2]), config(), concurrency=1)
