"""Weights that follow the policy from a distance: the old policy of DiffusionNFT, the anchor of AWM.

    theta_old <- d_i theta_old + (1 - d_i) theta        once per iteration, before sampling; d = 0: the current policy
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.protocols import Policy
from visalign.types import Role


@dataclass(frozen=True)
class Decay:
    """``d_i = min(start + slope max(i - delay, 0), cap)`` at iteration ``i``; the default keeps no memory at all.

    DiffusionNFT counts optimizer steps; with two per iteration its values are ``delay / 2`` and ``2 slope`` here.
    """

    start: float = 0.0
    slope: float = 0.0
    delay: int = 0
    cap: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.start <= 1 and 0 <= self.cap <= 1 and self.slope >= 0 and self.delay >= 0):
            raise ValueError(f"a decay needs start and cap in [0, 1], slope >= 0 and delay >= 0, got {self}")

    def at(self, iteration: int) -> float:
        return min(self.start + self.slope * max(iteration - self.delay, 0), self.cap)

    def copies(self, iteration: int) -> bool:
        """Whether the follower equals the policy while this iteration samples."""
        return iteration == 0 or self.at(iteration) == 0


# DiffusionNFT's decay types, arXiv:2509.16117: on-policy; a slow ramp; on-policy for 75 steps, then almost frozen.
PUBLISHED: tuple[Decay, ...] = (Decay(), Decay(slope=0.001, cap=0.5), Decay(slope=0.0075, delay=75, cap=0.999))


@torch.no_grad()
def follow(policy: Policy, role: Role, decay: Decay, iteration: int) -> None:
    """Move ``role`` towards the policy's weights; iteration 0 makes it an exact copy, and so does ``d = 0``.

    Raises:
        ValueError: a later iteration, and the role has no weights.
    """
    if decay.copies(iteration):
        policy.snapshot(role)
        return
    before = policy.snapshots().get(role)
    if before is None:
        raise ValueError(f"iteration {iteration} moves the weights of role {role!r}, but there are none; start from iteration 0, or resume "
                         "from a checkpoint that the same algorithm wrote")
    policy.snapshot(role, {name: _blend(before[name], parameter.detach(), decay.at(iteration))
                           for name, parameter in policy.named_trainable().items()})


def _blend(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """In at least float32, in the dtype of the weights."""
    wide = torch.promote_types(new.dtype, torch.float32)
    return torch.lerp(new.to(wide), old.to(new.device, wide), decay).to(new.dtype)
