"""Earlier features that count into a set: the newest, or a uniform sample of all since the start.

A group of 16 samples cannot estimate a covariance; thousands of recent ones can. A policy moves, so the newest are the default: they
describe what it makes now. A reservoir describes the whole run so far, with samples of the untrained policy in it for good: right where
the generator does not move (features of a fixed set, a slow run whose prompts must all be represented), misleading where it does.

The reservoir keeps the rows with the smallest keys, a key being a hash of seed and position: the same rows for any batching and after a
resume, without a generator's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from visalign.maths.seeds import derive_seed

Keep = Literal["newest", "reservoir"]


class Memory:
    """At most ``capacity`` rows of all that were added, in the order in which they came."""

    def __init__(self, capacity: int, keep: Keep = "newest", seed: int = 0) -> None:
        """
        Args:
            capacity: rows; 0 keeps none.
            keep: see the module.
            seed: of the reservoir.
        """
        if capacity < 0:
            raise ValueError(f"memory {capacity} must be at least 0")
        if keep not in ("newest", "reservoir"):
            raise ValueError(f"keep '{keep}' is neither 'newest' nor 'reservoir'")
        self.capacity, self.keep, self.seed = capacity, keep, seed
        self.features: Tensor | None = None
        self.seen = 0
        self._keys = torch.zeros(0, dtype=torch.int64)

    def add(self, features: Tensor) -> None:
        """More rows, (n, d)."""
        if not self.capacity or not len(features):
            return
        known = features if self.features is None else torch.cat([self.features, features])
        if self.keep == "newest":
            self.features = known[-self.capacity:].clone()
        else:
            new = [derive_seed(self.seed, self.seen + row) for row in range(len(features))]
            keys = torch.cat([self._keys, torch.tensor(new, dtype=torch.int64)])
            rows = keys.argsort()[:self.capacity].sort().values
            self.features, self._keys = known[rows].clone(), keys[rows]
        self.seen += len(features)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint; empty when there is nothing yet."""
        if self.features is None:
            return {}
        reservoir = {"keys": self._keys, "seen": torch.tensor(self.seen)} if self.keep == "reservoir" else {}
        return {"memory": self.features, **reservoir}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Raises:
            ValueError: the state is that of the newest rows, and a reservoir is to be continued.
        """
        self.features = state["memory"].double() if "memory" in state else None
        if self.keep == "reservoir" and self.features is not None and "keys" not in state:
            raise ValueError("the checkpoint's memory holds the newest features and cannot be continued as a reservoir; resume with "
                             "keep: newest")
        self._keys = state.get("keys", torch.zeros(0, dtype=torch.int64))
        self.seen = int(state.get("seen", torch.tensor(0)))
