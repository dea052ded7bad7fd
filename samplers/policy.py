"""`PipelinePolicy`: any diffusers pipeline, observed once, as a policy that can be asked, trained and reverted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from visalign.maths.combination import Combination
from visalign.maths.outputs import Outputs, Readout
from visalign.samplers.calls import PipelineCall
from visalign.samplers.capture import Capture, capture
from visalign.samplers.codec import Codec
from visalign.samplers.conditioning import EncodedPrompt, Family, PipelineConditioning, row_shapes
from visalign.samplers.denoise import Denoise
from visalign.samplers.observe import CaptureError, Observer
from visalign.samplers.roles import Roles
from visalign.samplers.slots import leaves, split_rows
from visalign.samplers.times import SchedulerTimes, fit_times
from visalign.samplers.user_attention import UserAttention, text_readers
from visalign.samplers.users import UserTable
from visalign.types import Media, Prediction, Prompt, Role, Schedule
from visalign.users import mixture_of

PROBE = Prompt("a photo of a dog")


class PipelinePolicy:
    """A captured pipeline (see `visalign.samplers.capture`). Implements `visalign.protocols.Policy`.

    Everything that is predicted is made of `outputs` and `outputs_at`; a subclass that predicts something else overrides these.

    Args:
        pipe: a loaded diffusers pipeline.
        call: what the user passes on every call: ``num_inference_steps``, ``guidance_scale``, ``height``, ``num_frames``, ...
        roles: share the weights of another policy of the same pipeline (`with_call`).
        rate: frames per second of decoded video; audio reads its sample rate from the pipeline.
    Raises:
        CaptureError: the pipeline's loop cannot be expressed as a policy; the message says which part and what to change.
        ValueError: ``call`` names an argument the pipeline does not take.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], roles: Roles | None = None, rate: float = 16.0, probe: Prompt = PROBE) -> None:
        self.pipe, self.rate, self.probe = pipe, rate, probe
        pipe.set_progress_bar_config(disable=True)
        self.call = PipelineCall(pipe, call)
        self.observer = Observer(pipe)
        for module in self.observer.modules.values():
            module.eval()
        self.capture: Capture = capture(self.observer, self.call, probe)
        self.schedule: Schedule = self.capture.fit.schedule
        self.latent_shape = self.capture.latent_shape
        self.denoisers = {name: self.observer.modules[name] for name in sorted({site.module for site in self.capture.sites})}
        for name, module in self.observer.modules.items():
            if name not in self.denoisers:  # a reward's gradient passes through the decoder, it does not stay there
                module.requires_grad_(False)
        self.roles = roles if roles is not None else Roles(self.denoisers)
        self.device = next(next(iter(self.denoisers.values())).parameters()).device
        self.codec = Codec(self.observer, self.call, self.capture, probe, rate)
        self._encoded: dict[Any, EncodedPrompt] = {}
        self._families: list[Family] = []
        self.denoise = Denoise(self.observer, self.capture, self.device, self.roles)

    @classmethod
    def from_pipeline(cls, pipe: Any, *, probe: Prompt = PROBE, **call: Any) -> PipelinePolicy:
        """The policy of a pipeline object under these call arguments; ``probe`` is a prompt of the kind it will be given."""
        return cls(pipe, call, probe=probe)

    @classmethod
    def from_pretrained(
        cls, path_or_id: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", probe: Prompt = PROBE, **call: Any
    ) -> PipelinePolicy:
        """Load a pipeline folder or hub id with diffusers and capture it.

        Raises:
            ValueError: the folder is missing or is not a diffusers pipeline.
        """
        from diffusers import DiffusionPipeline

        local = FilePath(path_or_id).expanduser()
        if not (local / "model_index.json").exists() and (local.exists() or path_or_id.startswith(("/", ".", "~"))):
            what = "the folder has no model_index.json" if local.exists() else "there is no such folder"
            raise ValueError(f"no diffusers pipeline at {path_or_id!r}: {what}")
        try:
            pipe = DiffusionPipeline.from_pretrained(str(local) if local.exists() else path_or_id, dtype=dtype)
        except (OSError, ValueError, SafetensorError) as error:
            what = "its files are damaged or incomplete; copy them again" if local.exists() else "not on disk, and it could not be fetched"
            raise ValueError(f"cannot load {path_or_id!r}: {what} ({str(error).splitlines()[0]})") from error
        return cls(pipe.to(device), call, probe=probe)

    def with_call(self, **changes: Any) -> PipelinePolicy:
        """The same weights under other call arguments (more steps, other guidance), captured anew."""
        return PipelinePolicy(self.pipe, {**self.call.fixed, **changes}, self.roles, self.rate, self.probe)

    @cached_property
    def times(self) -> SchedulerTimes:  # type: ignore[override]
        """Noise levels of the whole training range by timestep; see `visalign.samplers.times`."""
        return fit_times(self.capture.scheduler, self.capture.fit)

    def encode(self, prompts: Sequence[Prompt]) -> PipelineConditioning:
        """One row per prompt. Each distinct prompt runs the pipeline up to its first denoiser calls, once.

        Raises:
            ValueError: a prompt's user is unknown to a policy with users.
        """
        return PipelineConditioning([self._for_user(self._encode(prompt), prompt) for prompt in prompts])

    def _for_user(self, encoded: EncodedPrompt, prompt: Prompt) -> EncodedPrompt:
        """With the prompt's user, where users condition this policy; elsewhere a user is metadata like any other."""
        if self.roles.users is None or not (mixture := mixture_of(prompt)):
            return encoded
        self.roles.users.table.check(mixture)
        return replace(encoded, user=mixture)

    def add_users(self, table: UserTable, strength: float = 1.0) -> None:
        """Condition the denoisers on prompts' users, beside an adapter (choose it first) or alone; see `visalign.samplers.user_attention`.

        Raises:
            ValueError: users were added already, or no attention module can take them.
        """
        firsts = {plan.sites: step for step, plan in reversed(list(enumerate(self.capture.plans)))}
        x, conditioning = self.initial_latents([0]), self.encode([self.probe])
        readers = text_readers(self.denoisers, lambda: [self.predict(x, step, conditioning) for step in sorted(firsts.values())])
        self.roles.add_users(UserAttention(self.denoisers, readers, table, strength))

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        key = (prompt.text, prompt.negative, prompt.images)
        if key not in self._encoded:
            if len(self._encoded) >= 1024:
                self._encoded.pop(next(iter(self._encoded)))
            with torch.no_grad():
                self._encoded[key] = self._observe_prompt(prompt)
        return self._encoded[key]

    def _observe_prompt(self, prompt: Prompt) -> EncodedPrompt:
        seen = self.observer.run(self.call.one(prompt), answer_output=lambda k, call: call.output, stop_after=self.capture.steps_to_encode)
        rows, shared = [], []
        for site in self.capture.sites:
            k, j = site.first
            if k >= len(seen.steps) or j >= len(seen.steps[k].calls) or seen.steps[k].calls[j].module != site.module:
                raise CaptureError(
                    f"prompt {prompt.text[:60]!r} makes the pipeline run another loop than the probe prompt {self.probe.text!r} "
                    "(another number of denoiser calls); give it the same kind of arguments, such as a negative_prompt"
                )
            moving = {slot.path for slot in site.times} | set(site.links)
            whole = site.rows.keys() | ({site.latent.path} if site.latent else set())
            values = dict(leaves(seen.steps[k].calls[j].arguments, stop=whole.__contains__))
            values = {path: value for path, value in values.items() if path not in moving}
            if site.latent is not None and all(gather.covers for gather in site.latent.gathers):
                values.pop(site.latent.path)
            rows.append({path: split_rows(value, site.rows[path]) for path, value in values.items() if path in site.rows})
            shared.append({path: value for path, value in values.items() if path not in site.rows})
        shapes = row_shapes(rows)
        family = next((known for known in self._families if known.fits(shapes, shared)), None)
        if family is None:
            family = Family(shapes, tuple(shared))
            self._families = [*self._families[-63:], family]
        return EncodedPrompt(tuple(rows), family)

    def predict(self, x: Tensor, step: int, conditioning: PipelineConditioning, role: Role = "policy") -> Prediction:
        """Guided prediction at ``schedule.levels[step]`` for x (B, *latent_shape), as end points in float32.

        Raises:
            ValueError: x and conditioning have different lengths.
        """
        return self.outputs(x, step, conditioning, role).prediction(x.float())

    def model_output(self, x: Tensor, step: int, conditioning: PipelineConditioning, role: Role = "policy",
                     negative: Role | None = None) -> Tensor:
        """What the pipeline would hand to ``scheduler.step``, float32, shaped like x. Arguments and errors as `outputs`."""
        found = self.outputs(x, step, conditioning, role, negative)
        assert found.readout is not None
        return found.readout.combination([tensor.float() for tensor in found.tensors], x.float())

    def outputs(self, x: Tensor, step: int, conditioning: PipelineConditioning, role: Role = "policy",
                negative: Role | None = None) -> Outputs:
        """The network's own answers at a step, in its dtype, and how they are read; everything else is made of them.

        With ``negative`` the predictions that guidance subtracts (negative weights) are made by that role's weights instead:
        Diffusion-NPO, arXiv:2505.11245.

        Raises:
            ValueError: x and conditioning have different lengths; ``negative`` without anything that guidance subtracts.
        """
        plan, timestep, level = self.capture.plans[step], self.schedule.timesteps[step], self.schedule.levels[step]

        def predictions(role: Role, rows: Tensor, members: tuple[int, ...]) -> list[Tensor]:
            with self.roles.use(role):
                return self.denoise.predictions(rows, plan, [timestep] * len(members), plan.scales, conditioning, members)

        def answers(members: tuple[int, ...]) -> list[Tensor]:
            rows = x if len(members) == x.shape[0] else x[list(members)]
            found = predictions(role, rows, members)
            if negative is not None:
                against = predictions(negative, rows, members)
                found = [other if weight < 0 else own
                         for own, other, weight in zip(found, against, plan.combination.weights, strict=True)]
            return found

        if negative is not None and not self.subtracts(step):
            raise ValueError(f"step {step} combines its predictions as {plan.combination.describe()}: guidance subtracts nothing there, so "
                             "that a negative model has no place; call the pipeline with classifier-free guidance (guidance_scale above 1)")
        families = self._families_of(conditioning, x)
        tensors = _in_order([answers(members) for members in families], families)
        return Outputs(tuple(tensors), level.alpha, level.sigma, self._readout(plan.combination))

    def subtracts(self, step: int) -> bool:
        """Whether guidance subtracts a prediction at this step, as classifier-free guidance does."""
        weights = self.capture.plans[step].combination.weights
        return len(weights) > 1 and min(weights) < 0 < max(weights)

    def predict_at(self, x: Tensor, timesteps: Tensor, conditioning: PipelineConditioning, role: Role = "policy") -> Prediction:
        """As `predict`, at any timesteps (B,) of the training range, one per row.

        Sites, guidance and, where two denoisers take turns, the denoiser are those of the nearest step of the schedule.

        Raises:
            ValueError: lengths differ, or a timestep outside the training range.
            CaptureError: the scheduler does not tell which level belongs to a timestep.
        """
        return self.outputs_at(x, timesteps, conditioning, role).prediction(x.float())

    def outputs_at(self, x: Tensor, timesteps: Tensor, conditioning: PipelineConditioning, role: Role = "policy") -> Outputs:
        """As `outputs`, where `predict_at` asks. Where rows are guided differently the outputs are combined already, one per row."""
        if timesteps.shape != (x.shape[0],):
            raise ValueError(f"x has {x.shape[0]} samples but timesteps {tuple(timesteps.shape)}; give one per row")
        times = timesteps.detach().to("cpu", torch.float64)
        alpha, sigma = self.times.level(times)
        visited = torch.tensor(self.schedule.timesteps, dtype=torch.float64)
        nearest = (times.unsqueeze(1) - visited).abs().argmin(dim=1).tolist()

        def answers(members: tuple[int, ...]) -> list[Tensor]:
            rows, index = (x, slice(None)) if len(members) == x.shape[0] else (x[list(members)], list(members))
            plan, at = self.capture.plans[nearest[members[0]]], times[index].tolist()
            if len(set(at)) > 1 and not self.denoise.takes_rows_of_times(plan, rows, at, conditioning, members):
                together: dict[float, list[int]] = {}
                for place, time in enumerate(at):
                    together.setdefault(time, []).append(place)
                return _in_order([answers(tuple(members[place] for place in places)) for places in together.values()],
                                 list(together.values()))
            scales = self.denoise.scales_at(plan, alpha[index], sigma[index])
            return self.denoise.predictions(rows, plan, at, scales, conditioning, members)

        alike = [(self.capture.plans[step].sites, self.capture.plans[step].combination.describe()) for step in nearest]
        families = self._families_of(conditioning, x, alike)
        with self.roles.use(role):
            parts = [answers(members) for members in families]
        plans = [replace(self.capture.plans[nearest[members[0]]].combination, residual=0.0) for members in families]
        combination = plans[0]
        if any(other != combination for other in plans):
            parts = [[how([tensor.float() for tensor in part], x[list(members)].float())]
                     for how, part, members in zip(plans, parts, families, strict=True)]
            combination = Combination((1.0,))
        return Outputs(tuple(_in_order(parts, families)), alpha.float(), sigma.float(), self._readout(combination))

    def _readout(self, combination: Combination) -> Readout:
        return Readout(combination, self.capture.fit.kind, self.capture.fit.sigma_data)

    def _families_of(self, conditioning: PipelineConditioning, x: Tensor, also: Sequence[Any] | None = None) -> list[tuple[int, ...]]:
        """The rows that can share a batch; with ``also`` they must agree in this too."""
        if len(conditioning) != x.shape[0]:
            raise ValueError(f"x has {x.shape[0]} samples but conditioning {len(conditioning)} rows; select() one row per sample")
        families: dict[Any, list[int]] = {}
        for row, prompt in enumerate(conditioning.prompts):
            key = id(prompt.family) if self.capture.batched else row
            families.setdefault((key, None if also is None else also[row]), []).append(row)
        return [tuple(members) for members in families.values()]

    def initial_latents(self, seeds: Sequence[int]) -> Tensor:
        """What the pipeline itself would start from with ``generator=torch.Generator("cpu").manual_seed(seed)``, one per seed.

        A pipeline that draws condition latents from the same generator first starts elsewhere; then the draw is ours
        (``codec.own_draw`` is False): the same distribution, not the same sample."""
        return torch.stack([self.codec.initial(seed) for seed in seeds]).to(self.device)

    def decode(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> list[Media]:
        """Clean latents (B, *latent_shape) to media through the pipeline's own code.

        ``prompts`` (B) matter to pipelines that join condition images into their result; without them the probe's are used.
        """
        with torch.no_grad():
            return self.codec.decode(latents, prompts)

    def decode_tensor(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> Tensor:
        """As `decode`, float in [0, 1] (images, video) or [-1, 1] (audio), differentiable with respect to ``latents``."""
        return self.codec.decode_tensor(latents, prompts, grad=torch.is_grad_enabled())

    def encode_media(self, media: Sequence[Media]) -> Tensor:
        """Media to clean latents (B, *latent_shape): the pipeline's VAE encoder followed by the inverse of its decode path."""
        with torch.no_grad():
            return self.codec.encode(media)

    def verify(self) -> Any:
        """Replay deterministic runs through our own loop and compare; see `visalign.samplers.verify`."""
        from visalign.samplers.verify import verify

        return verify(self)

    def named_trainable(self) -> Mapping[str, nn.Parameter]:
        return self.roles.named_trainable()

    def has_role(self, role: Role) -> bool:
        return self.roles.has_role(role)

    def snapshot(self, role: Role, values: Mapping[str, Tensor] | None = None) -> None:
        self.roles.snapshot(role, values)

    def snapshots(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self.roles.snapshots()

    def train(self, mode: bool = True) -> None:
        for module in self.denoisers.values():
            module.train(mode)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, in every denoiser.

        Raises:
            ValueError: a denoiser does not support it.
        """
        for name, module in self.denoisers.items():
            if not getattr(module, "_supports_gradient_checkpointing", False):
                raise ValueError(
                    f"{name} ({type(module).__name__}) does not support gradient checkpointing; set train.gradient_checkpointing=false"
                )
            module.enable_gradient_checkpointing(self.roles.recompute)  # type: ignore[operator]

    def save_adapter(self, folder: FilePath) -> None:
        """Write what was trained in the form plain diffusers loads; ``loading.json`` holds the line that loads each component."""
        loads = self.roles.save(self.pipe, folder)
        folder.joinpath("loading.json").write_text(json.dumps(loads, indent=2), encoding="utf-8")


def _in_order(parts: Sequence[list[Tensor]], places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Batches of rows joined, each row at its place."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([place for part in places for place in part]).argsort()
    return [torch.cat(tensors)[order.to(tensors[0].device)] for tensors in zip(*parts, strict=True)]
