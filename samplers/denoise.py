"""Make a captured loop's denoiser calls again, for any state, time, conditioning and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.samplers.capture import Capture, StepPlan
from visalign.samplers.conditioning import PipelineConditioning
from visalign.samplers.observe import CaptureError, Observer
from visalign.samplers.roles import Roles
from visalign.samplers.sites import Site, batch_rows
from visalign.samplers.slots import Path, fill_in, join_rows, split_rows


class Denoise:
    """The calls of one step of the loop, for rows of one family of prompts.

    Args:
        observer: holds the modules.
        capture: what was observed.
        device: where the denoisers are.
        roles: whether users condition the denoisers.
    """

    def __init__(self, observer: Observer, capture: Capture, device: torch.device, roles: Roles) -> None:
        self.observer, self.capture, self.device, self.roles = observer, capture, device, roles
        self.rows = 0  # evaluated so far: samples times guidance copies
        self._scale_offset: dict[int, float | None] = {}
        self._takes_times: dict[int, bool] = {}

    def predictions(self, x: Tensor, plan: StepPlan, timesteps: Sequence[float], scales: Sequence[float | Tensor],
                    conditioning: PipelineConditioning, members: tuple[int, ...]) -> list[Tensor]:
        """The rows that the step's combination takes, each shaped like x (B, ...), in the network's dtype.

        Args:
            timesteps: one per row.
            scales: of the state, per site of ``plan``; a tensor is one factor per row.
            members: which rows of ``conditioning`` these are; all of one family.
        """
        found: list[Tensor] = []
        outputs: list[list[Tensor]] = []
        for index, scale in zip(plan.sites, scales, strict=True):
            site = self.capture.sites[index]
            arguments = self._arguments(index, site, x, scale, timesteps, conditioning, members, outputs)
            with self.roles.given_users([conditioning.prompts[member].user for member in members], site.copies, site.order):
                returned = self.observer.modules[site.module](**arguments)
            self.rows += x.shape[0] * site.copies
            outputs.append([leaf for leaf in torch.utils._pytree.tree_leaves(returned) if isinstance(leaf, Tensor)])
            if site.output is not None:
                found += [row.reshape(x.shape) for row in batch_rows(site, returned, x.shape[0])]
        return found

    def scales_at(self, plan: StepPlan, alpha: Tensor, sigma: Tensor) -> list[float | Tensor]:
        """Each site's factor of the state at levels (B,) the schedule does not visit: 1, or ``(sigma^2 + c^2 alpha^2)^(-1/2)``.

        Raises:
            CaptureError: the schedule's own factors follow another rule.
        """
        found: list[float | Tensor] = []
        for index in plan.sites:
            if index not in self._scale_offset:
                self._scale_offset[index] = self._fit_scale(index)
            squared = self._scale_offset[index]
            found.append(1.0 if squared is None else (sigma.square() + squared * alpha.square()).rsqrt().float().to(self.device))
        return found

    def takes_rows_of_times(self, plan: StepPlan, x: Tensor, timesteps: Sequence[float], conditioning: PipelineConditioning,
                            members: tuple[int, ...]) -> bool:
        """Whether one call may hold rows at different times: the time is given per row, or the module turns out to accept that."""
        sites = [(index, self.capture.sites[index]) for index in plan.sites]
        if all(slot.path in site.rows for _, site in sites for slot in site.times):
            return True
        if not self.capture.batched or any(slot.slope.numel() != 1 for _, site in sites for slot in site.times):
            return False
        first = plan.sites[0]
        if first not in self._takes_times:
            rows = [0, next(row for row, t in enumerate(timesteps) if t != timesteps[0])]
            two, times = tuple(members[row] for row in rows), [timesteps[row] for row in rows]
            scales = [1.0] * len(plan.sites)
            with torch.no_grad():
                alone = [self.predictions(x[row:row + 1], plan, [time], scales, conditioning, (member,))[0].float()
                         for row, time, member in zip(rows, times, two, strict=True)]
                try:
                    together = self.predictions(x[rows], plan, times, scales, conditioning, two)[0].float()
                    gap = float((together - torch.cat(alone)).abs().max() / together.abs().max())
                except (RuntimeError, ValueError, TypeError, IndexError):
                    gap = float("inf")
            self._takes_times[first] = gap < (1e-4 if self.capture.state_dtype == torch.float32 else 2e-2)
        return self._takes_times[first]

    def _fit_scale(self, index: int) -> float | None:
        pairs = [(plan.scales[plan.sites.index(index)], level) for plan, level in
                 zip(self.capture.plans, self.capture.fit.schedule.levels, strict=False) if index in plan.sites]
        if all(scale == 1 for scale, _ in pairs):
            return None
        scale, level = pairs[0]
        squared = (scale**-2 - level.sigma**2) / level.alpha**2
        worst = max(abs((level.sigma**2 + squared * level.alpha**2) * scale**2 - 1) for scale, level in pairs)
        # sigma^2 hides c^2 in float32 where sigma is large: fit at the smallest sigma instead.
        if worst > 1e-3:
            scale, level = min(pairs, key=lambda pair: pair[1].sigma)
            squared = (scale**-2 - level.sigma**2) / level.alpha**2
            worst = max(abs((level.sigma**2 + squared * level.alpha**2) * scale**2 - 1) for scale, level in pairs)
        if worst > 1e-3:
            raise CaptureError(
                f"the pipeline scales its state by {', '.join(f'{scale:.4g}' for scale, _ in pairs[:4])}, ..., which is not "
                "(sigma^2 + c^2 alpha^2)^(-1/2); losses at other noise levels than the schedule's are not possible with this scheduler"
            )
        return squared

    def _arguments(self, index: int, site: Site, x: Tensor, scale: float | Tensor, timesteps: Sequence[float],
                   conditioning: PipelineConditioning, members: tuple[int, ...], outputs: list[list[Tensor]]) -> dict[str, Any]:
        values: dict[Path, Any] = dict(conditioning.shared(index, members))
        values.update(conditioning.joined(index, site, members))
        for slot in site.times:
            values[slot.path] = self._time(slot, site, timesteps)
        for path, (position, tensor) in site.links.items():
            values[path] = outputs[position][tensor]
        if site.latent is not None:
            factor = scale.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(scale, Tensor) else scale
            state = x if not isinstance(factor, Tensor) and factor == 1 else factor * x
            held = values.get(site.latent.path)
            backgrounds = [None] * site.copies if held is None else _background(held, site, x.shape[0])
            rows = [
                gather(state, background).to(site.latent.dtype) for gather, background in zip(site.latent.gathers, backgrounds, strict=True)
            ]
            stacked = torch.stack(rows, dim=0 if site.order == "chunk" else 1).flatten(0, 1) if len(rows) > 1 else rows[0]
            values[site.latent.path] = list(stacked.unbind(0)) if site.latent.as_list else stacked
        return fill_in(site.template, values)

    def _time(self, slot: Any, site: Site, timesteps: Sequence[float]) -> Any:
        """A time argument for these rows: per row where the pipeline gives it so, one value where all agree, else one per row."""
        def at(timestep: float) -> Any:
            value = slot.value(timestep)
            return value.to(self.device) if isinstance(value, Tensor) and value.ndim else value

        if slot.path in site.rows:
            return join_rows([split_rows(at(timestep), site.rows[slot.path]) for timestep in timesteps], site.rows[slot.path], site.order)
        if len(set(timesteps)) == 1:
            return at(timesteps[0])
        values = [float(slot.value(timestep)) for timestep in timesteps]
        column = torch.tensor(values, dtype=slot.dtype or torch.float32, device=self.device)
        return column.repeat(site.copies) if site.order == "chunk" else column.repeat_interleave(site.copies)


def _background(held: Any, site: Site, batch: int) -> list[Any]:
    tensor = torch.stack(held) if isinstance(held, list) else held
    if site.order == "chunk":
        return list(tensor.reshape(site.copies, batch, *tensor.shape[1:]).unbind(0))
    return list(tensor.reshape(batch, site.copies, *tensor.shape[1:]).unbind(1))
