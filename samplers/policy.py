"""`PipelinePolicy`: any diffusers pipeline, observed once, as a policy that can be asked, trained and reverted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from visalign.maths.process import to_prediction
from visalign.samplers.calls import PipelineCall
from visalign.samplers.capture import Capture, capture
from visalign.samplers.codec import Codec
from visalign.samplers.observe import CaptureError, Observer
from visalign.samplers.roles import Roles
from visalign.samplers.sites import Site, batch_rows
from visalign.samplers.slots import Path, fill_in, join_rows, leaves, split_rows
from visalign.types import Media, Prediction, Prompt, Role, Schedule

PROBE = Prompt("a photo of a dog")


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt's conditioning, as the pipeline prepared it: per site, the rows of its per-sample arguments.

    ``family`` is equal for prompts whose arguments can share one batch (same shapes, same shared arguments).
    """

    rows: tuple[dict[Path, list[Any]], ...]
    family: int


class PipelineConditioning:
    """Encoded prompts, one per row. Rows repeat by reference: a group of G samples stores its prompt once."""

    def __init__(self, prompts: Sequence[EncodedPrompt]) -> None:
        self.prompts = tuple(prompts)
        self._joined: dict[tuple[int, tuple[int, ...]], dict[Path, Any]] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> PipelineConditioning:
        return PipelineConditioning([self.prompts[row] for row in rows])

    def joined(self, index: int, site: Site, members: tuple[int, ...]) -> dict[Path, Any]:
        """The per-sample arguments of one site for some rows as one batch; kept for the next step."""
        key = (index, members)
        if key not in self._joined:
            self._joined[key] = {
                path: join_rows([self.prompts[m].rows[index][path] for m in members], site.rows[path], site.order)
                for path in self.prompts[members[0]].rows[index]
            }
        return self._joined[key]


class PipelinePolicy:
    """A captured pipeline (see `visalign.samplers.capture`). Implements `visalign.protocols.Policy`.

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
        self.roles = roles if roles is not None else Roles(self.denoisers)
        self.device = next(next(iter(self.denoisers.values())).parameters()).device
        self.codec = Codec(self.observer, self.call, self.capture, probe, rate)
        self._encoded: dict[Any, EncodedPrompt] = {}
        self._families: list[Any] = []

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

    def encode(self, prompts: Sequence[Prompt]) -> PipelineConditioning:
        """One row per prompt. Each distinct prompt runs the pipeline up to its first denoiser calls, once."""
        return PipelineConditioning([self._encode(prompt) for prompt in prompts])

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
        shapes = [{path: [_shape(row) for row in part] for path, part in site_rows.items()} for site_rows in rows]
        family = next((i for i, known in enumerate(self._families) if known[0] == shapes and _equal(known[1], shared)), None)
        if family is None:
            family = len(self._families)
            self._families.append((shapes, shared))
        return EncodedPrompt(tuple(rows), family)

    def predict(self, x: Tensor, step: int, conditioning: PipelineConditioning, role: Role = "policy") -> Prediction:
        """Guided prediction at ``schedule.levels[step]`` for x (B, *latent_shape), as end points in float32.

        Raises:
            ValueError: x and conditioning have different lengths.
        """
        if len(conditioning) != x.shape[0]:
            raise ValueError(f"x has {x.shape[0]} samples but conditioning {len(conditioning)} rows; select() one row per sample")
        families: dict[Any, list[int]] = {}
        for row, prompt in enumerate(conditioning.prompts):
            families.setdefault(prompt.family if self.capture.batched else row, []).append(row)
        with self.roles.use(role):
            parts = [
                self._model_output(x[members] if len(families) > 1 else x, step, conditioning, tuple(members))
                for members in families.values()
            ]
        output = parts[0]
        if len(parts) > 1:
            order = torch.tensor([row for members in families.values() for row in members]).argsort()
            output = torch.cat(parts)[order.to(x.device)]
        level, fit = self.schedule.levels[step], self.capture.fit
        return to_prediction(output.float(), x.float(), level.alpha, level.sigma, fit.kind, fit.sigma_data)

    def _model_output(self, x: Tensor, step: int, conditioning: PipelineConditioning, members: tuple[int, ...]) -> Tensor:
        """What the pipeline would hand to ``scheduler.step`` for these rows of one family."""
        plan, timestep = self.capture.plans[step], self.schedule.timesteps[step]
        predictions: list[Tensor] = []
        outputs: list[list[Tensor]] = []
        for index, scale in zip(plan.sites, plan.scales, strict=True):
            site = self.capture.sites[index]
            arguments = self._arguments(index, site, x, scale, timestep, conditioning, members, outputs)
            returned = self.observer.modules[site.module](**arguments)
            outputs.append([leaf for leaf in torch.utils._pytree.tree_leaves(returned) if isinstance(leaf, Tensor)])
            if site.output is not None:
                rows = batch_rows(site, returned, x.shape[0])
                predictions += [row.reshape(x.shape).float() for row in rows]
        return plan.combination(predictions, x.float())

    def _arguments(
        self,
        index: int,
        site: Site,
        x: Tensor,
        scale: float,
        timestep: float,
        conditioning: PipelineConditioning,
        members: tuple[int, ...],
        outputs: list[list[Tensor]],
    ) -> dict[str, Any]:
        batch = x.shape[0]
        values: dict[Path, Any] = dict(self._families[conditioning.prompts[members[0]].family][1][index])
        values.update(conditioning.joined(index, site, members))
        for slot in site.times:
            value = slot.value(timestep)
            value = value.to(self.device) if isinstance(value, Tensor) and value.ndim else value
            values[slot.path] = (
                join_rows([split_rows(value, site.rows[slot.path])] * batch, site.rows[slot.path], site.order)
                if slot.path in site.rows
                else value
            )
        for path, (position, tensor) in site.links.items():
            values[path] = outputs[position][tensor]
        if site.latent is not None:
            state = x if scale == 1 else scale * x
            held = values.get(site.latent.path)
            backgrounds = [None] * site.copies if held is None else self._background(held, site, batch)
            rows = [
                gather(state, background).to(site.latent.dtype) for gather, background in zip(site.latent.gathers, backgrounds, strict=True)
            ]
            stacked = torch.stack(rows, dim=0 if site.order == "chunk" else 1).flatten(0, 1) if len(rows) > 1 else rows[0]
            values[site.latent.path] = list(stacked.unbind(0)) if site.latent.as_list else stacked
        return fill_in(site.template, values)

    @staticmethod
    def _background(held: Any, site: Site, batch: int) -> list[Any]:
        tensor = torch.stack(held) if isinstance(held, list) else held
        if site.order == "chunk":
            return list(tensor.reshape(site.copies, batch, *tensor.shape[1:]).unbind(0))
        return list(tensor.reshape(batch, site.copies, *tensor.shape[1:]).unbind(1))

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
            module.enable_gradient_checkpointing()  # type: ignore[operator]

    def save_adapter(self, folder: FilePath) -> None:
        """Write what was trained in the form plain diffusers loads; ``loading.json`` holds the line that loads each component."""
        loads = self.roles.save(self.pipe, folder)
        folder.joinpath("loading.json").write_text(json.dumps(loads, indent=2), encoding="utf-8")


def _shape(row: Any) -> Any:
    return tuple(row.shape) if isinstance(row, Tensor) else repr(row)


def _equal(one: Any, two: Any) -> bool:
    """Whether shared arguments of all sites agree."""
    for a, b in zip(one, two, strict=True):
        if a.keys() != b.keys():
            return False
        for path in a:
            x, y = a[path], b[path]
            if isinstance(x, Tensor) != isinstance(y, Tensor):
                return False
            if isinstance(x, Tensor) and (x.shape != y.shape or not torch.equal(x, y)):
                return False
            if isinstance(x, int | float | str | bool) and x != y:
                return False
    return True
