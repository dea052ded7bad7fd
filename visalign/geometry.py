"""How many samples an iteration makes and how they are cut. The user gives four numbers; everything else follows and is never rewritten.

    groups      prompts per iteration, over all processes
    group_size  samples per prompt
    updates     optimizer steps per iteration
    microbatch  samples per forward pass on one process
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Batch geometry of a run on ``world`` processes.

    Raises:
        ValueError: the numbers do not divide; the message names the ones that would.
    """

    groups: int
    group_size: int
    updates: int
    microbatch: int
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("groups", "group_size", "updates", "microbatch", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.groups % self.world:
            raise ValueError(f"groups {self.groups} does not divide over {self.world} processes; a group stays on one process, so use "
                             f"{_multiples(self.groups, self.world)} groups or {_divisors(self.groups)} processes")
        if self.local_samples % self.updates:
            raise ValueError(f"updates {self.updates} does not divide the {self.local_samples} samples of a process "
                             f"({self.groups} groups x group_size {self.group_size} / {self.world} processes); "
                             f"use one of {_divisors(self.local_samples)}")
        if self.update_samples % self.microbatch:
            raise ValueError(f"microbatch {self.microbatch} does not divide the {self.update_samples} samples a process has per update "
                             f"({self.groups} groups x group_size {self.group_size} / {self.world} processes / {self.updates} updates); "
                             f"use one of {_divisors(self.update_samples)}")

    @property
    def samples(self) -> int:
        """Samples per iteration over all processes, N = P * G."""
        return self.groups * self.group_size

    @property
    def local_groups(self) -> int:
        return self.groups // self.world

    @property
    def local_samples(self) -> int:
        return self.samples // self.world

    @property
    def update_samples(self) -> int:
        """Samples of one process in one optimizer step."""
        return self.local_samples // self.updates

    def describe(self) -> dict[str, int]:
        """What ``--plan`` prints: given and derived numbers."""
        return {"processes": self.world, "groups": self.groups, "group_size": self.group_size, "samples per iteration": self.samples,
                "samples per process": self.local_samples, "updates per iteration": self.updates,
                "samples per update": self.samples // self.updates, "microbatch": self.microbatch,
                "micro-batches per update and stored step": self.update_samples // self.microbatch}


def assign_updates(permutations: Tensor, updates: int) -> Tensor:
    """Which optimizer step each sample belongs to: every group is spread evenly.

        update = (group * G + permuted place in the group) mod updates

    The groups of one process or of all give the same answer: a process has a multiple of ``updates`` samples, so where its first group
    stands among all does not matter.

    Args:
        permutations: int64 (P, G), row p a permutation of 0..G-1.
    Returns:
        int64 (P * G,), values 0..updates-1.
    """
    num_groups, group_size = permutations.shape
    offsets = torch.arange(num_groups).unsqueeze(1) * group_size
    return ((offsets + permutations) % updates).reshape(-1)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _multiples(number: int, of: int) -> str:
    below, above = number // of * of, -(-number // of) * of
    return f"{below} or {above}" if below else str(above)
