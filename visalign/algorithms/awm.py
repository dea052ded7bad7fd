"""AWM: policy gradient on the forward process, with a weighted matching error in place of a log-probability.

Clean samples are noised at drawn times; old and new policy are asked about the same ``x``. With ``lp`` of ``maths.matching``

    r    = exp(lp - lp_old)         per draw ("exp_first"), or of the mean over a sample's draws ("sum_first")
    loss = mean [ max(-A r, -A clip(r, 1 +- clip)) + kl_weight |v - v_reference|^2 + ema_weight |v - v_ema|^2 ]

over draws and valid samples of all processes; squares are means over the latent, A is clipped to +-advantage_clip and divided by it.
With one optimizer step per iteration ``lp_old = lp`` exactly and the gradient is advantage-weighted matching; with more, the weights that
sampled are kept as the role "old" and asked again. A ratio of surrogates is not a ratio of probabilities: without a narrow clip keep one
of the two distances. Each is independent of the other and may be 0.

Deliberately absent: time weights beyond the surrogates', and times shared by a whole micro-batch.
Source: Advantage Weighted Matching, arXiv:2509.25050.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visalign.algorithms.clean_samples import Microbatch, cut, mean_square
from visalign.algorithms.noising import Noised, Times
from visalign.algorithms.old_policy import Decay, follow
from visalign.maths.matching import Weighting, check_weighting, matching_error, surrogate_log_prob
from visalign.maths.surrogate import clipped
from visalign.protocols import LossTerms, Policy
from visalign.types import Batch, Experience, Prediction, Role


@dataclass(frozen=True)
class AWM:
    """``protocols.Algorithm``.

    Attributes:
        weighting, power: of the surrogate log-probability.
        ratio: exponential per draw, or of the mean over draws.
        clip: half width of the ratio's range; 1 is practically off.
        advantage_clip: C, the advantage used is ``clip(A, +-C) / C``.
        kl_weight: of the squared distance to the reference's velocity.
        ema_weight, ema_decay: the same to weights that follow the policy.
        times, draws: noise levels, and how many per sample and optimizer step.
    """

    weighting: Weighting = "ghuber"
    power: float = 0.25
    ratio: Literal["exp_first", "sum_first"] = "exp_first"
    clip: float = 1.0
    advantage_clip: float = 5.0
    kl_weight: float = 0.0
    ema_weight: float = 1.0
    ema_decay: Decay = field(default_factory=lambda: Decay(slope=0.001, cap=0.3))
    times: Times = field(default_factory=lambda: Times("grid", skip_first=1))
    draws: int = 2

    needs_prediction: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False
    rollout_role: ClassVar[Role] = "policy"

    def __post_init__(self) -> None:
        check_weighting(self.weighting, self.power)
        if self.ratio not in ("exp_first", "sum_first"):
            raise ValueError(f"awm: ratio must be exp_first or sum_first, got {self.ratio!r}")
        if not (self.clip > 0 and self.advantage_clip > 0 and self.draws >= 1):
            raise ValueError(f"awm: clip and advantage_clip must be > 0 and draws >= 1, got {self.clip}, {self.advantage_clip} and "
                             f"{self.draws}")
        if self.kl_weight < 0 or self.ema_weight < 0:
            raise ValueError(f"awm: weights must be >= 0, got kl_weight {self.kl_weight} and ema_weight {self.ema_weight}")

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    def begin(self, policy: Policy, iteration: int) -> None:
        """Let the averaged policy follow."""
        if self.ema_weight > 0:
            follow(policy, "ema", self.ema_decay, iteration)

    def prepare(self, policy: Policy, experience: Experience, microbatch: int) -> Experience:
        """Keep the weights that sampled: later optimizer steps ask them about their own times and noise."""
        policy.snapshot("old")
        return experience

    def microbatches(self, policy: Policy, batch: Batch, microbatch: int, seed: int) -> Iterator[Microbatch]:
        """Samples times draws; the draws of a sample stay together if they enter one ratio."""
        return cut(policy, batch, microbatch, seed, self.times, self.draws, together=self.ratio == "sum_first")

    def loss(self, policy: Policy, microbatch: Microbatch) -> LossTerms:
        """Surrogate and distances over the global denominator."""
        noised, conditioning, draws = microbatch.noised(policy), microbatch.conditioning(policy), len(microbatch.draws)
        asked: dict[Role, bool] = {"old": self._moved(microbatch), "reference": self.needs_reference, "ema": self.ema_weight > 0}
        with torch.no_grad():
            others = {role: policy.predict_at(noised.x, noised.timesteps, conditioning, role) for role, needed in asked.items() if needed}
        found = policy.predict_at(noised.x, noised.timesteps, conditioning)
        error, log_prob = self._log_prob(found, noised, draws)
        log_prob_old = self._log_prob(others["old"], noised, draws)[1] if "old" in others else log_prob.detach()
        advantage = microbatch.advantage.to(log_prob).clamp(-self.advantage_clip, self.advantage_clip) / self.advantage_clip
        terms = clipped(log_prob, log_prob_old, advantage.unsqueeze(1).expand_as(log_prob), self.clip, self.clip)
        loss = terms.loss.expand(-1, draws)
        recorded = {"error": error, "ratio": terms.ratio, "clip_fraction": terms.clipped.double()}
        maxima = {"policy/ratio_deviation": microbatch.largest((terms.ratio - 1).abs())}
        weights: dict[Role, float] = {"reference": self.kl_weight, "ema": self.ema_weight}
        for role, weight in weights.items():
            if role in others:
                recorded[f"kl_{role}"] = distance = mean_square(found.velocity - others[role].velocity, draws)
                loss = loss + weight * distance
        if self.needs_reference:
            maxima["policy/kl_reference"] = microbatch.largest(recorded["kl_reference"])
        recorded["loss"] = loss
        valid = microbatch.valid.to(loss.device).unsqueeze(1)
        total = torch.where(valid, loss, 0.0).sum() / (microbatch.batch.denominator * self.draws)
        return LossTerms(loss=total, metrics=microbatch.sums("awm", recorded), maxima=maxima)

    def _moved(self, microbatch: Microbatch) -> bool:
        """Whether the weights may have moved since they sampled: not if one optimizer step sees every sample."""
        return len(microbatch.batch.rows) < microbatch.batch.experience.trajectory.num_samples

    def _log_prob(self, prediction: Prediction, noised: Noised, draws: int) -> tuple[Tensor, Tensor]:
        """Matching error (n, k) and surrogate log-probability, (n, k) or its mean over draws (n, 1); float64."""
        error = matching_error(prediction.velocity, (noised.noise - noised.x0).to(prediction.velocity))
        s = (noised.sigma / (noised.alpha + noised.sigma)).to(error)
        log_prob = surrogate_log_prob(error, s, self.weighting, self.power).reshape(-1, draws)
        return error.reshape(-1, draws), log_prob.mean(dim=1, keepdim=True) if self.ratio == "sum_first" else log_prob
