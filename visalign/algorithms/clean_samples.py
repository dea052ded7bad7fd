"""Clean samples at drawn noise levels: what algorithms learn from that need no trajectory.

Of a trajectory only ``x_final`` is read. Every sample draws its times and its noise from its own global index, so that neither
micro-batches nor processes change a draw, and every role is asked about exactly the same ``x``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.algorithms.noising import NOISE, TIME, Noised, Times, add_noise, draw_seeds, gaussian_noise
from visalign.protocols import Policy
from visalign.types import Batch


@dataclass(frozen=True)
class Microbatch:
    """``n`` samples at ``k`` draws each, ``n k`` rows of a denoiser call, sample by sample.

    Attributes:
        batch: the optimizer step they belong to.
        rows: int64 (n,), of the trajectory.
        draws: the k draws' numbers.
        timesteps: float64 (n, k).
        seed: of the optimizer step.
    """

    batch: Batch
    rows: Tensor
    draws: tuple[int, ...]
    timesteps: Tensor
    seed: int

    @property
    def valid(self) -> Tensor:
        """bool (n,)."""
        return self.batch.experience.valid[self.rows]

    @property
    def advantage(self) -> Tensor:
        """(n,); a sample has one, whatever steps were stored. 0 where invalid."""
        return torch.where(self.valid, self.batch.experience.advantage[self.rows, 0], 0.0)

    def noised(self, policy: Policy) -> Noised:
        """The samples at their levels, (n k, ...). An invalid sample becomes 0: its loss is masked, and 0 * NaN would be NaN."""
        trajectory, each = self.batch.experience.trajectory, len(self.draws)
        x0 = trajectory.x_final[self.rows].to(policy.device).float()
        x0 = torch.where(self.valid.to(x0.device).reshape(-1, *[1] * (x0.dim() - 1)), x0, 0.0).repeat_interleave(each, dim=0)
        index = trajectory.sample_index[self.rows].tolist()
        by_draw = [draw_seeds(self.seed, index, draw, NOISE) for draw in self.draws]
        noise = gaussian_noise([seed for of_sample in zip(*by_draw, strict=True) for seed in of_sample], x0)
        return add_noise(policy, x0, noise, self.timesteps.flatten())

    def conditioning(self, policy: Policy) -> Any:
        """One row per noised sample, encoded by the policy that trains: its call may differ from that of sampling (guidance)."""
        trajectory = self.batch.experience.trajectory
        groups = trajectory.group_id[self.rows].repeat_interleave(len(self.draws))
        return policy.encode([trajectory.prompts[group] for group in groups.tolist()])

    def sums(self, area: str, recorded: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Metrics ``area/name``: sum over valid samples and draws, and their number; values are (n, k)."""
        valid = self.valid
        return {f"{area}/{name}": (float(values.detach()[valid.to(values.device)].double().sum()), float(valid.sum() * values.shape[1]))
                for name, values in recorded.items()}

    def largest(self, values: Tensor) -> float:
        """Over the valid samples, 0 without any; values are (n, k)."""
        return float(torch.where(self.valid.to(values.device).unsqueeze(1), values.detach(), 0.0).max())


def cut(policy: Policy, batch: Batch, microbatch: int, seed: int, times: Times, draws: int, together: bool = False) -> Iterator[Microbatch]:
    """All samples at all draws, at most ``microbatch`` rows at once; ``together`` keeps the draws of a sample in one micro-batch.

    Raises:
        ValueError: the draws of one sample do not fit into a micro-batch, and must.
    """
    if together and microbatch < draws:
        raise ValueError(f"the {draws} draws of a sample enter the loss together, but train.microbatch is {microbatch}; raise it, use "
                         "fewer draws, or ratio: exp_first")
    sets = [tuple(range(draws))] if together else [(draw,) for draw in range(draws)]
    for rows in batch.rows.split(microbatch // draws if together else microbatch):
        index = batch.experience.trajectory.sample_index[rows].tolist()
        timesteps = times.draw(policy, draw_seeds(seed, index, 0, TIME), draws)
        for chosen in sets:
            yield Microbatch(batch, rows, chosen, timesteps[:, list(chosen)], seed)


def mean_square(difference: Tensor, draws: int) -> Tensor:
    """Mean over the latent, (n, k) for (n k, ...)."""
    return difference.square().flatten(1).mean(dim=1).reshape(-1, draws)
