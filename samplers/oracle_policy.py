"""A policy without a network: the exact denoiser of Gaussian data, with a learnable shift of the mean it believes in.

It implements the whole ``Policy`` protocol in microseconds, and what training it should give is known in closed form
(``visalign.maths.oracle``), which makes it the proof of rollout, loop and algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from visalign.maths.oracle import GaussianWorld
from visalign.samplers.times import SchedulerTimes
from visalign.types import Media, Prediction, Prompt, Role, Schedule


@dataclass(frozen=True)
class GaussianConditioning:
    """One offset of the data mean per row, (rows,): prompts may differ in how easy their reward is."""

    offset: Tensor

    def __len__(self) -> int:
        return self.offset.shape[0]

    def select(self, rows: Sequence[int]) -> GaussianConditioning:
        return GaussianConditioning(self.offset[torch.as_tensor(list(rows), dtype=torch.int64)])


class GaussianPolicy(nn.Module):
    """The perfect network for ``N(mean + offset(prompt) + shift, var)``, where ``shift`` is trained and starts at 0.

    The reward ``a . x0`` with a KL weight of ``beta`` has its optimum at ``shift = var a / beta``.

    Args:
        world: data distribution; ``mean`` or ``var`` is a tensor of the latent's shape: (channels, samples) for "audio", which
            carries latents to rewards without loss, (3, H, W) for "image" ([-1, 1] becomes uint8).
        schedule: levels to visit, e.g. ``flow_schedule(dance_sigmas(10, shift=3.0))``.
        per_step: one shift per sampler step, parameter (T, *latent_shape), instead of one for all, (*latent_shape).
        media: what ``decode`` returns.
        dtype: of the parameter and of predictions; float64 for exact tests.
    """

    device: torch.device

    def __init__(
        self,
        world: GaussianWorld,
        schedule: Schedule,
        per_step: bool = False,
        media: Literal["audio", "image"] = "audio",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.schedule, self.media, self.per_step = schedule, media, per_step
        mean, var = torch.broadcast_tensors(torch.as_tensor(world.mean, dtype=dtype), torch.as_tensor(world.var, dtype=dtype))
        self.latent_shape = tuple(mean.shape)
        if (media == "image" and not (mean.dim() == 3 and mean.shape[0] == 3)) or (media == "audio" and mean.dim() != 2):
            wanted = "(3, H, W)" if media == "image" else "(channels, samples)"
            raise ValueError(f"media {media!r} needs a world of shape {wanted}, got {self.latent_shape}")
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", mean.clone())
        self.register_buffer("var", var.clone())
        self.device = torch.device("cpu")
        shape = (schedule.num_steps, *self.latent_shape) if per_step else self.latent_shape
        self.shift = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.times = SchedulerTimes("flow", sigma_data=1.0, process="flow", low=0.0, high=1000.0, whole=False, ratio=lambda t: t / 1000)
        self._snapshots: dict[Role, Tensor] = {"reference": self.shift.detach().clone()}

    def encode(self, prompts: Sequence[Prompt]) -> GaussianConditioning:
        """The offset of a prompt is ``metadata["offset"]``, 0 without."""
        offsets = [float(prompt.metadata.get("offset", 0.0)) for prompt in prompts]
        return GaussianConditioning(torch.tensor(offsets, dtype=self.mean.dtype))

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        """``sigma_0`` times unit noise, float32 (len(seeds), *latent_shape), as pipelines start."""
        noise = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return self.schedule.levels[0].sigma * torch.stack(noise)

    def predict(self, x: Tensor, step: int, conditioning: GaussianConditioning, role: Role = "policy") -> Prediction:
        """Posterior means of both end points under this role's shift, for ``x`` (B, *latent_shape).

        Raises:
            ValueError: the role has no weights, or the conditioning has not one row per sample.
        """
        weights = self.shift if role == "policy" else self._snapshot(role)
        world = self._world(x, conditioning, weights[step] if self.per_step else weights)
        return world.predict(x.to(torch.promote_types(x.dtype, self.mean.dtype)), self.schedule.levels[step])

    def predict_at(self, x: Tensor, timesteps: Tensor, conditioning: GaussianConditioning, role: Role = "policy") -> Prediction:
        """As `predict` at any timesteps (B,), with one shift for all levels.

        Raises:
            ValueError: the policy has one shift per step.
        """
        if self.per_step:
            raise ValueError("a shift per step has no value between the steps; build GaussianPolicy(per_step=False)")
        x = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        world = self._world(x, conditioning, self.shift if role == "policy" else self._snapshot(role))
        alpha, sigma = (level.to(x.dtype).reshape(-1, *([1] * len(self.latent_shape))) for level in self.times.level(timesteps))
        return world.predict_at(x, alpha, sigma)

    def _world(self, x: Tensor, conditioning: GaussianConditioning, shift: Tensor) -> GaussianWorld:
        if len(conditioning) != x.shape[0]:
            raise ValueError(f"{x.shape[0]} states need as many conditioning rows, got {len(conditioning)}; repeat them with select")
        offset = conditioning.offset.reshape(-1, *([1] * len(self.latent_shape)))
        return GaussianWorld(mean=self.mean + offset + shift, var=self.var)

    def decode(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> list[Media]:
        """Audio: the latents themselves, one sample per second. Image: [-1, 1] rounded to uint8."""
        if self.media == "audio":
            return [Media(kind="audio", data=latent.detach().float(), rate=1.0) for latent in latents]
        pixels = ((latents.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Media(kind="image", data=image) for image in pixels]

    def decode_tensor(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> Tensor:
        """Audio: the latents themselves. Image: [-1, 1] becomes [0, 1]. Differentiable in ``latents``."""
        return latents if self.media == "audio" else ((latents + 1) / 2).clamp(0, 1)

    def named_trainable(self) -> Mapping[str, nn.Parameter]:
        return {"shift": self.shift}

    def has_role(self, role: Role) -> bool:
        return role == "policy" or role in self._snapshots

    def snapshot(self, role: Role, values: Mapping[str, Tensor] | None = None) -> None:
        """Copy the current weights, or ``values``, to ``role``, e.g. "old" before an update."""
        self._snapshots[role] = (self.shift if values is None else values["shift"]).detach().clone()

    def snapshots(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {role: {"shift": tensor} for role, tensor in self._snapshots.items()}

    def _snapshot(self, role: Role) -> Tensor:
        if role not in self._snapshots:
            raise ValueError(f"no weights play the role {role!r} yet; call snapshot({role!r}) first (have: policy, "
                             f"{', '.join(self._snapshots)})")
        return self._snapshots[role]
