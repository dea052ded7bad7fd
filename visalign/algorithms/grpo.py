"""GRPO for diffusion and flow models: a clipped policy gradient over the stochastic steps of grouped trajectories.

For sample n and stored step i, with ``r = exp(log_prob - log_prob_old)`` per latent dimension and the group advantage ``A``:

    loss = sum_{n,i} [ surrogate(r, A) + beta KL_per_dim(policy || reference) ] / (S * valid samples over all processes)

so accumulating micro-batches, or spreading them over processes, gives the gradient of one large batch. The KL is the exact one between
two Gaussian steps of equal std; published code often leaves out a factor 1/h, so its ``beta`` is ``beta h`` here.

Deliberately absent: a value network, and dropping zero-advantage samples (they are kept and masked: the denominator stays what it says).
Sources: Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818; DDPO, arXiv:2305.13301; GRPO-Guard, arXiv:2510.22319.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from visalign.kernels.ask import outputs_of
from visalign.kernels.backend import Backend
from visalign.kernels.guided_step import guided_step
from visalign.kernels.transition_log_prob import transition_log_prob
from visalign.kernels.transition_log_prob.reference import StepTerms
from visalign.maths import surrogate as surrogates
from visalign.maths.outputs import Outputs
from visalign.protocols import LossTerms, Policy
from visalign.types import Batch, Experience, Role, Transition


@dataclass(frozen=True)
class Microbatch:
    """``rows`` (n,) of ``batch`` at one stored step: a denoiser call has one timestep, as in the rollout."""

    batch: Batch
    rows: Tensor
    entry: int

    @property
    def transition(self) -> Transition:
        return self.batch.experience.trajectory.transitions[self.entry]

    def state(self, policy: Policy) -> Tensor:
        """The stored states, float32 (n, ...)."""
        return self.batch.experience.trajectory.x[self.rows, self.entry].to(policy.device).float()

    def outputs(self, policy: Policy, x: Tensor, role: Role = "policy") -> Outputs:
        """This role's answer for the stored states, exactly as the rollout asked."""
        trajectory = self.batch.experience.trajectory
        conditioning = trajectory.conditioning.select(trajectory.group_id[self.rows].tolist())
        return outputs_of(policy, x, int(trajectory.step_index[self.entry]), conditioning, role)

    def terms(self, outputs: Outputs, x: Tensor, reference: Outputs | None, backend: Backend) -> StepTerms:
        """Log-probability of the stored ``x_next``, and KL to the reference and to the policy that sampled, nats, (n,)."""
        trajectory = self.batch.experience.trajectory
        x_next = trajectory.x_next[self.rows, self.entry].to(x.device)
        old = None if trajectory.prediction is None else trajectory.prediction[self.rows, self.entry].to(x.device)
        return transition_log_prob(outputs, x, x_next, self.transition, reference_outputs=reference, velocity_old=old, backend=backend)


@dataclass(frozen=True)
class GRPO:
    """``protocols.Algorithm``.

    Attributes:
        clip: half width of the ratio's range, per dimension; for "dppo" the KL threshold. Its meaning scales as 1 / sqrt(D).
        surrogate: "clip" (PPO), "guard" (ratio norm of GRPO-Guard) or "dppo" (mask by exact KL).
        kl_weight: beta; 0 needs no reference.
        kl_schedule: "constant", or "linear" to 0 at the last of ``iterations``.
        old_log_prob: "recorded" in the rollout, or "recomputed" by the training graph before the first update (one more forward pass,
            for hardware whose results depend on what else is in the batch).
        backend: of the operators, see `visalign.kernels`.
    """

    clip: float = 1e-4
    surrogate: Literal["clip", "guard", "dppo"] = "clip"
    kl_weight: float = 0.0
    kl_schedule: Literal["constant", "linear"] = "constant"
    iterations: int = 1
    old_log_prob: Literal["recorded", "recomputed"] = "recorded"
    backend: Backend = "auto"

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    @property
    def needs_prediction(self) -> bool:
        return self.surrogate != "clip"

    @property
    def whole_groups(self) -> bool:
        return False

    @property
    def rollout_role(self) -> Role:
        return "policy"

    def begin(self, policy: Policy, iteration: int) -> None:
        """Nothing to move: old numbers are recorded in the trajectory."""

    def kl_weight_at(self, iteration: int) -> float:
        """beta of an iteration."""
        if self.kl_schedule == "constant":
            return self.kl_weight
        return self.kl_weight * (1 - iteration / max(self.iterations - 1, 1))

    def prepare(self, policy: Policy, experience: Experience, microbatch: int) -> Experience:
        """Recompute old log-probabilities and velocities with the training graph, if asked to."""
        if self.old_log_prob == "recorded":
            return experience
        old = experience.trajectory
        log_probs, velocities = torch.empty_like(old.log_prob), torch.empty_like(old.x, dtype=torch.float32)
        everything = Batch(experience, torch.arange(old.num_samples), denominator=old.num_samples)
        with torch.no_grad():
            for part in self.microbatches(policy, everything, microbatch, seed=0):
                x = part.state(policy)
                outputs = part.outputs(policy, x)
                log_probs[part.rows, part.entry] = part.terms(outputs, x, None, self.backend).log_prob.to(log_probs)
                # The operator that recorded it in the rollout, so that the loss finds the same velocity again, bit for bit.
                step = guided_step(outputs, x, replace(part.transition, std=0.0), velocity=True, backend=self.backend)
                assert step.velocity is not None
                velocities[part.rows, part.entry] = step.velocity.to(velocities)
        return replace(experience, trajectory=replace(old, log_prob=log_probs, prediction=velocities))

    def microbatches(self, policy: Policy, batch: Batch, microbatch: int, seed: int) -> Iterator[Microbatch]:
        """Every stored step of every row; nothing is shuffled, because one optimizer step sums over all of it."""
        for rows in batch.rows.split(microbatch):
            for entry in range(len(batch.experience.trajectory.transitions)):
                yield Microbatch(batch, rows, entry)

    def loss(self, policy: Policy, microbatch: Microbatch) -> LossTerms:
        """Surrogate and reference KL of one micro-batch over the global denominator."""
        experience, rows, entry = microbatch.batch.experience, microbatch.rows, microbatch.entry
        trajectory, num_dims, x = experience.trajectory, experience.trajectory.num_dims, microbatch.state(policy)
        outputs = microbatch.outputs(policy, x)
        with torch.no_grad():
            reference = microbatch.outputs(policy, x, "reference") if self.needs_reference else None
        step = microbatch.terms(outputs, x, reference, self.backend)
        log_prob = step.log_prob / num_dims
        log_prob_old = (trajectory.log_prob[rows, entry] / num_dims).to(log_prob)
        valid = experience.valid[rows].to(log_prob.device)
        # where(), here and below, not a product with the mask: 0 * NaN is NaN, in the gradient too.
        advantage = torch.where(valid, experience.advantage[rows, entry].to(log_prob), 0.0)
        log_ratio = (log_prob - log_prob_old).detach()
        recorded = {"ratio": log_ratio.exp(), "approx_kl": log_ratio.expm1() - log_ratio}
        maxima = {"policy/ratio_deviation": _max(log_ratio.expm1().abs(), valid)}

        kl_old = torch.zeros_like(log_prob)
        if step.kl_old is not None and step.output_gap is not None:
            kl_old = recorded["kl_old"] = step.kl_old / num_dims
            maxima["policy/output_gap"] = _max(step.output_gap, valid)

        if self.surrogate == "clip":
            terms = surrogates.clipped(log_prob, log_prob_old, advantage, self.clip, self.clip)
        elif self.surrogate == "guard":
            terms = surrogates.guard(log_prob, log_prob_old, kl_old, microbatch.transition.std, advantage, self.clip, self.clip)
        else:
            terms = surrogates.dppo(log_prob, log_prob_old, kl_old.detach(), advantage, self.clip)
        loss = terms.loss

        if step.kl_reference is not None:
            kl = recorded["kl_reference"] = step.kl_reference / num_dims
            loss = loss + self.kl_weight_at(experience.iteration) * kl
            maxima["policy/kl_reference"] = _max(kl, valid)

        recorded |= {"loss": loss, "clip_fraction": terms.clipped.float()}
        sums = torch.stack([values.detach()[valid].double().sum() for values in recorded.values()]).tolist()
        worst = torch.stack([value.detach().double() for value in maxima.values()]).tolist()
        total = torch.where(valid, loss, 0.0).sum() / (microbatch.batch.denominator * len(trajectory.transitions))
        metrics = {f"grpo/{name}": (value, float(valid.sum())) for name, value in zip(recorded, sums, strict=True)}
        return LossTerms(loss=total, metrics=metrics, maxima=dict(zip(maxima, worst, strict=True)))


def _max(values: Tensor, valid: Tensor) -> Tensor:
    """Largest value of the valid samples, 0 without any."""
    return torch.where(valid, values.detach(), 0.0).max()
