"""A whole run on the Gaussian oracle policy, in milliseconds: imported by tests, and a script for tests that need processes.

    python tests/gaussian_run.py RUN_DIR [--resume] [--kill MOMENT:N] [--remote URL --cache DIR] [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visalign import checkpoint, loop
from visalign.algorithms.grpo import GRPO
from visalign.config import Config, make_config
from visalign.credit import RewardTerm
from visalign.distributed import Processes
from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.parts import Parts
from visalign.rewards.function import FunctionReward
from visalign.rewards.remote.rewards import Remote
from visalign.samplers.dynamics import build_dynamics
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.rollout import TrajectorySampler
from visalign.samplers.steps import build_selection
from visalign.settings import apply_overrides
from visalign.state import State
from visalign.types import Media, Prompt

SETTINGS: dict[str, Any] = {
    "model": {"path": "none", "device": "cpu"},
    "data": {"prompts": "none.txt"},
    "rewards": [{"name": "none"}],
    "sampler": {"dynamics": {"name": "flow_sde"}, "steps": {"name": "random_window", "size": 2}},
    "algorithm": {"clip": 0.1, "kl_weight": 0.01},
    "train": {"iterations": 6, "groups": 2, "group_size": 4, "updates": 2, "microbatch": 2, "learning_rate": 1e-2, "schedule": "cosine",
              "warmup": 2},
    "ema": {"decay": 0.9},
    "evaluation": {"num_prompts": 4, "every": 2},
    "checkpoint": {"every": 1, "keep": 2},
}
PROMPTS = [Prompt(f"prompt {i}", metadata={"offset": 0.02 * i}) for i in range(5)]


def config(*overrides: str) -> Config:
    return make_config(apply_overrides(SETTINGS, overrides))


def mean_value(media: Sequence[Media], prompts: Sequence[Prompt]) -> list[float]:
    return [float(sample.data.mean()) for sample in media]


class OracleLatents:
    """What the oracle's latents are: prompts are embedded as their offset."""

    convention = "gaussian 2x3"

    def __init__(self, policy: GaussianPolicy) -> None:
        self.policy = policy

    def embed(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        return self.policy.encode(prompts).offset[:, None].float()


def drawn(media: Sequence[Media], prompts: Sequence[Prompt]) -> list[float]:
    """A reward that draws from every global generator, so that a resume which forgets one of them gives other numbers."""
    return [float(sample.data.mean()) + 0.01 * (float(torch.rand(())) + float(np.random.rand()) + random.random()) for sample in media]


def parts(settings: Config, reward: Callable[..., Any] = mean_value, num_steps: int = 5, var: float = 0.04, **changes: Any) -> Parts:
    """Parts on latents of 2 x 3 elements; ``changes`` replace fields."""
    policy = GaussianPolicy(GaussianWorld(mean=torch.full((2, 3), 0.1), var=var), flow_schedule(dance_sigmas(num_steps, 3.0)))
    sampler = TrajectorySampler(group_size=settings.train.group_size, seed=settings.train.seed, microbatch=settings.train.microbatch,
                                dynamics=build_dynamics(settings.sampler.dynamics.name, **settings.sampler.dynamics.params),
                                steps=build_selection(settings.sampler.steps.name, **settings.sampler.steps.params),
                                same_initial_noise=settings.sampler.same_initial_noise)
    algorithm = GRPO(clip=settings.algorithm.clip, surrogate=settings.algorithm.surrogate, kl_weight=settings.algorithm.kl_weight,
                     iterations=settings.train.iterations, old_log_prob=settings.algorithm.old_log_prob)
    term = RewardTerm("value", FunctionReward(reward, name="value", modality=["audio"]))
    values: dict[str, Any] = {"policy": policy, "train_policy": policy, "eval_policy": policy, "sampler": sampler, "algorithm": algorithm,
                              "terms": [term], "guards": {}, "prompts": PROMPTS, "eval_prompts": PROMPTS,
                              "save_adapter": lambda folder: None, "latents": OracleLatents(policy)}
    return Parts(**{**values, **changes})


def go(run_dir: Path, settings: Config, resume: bool = False, **changes: Any) -> Parts:
    """Run and return the parts, whose policy is trained."""
    made = parts(settings, **changes)
    checkpoint.seed_everything(settings.train.seed)
    loop.run(made, settings, run_dir, Processes.start("cpu"), resume=resume)
    return made


def kill_at(moment: str, count: int) -> None:
    """Make this process send itself SIGKILL when ``moment`` comes for the ``count``-th time."""
    owner, name = {"collect": (loop.Loop, "collect"), "backward": (loop.Loop, "accumulate"), "evaluate": (loop.Loop, "evaluated"),
                   "logged": (State, "save"), "writing": (checkpoint, "_sha256"), "written": (checkpoint, "_sync"),
                   "pruning": (checkpoint, "_prune")}[moment]
    original, calls = getattr(owner, name), [0]

    def lethal(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, lethal)


def go_until_killed(run_dir: Path, moment: str, count: int, message: Path) -> None:
    """A new run that kills this process at a moment; if it does not come to that, ``message`` says why."""
    torch.set_num_threads(1)
    kill_at(moment, count)
    try:
        go(run_dir, config(), reward=drawn)
        message.write_text(f"the run came to its end before the moment '{moment}' came {count} times")
    except BaseException:
        message.write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--plain", action="store_true", help="a reward without randomness")
    parser.add_argument("--kill")
    parser.add_argument("--remote", help="a server of the reward 'value'")
    parser.add_argument("--cache")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if arguments.kill:
        which, number = arguments.kill.split(":")
        kill_at(which, int(number))
    changes: dict[str, Any] = {"reward": mean_value if arguments.plain else drawn}
    if arguments.remote:
        changes = {"terms": [RewardTerm("value", Remote(arguments.remote, "value", cache_dir=arguments.cache, concurrency=1))]}
    go(arguments.run_dir, config(*arguments.overrides), resume=arguments.resume, **changes)
