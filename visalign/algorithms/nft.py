"""DiffusionNFT: reinforcement learning on the forward process, a contrast of good and bad samples without likelihoods.

The old policy samples by any solver; only the clean samples and their advantages are kept. For each sample and drawn time

    r = (1 + A / C) / 2,   A clipped to +-C
    loss = sum [ C nft_loss(r) + kl_weight mean (v_policy - v_reference)^2 ] / (draws * valid samples over all processes)

with ``nft_loss`` of ``maths.nft``. At the old policy its gradient is advantage-weighted denoising, independent of beta; away from it
both terms pull back, an implicit trust region that beta sets. Afterwards the old policy follows the policy by its own decay.
The published runs use no guidance in sampling and training (the model becomes guidance-free), the sampler's own steps as times, a scale
of all rewards (advantage scale "global"), kl_weight 1e-4, and beta 1 with a slow ramp or 0.1 with the delayed one.

Deliberately absent: their second pass over permuted times, which is ``draws``.
Source: DiffusionNFT, arXiv:2509.16117.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from visalign.algorithms.clean_samples import Microbatch, cut, mean_square
from visalign.algorithms.noising import Times
from visalign.algorithms.old_policy import Decay, follow
from visalign.maths.nft import nft_loss, optimality
from visalign.protocols import LossTerms, Policy
from visalign.types import Batch, Experience, Role


@dataclass(frozen=True)
class NFT:
    """``protocols.Algorithm``.

    Attributes:
        beta: strength of the implicit models, > 0; a smaller one lets the policy move further in one iteration.
        advantage_clip: C.
        kl_weight: lambda, of the squared distance to the reference's velocity; 0 needs no reference.
        adaptive: divide each error by its mean absolute value.
        old_decay: how the old policy follows, see ``old_policy.PUBLISHED``.
        times, draws: noise levels, and how many per sample and optimizer step.
    """

    beta: float = 1.0
    advantage_clip: float = 5.0
    kl_weight: float = 0.0
    adaptive: bool = True
    old_decay: Decay = field(default_factory=Decay)
    times: Times = field(default_factory=lambda: Times("grid"))
    draws: int = 1

    needs_prediction: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False
    rollout_role: ClassVar[Role] = "old"

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.advantage_clip > 0):
            raise ValueError(f"nft: beta and advantage_clip must be > 0, got {self.beta} and {self.advantage_clip}")
        if self.kl_weight < 0 or self.draws < 1:
            raise ValueError(f"nft: kl_weight must be >= 0 and draws >= 1, got {self.kl_weight} and {self.draws}")

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    def begin(self, policy: Policy, iteration: int) -> None:
        """Let the old policy follow; it is the one that samples."""
        follow(policy, "old", self.old_decay, iteration)

    def prepare(self, policy: Policy, experience: Experience, microbatch: int) -> Experience:
        return experience

    def microbatches(self, policy: Policy, batch: Batch, microbatch: int, seed: int) -> Iterator[Microbatch]:
        """Samples times draws; a micro-batch mixes noise levels."""
        return cut(policy, batch, microbatch, seed, self.times, self.draws)

    def loss(self, policy: Policy, microbatch: Microbatch) -> LossTerms:
        """The contrast and the distance to the reference over the global denominator."""
        noised, conditioning, draws = microbatch.noised(policy), microbatch.conditioning(policy), len(microbatch.draws)
        with torch.no_grad():
            old = policy.predict_at(noised.x, noised.timesteps, conditioning, "old")
        found = policy.predict_at(noised.x, noised.timesteps, conditioning)
        x0 = noised.x0.to(found.x0)
        optimal = optimality(microbatch.advantage.to(found.x0).repeat_interleave(draws), self.advantage_clip)
        loss = self.advantage_clip * nft_loss(found.x0, old.x0, x0, optimal, self.beta, self.adaptive).reshape(-1, draws)
        recorded = {"optimality": optimal.reshape(-1, draws), "error": mean_square(found.x0 - x0, draws),
                    "error_old": mean_square(old.x0 - x0, draws), "moved": mean_square(found.velocity - old.velocity, draws)}
        maxima: dict[str, float] = {}
        if self.old_decay.copies(microbatch.batch.experience.iteration):  # until the first update both are the same weights
            scale = mean_square(old.velocity, draws).clamp(min=1e-12)
            maxima["policy/output_gap"] = microbatch.largest((recorded["moved"] / scale).sqrt())
        if self.needs_reference:
            with torch.no_grad():
                reference = policy.predict_at(noised.x, noised.timesteps, conditioning, "reference")
            distance = recorded["kl_reference"] = mean_square(found.velocity - reference.velocity, draws)
            loss = loss + self.kl_weight * distance
            maxima["policy/kl_reference"] = microbatch.largest(distance)
        recorded["loss"] = loss
        valid = microbatch.valid.to(loss.device).unsqueeze(1)
        total = torch.where(valid, loss, 0.0).sum() / (microbatch.batch.denominator * self.draws)
        return LossTerms(loss=total, metrics=microbatch.sums("nft", recorded), maxima=maxima)
