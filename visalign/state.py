"""Everything that changes while a run runs, and its way to disk and back, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch

from visalign import __version__, checkpoint
from visalign.checkpoint import Checkpoint
from visalign.config import Config
from visalign.credit import CircuitBreaker
from visalign.data import GroupSampler
from visalign.distributed import Processes
from visalign.ema import EMA
from visalign.optimization import Optimization
from visalign.protocols import Policy, Remembers
from visalign.runfolder import RunFolder
from visalign.types import Role

logger = logging.getLogger(__name__)

SAVED_ROLES: frozenset[Role] = frozenset({"reference", "old", "ema", "negative"})  # the reference may have been refreshed


@dataclass
class State:
    """The state of a run between two iterations.

    Attributes:
        iteration: the next one, 0-based.
        optimization: optimizer, schedule, loss scaler.
        ema: average of the weights, or ``None``.
        data: which prompts come next.
        breaker: the rewards' recent failures.
        memories: rewards whose answers depend on earlier ones, by name.
    """

    iteration: int
    optimization: Optimization
    ema: EMA | None
    data: GroupSampler
    breaker: CircuitBreaker
    memories: Mapping[str, Remembers] = field(default_factory=dict)

    def save(self, policy: Policy, folder: RunFolder, config: Config, processes: Processes, score: float | None) -> None:
        """Write ``checkpoints/<iteration>``; collective, only the main process writes.

        Raises:
            CheckpointError: the disk is full.
        """
        rng = processes.gather_objects(checkpoint.rng_state())
        if processes.is_main:
            optimizer_tensors, optimization = self.optimization.state()
            tensors = {"weights": dict(policy.named_trainable()), "optimizer": optimizer_tensors,
                       **{f"rng-{rank:05d}": part[0] for rank, part in enumerate(rng)}}
            if self.ema is not None:
                tensors["ema"] = self.ema.shadow
            roles = {role: kept for role, kept in policy.snapshots().items() if role in SAVED_ROLES}
            tensors |= {f"role-{role}": dict(kept) for role, kept in roles.items()}
            tensors |= {f"reward-{name}": dict(kept) for name, memory in self.memories.items() if (kept := memory.state_dict())}
            state = {"visalign": __version__, "config": config.model_dump(mode="json"), "optimization": optimization,
                     "rng": [part[1] for part in rng], "ema_steps": None if self.ema is None else self.ema.num_steps,
                     "data": self.data.state_dict(), "breaker": self.breaker.state_dict(),
                     "metrics_bytes": folder.metrics_bytes()}
            checkpoint.save(folder.checkpoints, self.iteration, tensors, state, keep=config.checkpoint.keep, score=score)
        processes.barrier()

    def restore(self, policy: Policy, saved: Checkpoint, processes: Processes) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it belongs to other trainable weights, prompts, geometry or seed.
        """
        trained = policy.named_trainable()
        weights = saved.tensors["weights"]
        if {n: tuple(t.shape) for n, t in weights.items()} != {n: tuple(p.shape) for n, p in trained.items()}:
            differing = sorted(weights.keys() ^ trained.keys())[:4] or [n for n in weights if weights[n].shape != trained[n].shape][:4]
            raise ValueError(f"{saved.path} holds {len(weights)} trained tensors that do not fit this run's {len(trained)}, for example "
                             f"{', '.join(differing)}; resume with the model and trainable settings the run was started with")
        self.optimization.restore(saved.tensors["optimizer"], saved.state["optimization"])
        self.data.load_state_dict(saved.state["data"])
        self.breaker.load_state_dict(saved.state["breaker"])
        self.take_weights(policy, saved)
        for name, memory in self.memories.items():
            memory.load_state_dict(saved.tensors.get(f"reward-{name}", {}))
        for name in saved.tensors:
            if name.startswith("role-"):
                policy.snapshot(cast(Role, name.removeprefix("role-")), saved.tensors[name])
        if len(saved.state["rng"]) == processes.world:
            checkpoint.restore_rng(saved.tensors[f"rng-{processes.rank:05d}"], saved.state["rng"][processes.rank])
        else:
            logger.warning("resuming on %d processes a run that had %d: samples and updates are the same, dropout, if any, is drawn anew",
                           processes.world, len(saved.state["rng"]))
        self.iteration = int(saved.state["iteration"])

    def take_weights(self, policy: Policy, saved: Checkpoint) -> None:
        """The trained weights of a checkpoint and their average, and nothing else of it.

        Raises:
            ValueError: it has no average, and this run keeps one.
        """
        with torch.no_grad():
            for name, parameter in policy.named_trainable().items():
                parameter.copy_(saved.tensors["weights"][name])
        if self.ema is not None:
            if saved.state["ema_steps"] is None:
                raise ValueError(f"{saved.path} was written without ema; leave ema out, or start a new run")
            self.ema.restore(saved.tensors["ema"], int(saved.state["ema_steps"]))
