"""Data among samples: retraining on one's own best samples that keeps a share of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visalign.maths.seeds import derive_seed
from visalign.preferences.records import PreferenceDataset
from visalign.preferences.stored import load_latents
from visalign.protocols import Policy
from visalign.samplers.rollout import TrajectorySampler
from visalign.types import Prompt, Role, Trajectory

REAL = 7  # what a seed is for


@dataclass(frozen=True)
class MixedSampler:
    """``generated``'s groups, of which the last ``round(fraction * P)`` are replaced by groups of a data set, under its prompts.

    A group of data repeats its candidates until it has as many members as a generated one. Rewards score both alike. Which rows come in an
    iteration follows from the seed and the groups' global index, so that a resumed run and any number of processes see the same.

    Attributes:
        generated: makes the other groups, storing no steps.
        dataset: every candidate a stored latent (``preferences.cached_latents``).
        fraction: of the groups, in (0, 1).
        seed: of the draw of rows.
    Source: self-consuming models with curated data, arXiv:2407.09499.
    """

    generated: TrajectorySampler
    dataset: PreferenceDataset
    fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"the fraction of real groups must lie between 0 and 1 (exclusive), got {self.fraction}")

    def rollout(self, policy: Policy, prompts: Sequence[Prompt], *, rows: Sequence[int], iteration: int, first_index: int,
                role: Role = "policy") -> Trajectory:
        """Generated groups first, then groups of data.

        Raises:
            ValueError: the fraction leaves no generated or no real group, or steps are stored, which data does not have.
        """
        num_real, size = round(self.fraction * len(prompts)), self.generated.group_size
        if not 0 < num_real < len(prompts):
            raise ValueError(f"real_fraction {self.fraction} of {len(prompts)} groups on this process is {num_real} real ones; some must "
                             "be real and some generated: use more train.groups or another fraction")
        num_made = len(prompts) - num_real
        made = self.generated.rollout(policy, prompts[:num_made], rows=rows[:num_made], iteration=iteration, first_index=first_index,
                                      role=role)
        if len(made.transitions):
            raise ValueError("groups of data have no sampler steps to train on; set sampler.steps=none and an algorithm that learns from "
                             "clean samples")
        first_group = first_index // size + num_made
        drawn = [derive_seed(self.seed, first_group + k, REAL) % len(self.dataset) for k in range(num_real)]
        records = [self.dataset.records[row] for row in drawn]
        candidates = [load_latents(record.candidates) for record in records]
        real = torch.cat([one[torch.arange(size) % len(one)] for one in candidates]).to(made.x_final)
        everyone = (*made.prompts, *(record.prompt for record in records))
        num_samples = len(everyone) * size
        group_id = torch.arange(num_samples) // size
        nothing = made.x.new_empty(num_samples, 0, *policy.latent_shape)
        with torch.no_grad():
            conditioning = policy.encode(everyone)
        return replace(made, x=nothing, x_next=nothing, x_final=torch.cat([made.x_final, real]), prediction=None,
                       log_prob=made.log_prob.new_empty(num_samples, 0), group_id=group_id, prompt_index=group_id.clone(),
                       sample_index=torch.arange(first_index, first_index + num_samples), prompts=everyone, conditioning=conditioning)

    def generate(self, policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], role: Role = "policy") -> Tensor:
        """As every sampler's: new samples, for evaluation."""
        return self.generated.generate(policy, prompts, seeds, role)
