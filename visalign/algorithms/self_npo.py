"""Self-NPO: a negative model without any preference data, by learning one's own prematurely finished samples.

A sample is noised to a level T'; the teacher takes a few sampler steps down to t and, far from done, predicts the clean sample. The
student must predict that same x0_hat from a noisier state s > t:

    x_s = (alpha_s / alpha_t) x_t + sqrt(sigma_s^2 - sigma_t^2 alpha_s^2 / alpha_t^2) noise
    loss = sum pseudo_huber(x0_student(x_s, s, c) - x0_hat, 1e-3) / (draws * valid samples over all processes)

The noise is added to x_t, not to x0_hat, so that x_s stays where the model itself goes. For Gaussian data and an exact teacher every Euler
step is a contraction of the state (Cauchy-Schwarz), hence x0_hat's and the student's: with W_t <= V_t the variances of the teacher's state
and of the true marginal, the slope of the learned prediction is the true one times

    (W_t / V_t) V_s / (V_s + (alpha_s / alpha_t)^2 (W_t - V_t))  <=  1

a model with too little spread, which guidance then points away from. Whatever a teacher's many steps would get right teaches nothing here.

The paper is data-free: samples and targets come from the reference, under the prompt (the defaults here; a run's rewards are not read).
Published code differs: real images, a teacher that is the student's average (0.999), and its prediction replaced by
``cond + w (cond - uncond)`` with w = -1 for SD 1.5 (unconditional) and -5 for SDXL. All of it is arguments here.
Source: Self-NPO, arXiv:2505.11777; guidance with the result: Diffusion-NPO, arXiv:2505.11245 (contraction: ours).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from visalign.algorithms.clean_samples import Microbatch, cut, mean_square
from visalign.algorithms.noising import Times, draw_seeds, gaussian_noise
from visalign.algorithms.old_policy import Decay, follow
from visalign.maths.renoise import pseudo_huber, renoise, training_fraction
from visalign.protocols import LossTerms, Policy
from visalign.types import Batch, Experience, Prediction, Prompt, Role

LATER, RENOISE, DROPOUT = 4, 5, 6  # what a seed is for, beside noising.TIME and noising.NOISE


@dataclass(frozen=True)
class Truncated:
    """The teacher's truncated run, one row per sample and draw.

    Attributes:
        x: noised again, (n, ...); the student's question at ``timesteps``.
        timesteps: float64 (n,), s.
        x0_hat: the teacher's premature prediction, (n, ...).
        stopped: float64 (n,), t.
        conditioning: n rows, of the policy that is trained.
    """

    x: Tensor
    timesteps: Tensor
    x0_hat: Tensor
    stopped: Tensor
    conditioning: Any


@dataclass(frozen=True)
class SelfNpo:
    """``protocols.Algorithm``.

    Attributes:
        teacher: "reference" (paper) or "ema", the average of the trained weights (published code). Its role also samples.
        teacher_guidance: w of the teacher's ``cond + w (cond - uncond)``, uncond being the empty prompt: 0 plain, -1 unconditional.
        num_steps, step: the teacher takes so many steps, each this fraction of the training range; published: 5 of 25.
        times: T', where the teacher starts; its steps end at data at the latest.
        draws: of T', s and both noises, per sample and optimizer step.
        huber: c of the loss.
        ema_decay: per iteration, not per optimizer step.
        prompt_dropout: probability that teacher and student see the empty prompt, which is what guidance will ask the result about.
    """

    teacher: Literal["reference", "ema"] = "reference"
    teacher_guidance: float = 0.0
    num_steps: int = 5
    step: float = 0.04
    times: Times = field(default_factory=Times)
    draws: int = 1
    huber: float = 1e-3
    ema_decay: float = 0.999
    prompt_dropout: float = 0.0

    needs_prediction: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.teacher not in ("reference", "ema"):
            raise ValueError(f"self_npo: unknown teacher {self.teacher!r}; use reference or ema")
        if self.num_steps < 1 or not 0 < self.num_steps * self.step < 1:
            raise ValueError(f"self_npo: the teacher's steps must leave a part of the range undone, got {self.num_steps} steps of "
                             f"{self.step}; use num_steps >= 1 and num_steps * step between 0 and 1")
        if self.draws < 1 or not self.huber > 0:
            raise ValueError(f"self_npo: draws must be >= 1 and huber > 0, got {self.draws} and {self.huber}")
        if not (0 <= self.ema_decay < 1 and 0 <= self.prompt_dropout <= 1):
            raise ValueError(f"self_npo: ema_decay must lie in [0, 1) and prompt_dropout in [0, 1], got {self.ema_decay} and "
                             f"{self.prompt_dropout}")

    @property
    def needs_reference(self) -> bool:
        return self.teacher == "reference"

    @property
    def rollout_role(self) -> Role:
        return self.teacher

    def begin(self, policy: Policy, iteration: int) -> None:
        """Let the average follow, where it teaches."""
        if self.teacher == "ema":
            follow(policy, "ema", Decay(start=self.ema_decay), iteration)

    def prepare(self, policy: Policy, experience: Experience, microbatch: int) -> Experience:
        return experience

    def microbatches(self, policy: Policy, batch: Batch, microbatch: int, seed: int) -> Iterator[Microbatch]:
        """Samples times draws; a micro-batch mixes noise levels."""
        return cut(policy, batch, microbatch, seed, self.times, self.draws)

    def loss(self, policy: Policy, microbatch: Microbatch) -> LossTerms:
        """Distance of the student's prediction from the teacher's over the global denominator."""
        draws = len(microbatch.draws)
        made = self.truncate(policy, microbatch)
        found = policy.predict_at(made.x, made.timesteps, made.conditioning).x0
        difference = found - made.x0_hat.to(found)
        loss = pseudo_huber(difference, self.huber).flatten(1).mean(dim=1).reshape(-1, draws)
        recorded = {"loss": loss, "error": mean_square(difference, draws), "spread": mean_square(found, draws),
                    "spread_teacher": mean_square(made.x0_hat, draws)}
        valid = microbatch.valid.to(loss.device).unsqueeze(1)
        total = torch.where(valid, loss, 0.0).sum() / (microbatch.batch.denominator * self.draws)
        return LossTerms(loss=total, metrics=microbatch.sums("self_npo", recorded))

    @torch.no_grad()
    def truncate(self, policy: Policy, microbatch: Microbatch) -> Truncated:
        """Noise the samples, let the teacher denoise a little, and noise its state again."""
        noised, times, prompts = microbatch.noised(policy), policy.times, self._prompts(microbatch)
        conditioning = policy.encode(prompts)
        unconditional = policy.encode([replace(prompt, text="") for prompt in prompts]) if self.teacher_guidance else None
        first, x, at = training_fraction(times, noised.timesteps), noised.x, noised.timesteps
        for taken in range(1, self.num_steps + 1):
            prediction = self._teach(policy, x, at, conditioning, unconditional)
            at = times.timestep((first - taken * self.step).clamp(min=0))
            alpha, sigma = (level.to(x).reshape(-1, *[1] * (x.dim() - 1)) for level in times.level(at))
            x = alpha * prediction.x0 + sigma * prediction.x1
        x0_hat = self._teach(policy, x, at, conditioning, unconditional).x0
        seeds = self._seeds(microbatch, LATER)
        share = torch.stack([1 - torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds])
        stopped = training_fraction(times, at)
        later = times.timestep(stopped + (1 - stopped) * share)
        x_later = renoise(x, gaussian_noise(self._seeds(microbatch, RENOISE), x).to(x), *times.level(at), *times.level(later))
        return Truncated(x=x_later, timesteps=later, x0_hat=x0_hat, stopped=at, conditioning=conditioning)

    def _teach(self, policy: Policy, x: Tensor, timesteps: Tensor, conditioning: Any, unconditional: Any) -> Prediction:
        """``(1 + w) cond - w uncond``; what has weight 0 is not asked."""
        weighted = [(weight, policy.predict_at(x, timesteps, rows, self.teacher))
                    for weight, rows in ((1 + self.teacher_guidance, conditioning), (-self.teacher_guidance, unconditional)) if weight]
        return Prediction(x0=torch.stack([weight * part.x0 for weight, part in weighted]).sum(dim=0),
                          x1=torch.stack([weight * part.x1 for weight, part in weighted]).sum(dim=0))

    def _prompts(self, microbatch: Microbatch) -> list[Prompt]:
        """One per row, some of them emptied."""
        trajectory, each = microbatch.batch.experience.trajectory, len(microbatch.draws)
        prompts = [trajectory.prompts[group] for group in trajectory.group_id[microbatch.rows].repeat_interleave(each).tolist()]
        if self.prompt_dropout == 0:
            return prompts
        return [replace(prompt, text="") if float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < self.prompt_dropout
                else prompt for prompt, seed in zip(prompts, self._seeds(microbatch, DROPOUT), strict=True)]

    @staticmethod
    def _seeds(microbatch: Microbatch, purpose: int) -> list[int]:
        """One per sample and draw, in the order of the rows."""
        index = microbatch.batch.experience.trajectory.sample_index[microbatch.rows].tolist()
        by_draw = [draw_seeds(microbatch.seed, index, draw, purpose) for draw in microbatch.draws]
        return [seed for of_sample in zip(*by_draw, strict=True) for seed in of_sample]
