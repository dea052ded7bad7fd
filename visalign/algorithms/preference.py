"""Preference optimisation: any loss over per-sample errors, on generated samples or on a data set that is replayed.

For every optimizer step: samples become groups (pairs, labelled samples, ranked lists or weighted samples), each group draws a time and a
noise, one error pass gives ``e_policy`` (and ``e_reference``, ``e_old`` where the loss reads them), and the loss is one small function of
these (``maths/preference.py``): Diffusion-DPO, IPO, KTO, SmPO, RWR and the rest differ in that function alone. Online DPO, DRAGON and
DSO differ in where groups come from.

    loss = sum over groups and draws [ L(e_policy, e_reference, ...) + reference_weight |f_policy - f_reference|^2 ] / their number

Deliberately absent: a cache of reference errors, which is valid only for fixed noise, and padding by repeated pairs.
Sources: Diffusion-DPO, arXiv:2311.12908; Flow-DPO and Flow-RWR, arXiv:2501.13918; DSO, arXiv:2503.22677; DRAGON, arXiv:2504.15217.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from visalign.algorithms.errors import Space, errors, residual
from visalign.algorithms.noising import NOISE, TIME, Noised, Times, add_noise, draw_seeds, gaussian_noise
from visalign.algorithms.pairing import Groups, Pairing
from visalign.kernels.ask import outputs_at
from visalign.kernels.backend import Backend
from visalign.kernels.paired_error.reference import PairedErrors
from visalign.maths.outputs import Outputs
from visalign.maths.preference import BoundLoss, LossInput
from visalign.maths.preference_safeguard import safeguard, scale_loser
from visalign.maths.seeds import derive_seed
from visalign.protocols import LossTerms, Policy
from visalign.types import Batch, Experience, Prompt, Role
from visalign.users import asking

DROPOUT, NOBODY = 3, 4  # what a seed is for, beside noising.TIME, noising.NOISE and pairing.PAIRS
Invert = Callable[[Policy, Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Microbatch:
    """Some groups at one draw of time and noise; ``denominator`` counts groups and draws of the whole step over all processes."""

    experience: Experience
    groups: Groups
    draw: int
    timesteps: Tensor
    seed: int
    denominator: float
    statistics: dict[str, float]


@dataclass(frozen=True)
class ErrorPass:
    """What one micro-batch's error pass gave: the loss's ``inputs`` (P, K), and what they were made of, (P K, ...)."""

    inputs: LossInput
    noised: Noised
    outputs: Outputs
    pair: PairedErrors


@dataclass(frozen=True)
class PreferenceOptimisation:
    """``protocols.Algorithm``.

    Attributes:
        preference_loss: what is minimised, see ``maths.preference.bind_loss``.
        kappa: strength; a published beta is ``2 kappa`` where its formula has a factor 1/2.
        pairing: how scores become groups.
        times, draws: noise levels, and how many per group and optimizer step.
        space: in which the errors are taken; flow: "epsilon" is the strength ``(1 - t)^2`` of Flow-DPO, "velocity" the constant one.
        share_noise: whether a group shares its noise; ``None`` does what the loss declares. Times are always shared.
        reference_weight: of the squared distance to the reference's answer.
        refresh: the reference becomes the current policy every so many iterations; 0 never.
        safeguard: ``mu`` of Diffusion-SDPO, pairs only; ``None`` without.
        prompt_dropout: probability that a group is trained on the empty prompt, which guidance needs.
        user_dropout: probability that a group is trained for nobody, which keeps the population's taste (PPD, arXiv:2501.06655).
        invert: noise that leads back to a sample, in place of random noise (SmPO); ``None`` for random noise.
        backend: of the operators, see `visalign.kernels`.
    """

    preference_loss: BoundLoss
    kappa: float
    pairing: Pairing = field(default_factory=Pairing)
    times: Times = field(default_factory=Times)
    draws: int = 1
    space: Space = "native"
    share_noise: bool | None = None
    reference_weight: float = 0.0
    refresh: int = 0
    safeguard: float | None = None
    prompt_dropout: float = 0.0
    user_dropout: float = 0.0
    invert: Invert | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        needs = self.preference_loss.needs
        if needs.from_reference:
            raise ValueError(f"the loss '{self.preference_loss.name}' must know which samples the reference made, and a run's samples come "
                             "from one model; call it from your own loop, or use vpo or dpo here")
        if self.preference_loss.name == "best_of_group" and self.pairing.keep != 1:
            raise ValueError("best_of_group trains on the best sample of every group: set pairing: {keep: 1}")
        if self.safeguard is not None and needs.group != "pair":
            raise ValueError(f"safeguard protects the chosen sample of a pair, and '{self.preference_loss.name}' reads {needs.group}s; "
                             "leave safeguard out")

    needs_prediction = False
    whole_groups = True
    rollout_role: Role = "policy"

    @property
    def needs_reference(self) -> bool:
        return self.preference_loss.needs.reference or self.reference_weight > 0

    def begin(self, policy: Policy, iteration: int) -> None:
        """Refresh the reference, and keep the last round's policy where the loss reads it."""
        if self.refresh and iteration and iteration % self.refresh == 0:
            policy.snapshot("reference")
        if self.preference_loss.needs.old:
            policy.snapshot("old")

    def prepare(self, policy: Policy, experience: Experience, microbatch: int) -> Experience:
        return experience

    def microbatches(self, policy: Policy, batch: Batch, microbatch: int, seed: int) -> Iterator[Microbatch]:
        """Groups times draws; a group is never cut."""
        needs, experience = self.preference_loss.needs, batch.experience
        groups = self.pairing.groups(needs.group, experience, batch.rows, seed)
        index = experience.trajectory.sample_index
        seeds = [derive_seed(seed, *sorted(index[row].tolist()), TIME) for row in groups.rows]
        timesteps = self.times.draw(policy, seeds, self.draws)
        total = batch.reduce([float(len(groups.rows) * self.draws)])[0]
        chunks = torch.arange(len(groups.rows)).split(max(1, microbatch // groups.rows.shape[1])) if len(groups.rows) else ()
        parts = [Microbatch(experience, groups.select(at), draw, timesteps[at, draw], seed, total, {})
                 for draw in range(self.draws) for at in chunks]
        statistics = {name: self._mean(name, policy, parts, batch) for name in needs.statistics}
        yield from (replace(part, statistics=statistics) for part in parts)

    def _mean(self, name: str, policy: Policy, parts: list[Microbatch], batch: Batch) -> float:
        """A statistic over the whole optimizer step on all processes, before its gradients: one more pass without them."""
        total, count = 0.0, 0
        with torch.no_grad():
            for part in parts:
                if self.needs_reference:
                    inputs = self._errors(policy, part).inputs
                else:  # of rewards alone, which need no network
                    inputs = LossInput(policy=torch.zeros_like(part.groups.reward), kappa=self.kappa, reward=part.groups.reward)
                values = self.preference_loss.statistic(name, inputs)
                total, count = total + float(values.double().sum()), count + values.numel()
        whole, number = batch.reduce([total, float(count)])
        return whole / number if number else 1.0

    def loss(self, policy: Policy, microbatch: Microbatch) -> LossTerms:
        """The groups' losses over the global number of groups and draws."""
        found = self._errors(policy, microbatch, watch=True)
        inputs = found.inputs
        if self.safeguard is not None:
            missed = residual(policy, found.noised, found.outputs, self.space).unflatten(0, tuple(microbatch.groups.rows.shape))
            inputs = scale_loser(inputs, safeguard(missed[:, 0], missed[:, 1], self.safeguard))
        values = self.preference_loss(inputs)
        if self.reference_weight > 0:
            assert found.pair.gap is not None
            values = values + self.reference_weight * found.pair.gap.reshape(inputs.policy.shape).mean(dim=1)
        metrics = {f"preference/{name}": (float(value.detach().double().sum()), float(value.numel()))
                   for name, value in {"loss": values, **self._watched(inputs, found.pair)}.items()}
        maxima: dict[str, float] = {}
        if inputs.reference is not None:
            maxima["policy/error_gap"] = float((inputs.delta.detach().abs() / inputs.reference.clamp(min=1e-12)).max())
        return LossTerms(loss=values.sum() / microbatch.denominator, metrics=metrics, maxima=maxima)

    def _errors(self, policy: Policy, part: Microbatch, watch: bool = False) -> ErrorPass:
        """The error pass: every role that the loss reads answers about the same noised samples."""
        trajectory, (num, size), needs = part.experience.trajectory, part.groups.rows.shape, self.preference_loss.needs
        flat = part.groups.rows.flatten()
        conditioning = policy.encode(self._prompts(part, flat))
        noised = self._noised(policy, part, trajectory.x_final[flat].to(policy.device).float(), conditioning)
        outputs = outputs_at(policy, noised.x, noised.timesteps, conditioning)
        reference = old = None
        with torch.no_grad():
            if self.needs_reference:
                reference = outputs_at(policy, noised.x, noised.timesteps, conditioning, "reference")
            if needs.old:
                answer = outputs_at(policy, noised.x, noised.timesteps, conditioning, "old")
                old = errors(policy, noised, answer, space=self.space, backend=self.backend).policy.reshape(num, size)
        pair = errors(policy, noised, outputs, reference, self.space, gap=self.reference_weight > 0,
                      norms=watch and self.needs_reference, backend=self.backend)
        own = pair.policy.reshape(num, size)
        inputs = LossInput(policy=own, kappa=self.kappa, reference=None if pair.reference is None else pair.reference.reshape(num, size),
                           old=old, reward=part.groups.reward.to(own), label=part.groups.label.to(own),
                           weight=self._weights(part).to(own), statistics=part.statistics)
        return ErrorPass(inputs, noised, outputs, pair)

    @staticmethod
    def _weights(part: Microbatch) -> Tensor:
        """How much each judgement of a data set counts, float64 (P,); 1 for generated groups."""
        trajectory = part.experience.trajectory
        if not trajectory.scores:
            return torch.ones(len(part.groups.rows), dtype=torch.float64)
        groups = trajectory.group_id[part.groups.rows[:, 0]].tolist()
        return torch.tensor([float(trajectory.prompts[group].metadata.get("weight", 1.0)) for group in groups], dtype=torch.float64)

    def _noised(self, policy: Policy, part: Microbatch, x0: Tensor, conditioning: Any) -> Noised:
        num, size = part.groups.rows.shape
        timesteps = part.timesteps.repeat_interleave(size)
        if self.invert is not None:
            return add_noise(policy, x0, self.invert(policy, x0, timesteps, conditioning), timesteps)
        index = part.experience.trajectory.sample_index[part.groups.rows]
        shared = self.preference_loss.needs.shared_noise if self.share_noise is None else self.share_noise
        index = index.amin(dim=1, keepdim=True).expand(num, size) if shared else index
        noise = gaussian_noise(draw_seeds(part.seed, index.flatten().tolist(), part.draw, NOISE), x0)
        return add_noise(policy, x0, noise, timesteps)

    def _prompts(self, part: Microbatch, flat: Tensor) -> list[Prompt]:
        trajectory, size = part.experience.trajectory, part.groups.rows.shape[1]
        prompts = [trajectory.prompts[group] for group in trajectory.group_id[flat].tolist()]
        index = trajectory.sample_index[part.groups.rows].amin(dim=1).tolist()

        def dropped(probability: float, purpose: int) -> list[bool]:
            seeds = draw_seeds(part.seed, index, part.draw, purpose)
            return [float(torch.rand((), generator=Generator().manual_seed(seed))) < probability for seed in seeds]

        if self.prompt_dropout > 0:
            silent = dropped(self.prompt_dropout, DROPOUT)
            prompts = [replace(prompt, text="") if silent[row // size] else prompt for row, prompt in enumerate(prompts)]
        if self.user_dropout > 0:
            nobody = dropped(self.user_dropout, NOBODY)
            prompts = [asking(prompt, None) if nobody[row // size] else prompt for row, prompt in enumerate(prompts)]
        return prompts

    def _watched(self, inputs: LossInput, pair: PairedErrors) -> dict[str, Tensor]:
        """What tells a healthy run from a drifting one: both errors usually rise, the margin must."""
        kind, found = self.preference_loss.needs.group, dict[str, Tensor]()
        paired = kind in ("pair", "list")
        for name, error in (("policy", inputs.policy), ("reference", inputs.reference)):
            if error is not None:
                ends = {"_chosen": error[:, 0], "_rejected": error[:, -1]} if paired else {"": error}
                found |= {f"error_{name}{end}": values for end, values in ends.items()}
        if inputs.reference is not None:
            u = inputs.u
            found["implicit_reward"] = u
            assert pair.norm_policy is not None
            assert pair.norm_reference is not None
            found["output_norm_ratio"] = pair.norm_policy / pair.norm_reference.clamp(min=1e-12)
            if paired:
                margin: Tensor = u[:, 0] - u[:, -1]
                found |= {"margin": margin, "accuracy": 0.5 * (margin.sign() + 1), "saturated": (torch.sigmoid(-margin) < 0.05).float()}
        return found
