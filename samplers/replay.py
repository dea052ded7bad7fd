"""Judged samples instead of new ones: a preference data set as a run's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.preferences.records import PreferenceDataset, PreferenceRecord
from visalign.preferences.stored import load_latents
from visalign.protocols import Policy
from visalign.samplers.rollout import generate
from visalign.types import Prompt, Role, Scores, Trajectory

SCORE = "preference"


@dataclass(frozen=True)
class ReplaySampler:
    """A trajectory without a way: its samples are a data set's latents, its scores (``scores["preference"]``) the judgements.

    Losses over the forward process need no more. No step is stored, and nothing is decoded or scored again.

    Attributes:
        dataset: every candidate a stored latent (``preferences.cached_latents``); a run's prompts are ``dataset.prompts``.
        microbatch: samples per denoiser call of ``generate``.
    """

    dataset: PreferenceDataset
    microbatch: int | None = None

    @property
    def group_size(self) -> int:
        """Candidates per prompt, K."""
        return self.dataset.num_candidates

    def rollout(self, policy: Policy, prompts: Sequence[Prompt], *, rows: Sequence[int], iteration: int, first_index: int,
                role: Role = "policy") -> Trajectory:
        """The candidates of these rows of the data set, group by group; ``role`` does not matter, since nothing is sampled.

        Raises:
            ValueError: ``rows`` and ``prompts`` are not the data set's; latents cannot be read or are of another shape.
        """
        records = self._records(prompts, rows)
        latents = torch.cat([load_latents(record.candidates) for record in records])
        if tuple(latents.shape[1:]) != tuple(policy.latent_shape):
            raise ValueError(f"the latents of {self.dataset.source} are {tuple(latents.shape[1:])}, this pipeline's are "
                             f"{tuple(policy.latent_shape)}; encode the data set for this pipeline with cached_latents")
        num_samples, device = latents.shape[0], policy.device
        group_id = torch.arange(num_samples) // self.group_size
        with torch.no_grad():
            conditioning = policy.encode(prompts)
        nothing = torch.empty(num_samples, 0, *policy.latent_shape, device=device)
        scores = Scores.from_values([score for record in records for score in record.scores])
        return Trajectory(x=nothing, x_next=nothing, x_final=latents.to(device), step_index=torch.empty(0, dtype=torch.int64),
                          transitions=(), log_prob=torch.empty(num_samples, 0, device=device), prediction=None, group_id=group_id,
                          prompt_index=group_id.clone(), sample_index=torch.arange(first_index, first_index + num_samples),
                          prompts=tuple(prompts), conditioning=conditioning, scores={SCORE: scores})

    def generate(self, policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], role: Role = "policy") -> Tensor:
        """As every sampler's: new samples, for evaluation."""
        return generate(policy, prompts, seeds, microbatch=self.microbatch, role=role)

    def _records(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> list[PreferenceRecord]:
        if len(rows) != len(prompts) or not rows:
            raise ValueError(f"replay needs the row of every prompt, got {len(rows)} rows for {len(prompts)} prompts")
        if wrong := [row for row in rows if not 0 <= row < len(self.dataset)]:
            raise ValueError(f"row {wrong[0]} of a data set of {len(self.dataset)}: the run's prompts must be the data set's own, in "
                             "its order")
        records = [self.dataset.records[row] for row in rows]
        for record, row, prompt in zip(records, rows, prompts, strict=True):
            if record.prompt.text != prompt.text:
                raise ValueError(f"row {row} of {self.dataset.source} is about {record.prompt.text[:60]!r}, the run's prompt there is "
                                 f"{prompt.text[:60]!r}; use the data set's own prompts, in its order")
        return records
