"""Reward gradients: the last sampler steps, the decoder and the reward are one differentiable function of the weights.

The sampler is deterministic and stores the state ``x_m`` of one step. From there, with ``x_m`` held fixed,

    draft      x_{i+1} = step(x_i; theta) for i = m .. T-1,  r = reward(decode(x_T))               DRaFT-K: K = T - m
    draft_lv   x = alpha x_T + sigma noise at the last level, one step, reward of what comes out; ``num_noisings`` fresh noises, averaged
    refl       one step: r = reward(decode(x0_pred(x_m; theta))), asked at the timestep of step m

    loss = sum_n [ L(r_n) + kl_weight mean_i mean_d (v_theta - v_reference)^2 ] / valid samples over all processes

with ``L(r) = -r``, or ``relu(margin - r)``, which leaves samples alone that are good enough. ``v`` is the velocity, and the states at
which the two are compared are held fixed. AlignProp is "draft" with another ``x_m`` in every iteration (`RandomTail`): that the network's
earlier outputs are detached and that ``x_m`` is, is the same gradient.

Memory does not depend on m; with ``recompute`` it grows with K by one latent per step, since each step is computed again in the backward
pass. Pixels that the decoder clamps keep the gradient that brings them back (`visalign.maths.backprop`).

Deliberately absent: noise in the differentiated steps (AlignProp's eta = 1), ReFL's pre-training loss, and weights of the loss as a whole
(1e-3 in ReFL): AdamW divides them out.
Sources: DRaFT, arXiv:2309.17400; AlignProp, arXiv:2310.03739; ReFL, arXiv:2304.05977, whose code asks the network at the step's index
instead of its timestep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visalign.algorithms.noising import NOISE, draw_seeds, gaussian_noise
from visalign.maths.backprop import ReturningClamps
from visalign.maths.gaussian import transition_mean
from visalign.protocols import Conditioning, DifferentiableReward, LossTerms, Policy
from visalign.types import Batch, Experience, NoiseLevel, Prompt, Role, Trajectory, Transition

Term = tuple[str, float, DifferentiableReward]  # name, weight, reward
TO_DATA = Transition(A=1.0, B=0.0, std=0.0)  # x_next = x0_pred


@runtime_checkable
class TensorDecoder(Protocol):
    """A policy whose decoder has gradients."""

    def decode_tensor(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> Tensor:
        """Latents (B, *latent_shape) to media as `DifferentiableReward.score_tensor` takes them."""


@dataclass(frozen=True)
class Microbatch:
    """Valid ``rows`` (n,) of ``batch``; ``noise_seeds`` (n) where the last state is noised again."""

    batch: Batch
    rows: Tensor
    noise_seeds: tuple[int, ...] = ()

    @property
    def trajectory(self) -> Trajectory:
        return self.batch.experience.trajectory


@dataclass(frozen=True)
class RewardGradient:
    """``protocols.Algorithm``.

    Attributes:
        terms: (name, weight, reward); the objective is the weighted sum of what their ``score_tensor`` says, not standardised.
        method: "draft", "draft_lv" or "refl". The first and the last need ``sampler.steps`` to be ``tail`` or ``random_tail``.
        num_noisings: of "draft_lv", 2 in the paper.
        margin: the combined reward from which on a sample is left alone; ``None`` maximises without end.
        kl_weight: of the mean squared velocity difference to the reference; 0 needs no reference.
        recompute: compute each step again in the backward pass instead of keeping its activations.
    Raises:
        ValueError: no terms, a reward without gradient, or a value out of range.
    """

    terms: Sequence[Term]
    method: Literal["draft", "draft_lv", "refl"] = "draft"
    num_noisings: int = 2
    margin: float | None = None
    kl_weight: float = 0.0
    recompute: bool = True

    def __post_init__(self) -> None:
        able = [name for name, _, reward in self.terms if isinstance(reward, DifferentiableReward) and reward.spec.differentiable]
        unable = [name for name, _, _ in self.terms if name not in able]
        if unable or not able:
            raise ValueError("reward_gradient needs rewards with a gradient to the media (spec.differentiable and score_tensor); "
                             f"without one: {', '.join(unable) or 'no rewards given'}; with one: {', '.join(able) or 'none'}. Train on the "
                             "latter and watch the others as guards, or use algorithm: grpo, which needs no gradient")
        if self.method not in ("draft", "draft_lv", "refl"):
            raise ValueError(f"unknown method {self.method!r}; use draft (AlignProp: draft with steps random_tail), draft_lv or refl")
        if self.num_noisings < 1 or self.kl_weight < 0:
            raise ValueError(f"num_noisings must be at least 1 and kl_weight not negative, got {self.num_noisings} and {self.kl_weight}")

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    @property
    def needs_prediction(self) -> bool:
        return False

    @property
    def whole_groups(self) -> bool:
        return False

    @property
    def rollout_role(self) -> Role:
        return "policy"

    def begin(self, policy: Policy, iteration: int) -> None:
        """Nothing to move."""

    def prepare(self, policy: Policy, experience: Experience, microbatch: int) -> Experience:
        """The states are stored; nothing else is needed."""
        return experience

    def microbatches(self, policy: Policy, batch: Batch, microbatch: int, seed: int) -> Iterator[Microbatch]:
        """The valid rows, once per noising. An invalid sample is not even looked at: a NaN in it would reach the shared weights."""
        rows = batch.rows[batch.experience.valid[batch.rows]]
        for part in rows.split(microbatch) if len(rows) else ():
            if self.method != "draft_lv":
                yield Microbatch(batch, part)
                continue
            index = batch.experience.trajectory.sample_index[part].tolist()
            for noising in range(self.num_noisings):
                yield Microbatch(batch, part, tuple(draw_seeds(seed, index, noising, NOISE)))

    def loss(self, policy: Policy, microbatch: Microbatch) -> LossTerms:
        """Minus the reward of one micro-batch over the global denominator.

        Raises:
            ValueError: the trajectory has not the state to start from, or the gradient ends before it reaches the weights.
        """
        trajectory, rows = microbatch.trajectory, microbatch.rows
        groups = trajectory.group_id[rows].tolist()
        conditioning, prompts = trajectory.conditioning.select(groups), [trajectory.prompts[group] for group in groups]
        state, path = self.start(policy, microbatch)
        gaps = []
        for step, transition in path:
            state, gap = self.advance(policy, state, step, transition, conditioning)
            gaps.append(gap)
        scores = self.scores(policy, state, prompts)
        reward = sum((weight * scores[name] for name, weight, _ in self.terms), torch.zeros_like(next(iter(scores.values()))))
        loss = -reward if self.margin is None else (self.margin - reward).relu()
        recorded = {"reward": reward, **{f"score_{name}": score for name, score in scores.items()}}
        if self.margin is not None:
            recorded["below_margin"] = (reward < self.margin).float()
        if self.needs_reference:
            gap = recorded["velocity_gap"] = torch.stack(gaps).mean(0)
            loss = loss + self.kl_weight * gap
        recorded["loss"] = loss
        sums = torch.stack([values.detach().double().sum() for values in recorded.values()]).tolist()
        metrics = {f"reward_gradient/{name}": (value, float(len(rows))) for name, value in zip(recorded, sums, strict=True)}
        copies = self.num_noisings if self.method == "draft_lv" else 1
        return LossTerms(loss=loss.sum() / (microbatch.batch.denominator * copies), metrics=metrics)

    def start(self, policy: Policy, microbatch: Microbatch) -> tuple[Tensor, list[tuple[int, Transition]]]:
        """A fixed state, and the steps with their transitions that lead from it to the latents to decode."""
        trajectory, levels = microbatch.trajectory, policy.schedule.levels
        last = policy.schedule.num_steps - 1
        if self.method == "draft_lv":
            x0, level = trajectory.x_final[microbatch.rows].detach().to(policy.device).float(), levels[last]
            return level.alpha * x0 + level.sigma * gaussian_noise(microbatch.noise_seeds, x0), [(last, _ode(levels, last))]
        steps = trajectory.step_index.tolist()
        if len(steps) != 1 or steps[0] > last or trajectory.transitions[0] != _ode(levels, steps[0]):
            raise ValueError(f"{self.method} continues from one stored step without noise on the schedule it was sampled with; the "
                             f"trajectory stores the steps {steps} as {list(trajectory.transitions)}. Use sampler.steps: {{name: tail, "
                             "last: 1} or random_tail, and no model.train_call that changes the schedule")
        x = trajectory.x[microbatch.rows, 0].detach().to(policy.device).float()
        if self.method == "refl":
            return x, [(steps[0], TO_DATA)]
        return x, [(step, _ode(levels, step)) for step in range(steps[0], last + 1)]

    def advance(self, policy: Policy, state: Tensor, step: int, transition: Transition,
                conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """The next state with its gradient, and the mean squared velocity difference to the reference, (n,), 0 if it has no weight."""

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            prediction = policy.predict(x, step, conditioning)
            return transition_mean(prediction, transition), prediction.velocity

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            return checkpoint(forward, x, use_reentrant=False) if self.recompute else forward(x)  # type: ignore[no-any-return]

        after, velocity = run(state)
        if not self.needs_reference:
            return after, velocity.new_zeros(len(velocity))
        fixed = state.detach()
        if state.requires_grad:
            _, velocity = run(fixed)
        with torch.no_grad():
            reference = policy.predict(fixed, step, conditioning, "reference").velocity
        return after, (velocity - reference).square().flatten(1).mean(1)

    def scores(self, policy: Policy, latents: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """What each reward says about the decoded latents, (n,), with gradients; in full precision, as scoring is."""
        if not isinstance(policy, TensorDecoder):
            raise ValueError(f"{type(policy).__name__} cannot decode with gradients: it has no decode_tensor(latents, prompts)")
        with torch.autocast(latents.device.type, enabled=False):
            with ReturningClamps():
                media = policy.decode_tensor(latents, prompts)
            scores = {name: reward.score_tensor(media, prompts).to(latents.device) for name, _, reward in self.terms}
        for name, score in scores.items():
            if score.shape != (len(prompts),) or not score.requires_grad:
                raise ValueError(f"reward '{name}' answered {len(prompts)} samples with a tensor {tuple(score.shape)} that "
                                 f"{'has' if score.requires_grad else 'has no'} gradient (the decoded media "
                                 f"{'have one' if media.requires_grad else 'have none'}); expected shape ({len(prompts)},) with a gradient")
        return scores


def _ode(levels: Sequence[NoiseLevel], step: int) -> Transition:
    return Transition(A=float(levels[step + 1].alpha), B=float(levels[step + 1].sigma), std=0.0)
