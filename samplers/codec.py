"""Between noise, latents and media, through the pipeline's own code.

Decoding runs the pipeline's call with its loop's last state replaced, so that its own unpacking, denormalisation, VAE, vocoder and
postprocessing do the work. Encoding inverts what probing finds of that path: from loop latents to the VAE's input it is a permutation
with an elementwise affine, and from the VAE's output to media an affine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visalign.samplers.calls import PipelineCall
from visalign.samplers.capture import Capture
from visalign.samplers.observe import CaptureError, Observer
from visalign.samplers.slots import decode_gather, describe, digits
from visalign.types import Media, Prompt

_FIELDS = ("images", "image", "frames", "audios", "audio", "videos", "video")


@dataclass(frozen=True)
class OutputType:
    """Which ``output_type`` decoding asks for (``None``: the pipeline has no such argument), and which one shows users the same.

    ``scale`` and ``offset`` turn the first into the second; with (1, 0) nothing is changed or clamped.
    """

    kind: str | None
    shown: str | None
    scale: float = 1.0
    offset: float = 0.0

    def apply(self, media: Tensor) -> Tensor:
        return media if self.scale == 1 else (self.scale * media + self.offset).clamp(0, 1)


class Codec:
    """Initial noise, decoding and encoding of one captured pipeline."""

    def __init__(self, observer: Observer, call: PipelineCall, capture: Capture, prompt: Prompt, rate: float) -> None:
        self.observer, self.call, self.capture, self.prompt, self.rate = observer, call, capture, prompt, rate
        self.own_draw = False
        self.noise_order, self.noise_scale, self.noise_dtype = self._find_noise()
        self._to_vae: tuple[Tensor, Tensor, Tensor, tuple[int, ...]] | None = None

    def initial(self, seed: int) -> Tensor:
        """The first state of a sample, float32 ``latent_shape``: the pipeline's own draw for a CPU generator with this seed."""
        numel = int(np.prod(self.capture.latent_shape))
        noise = torch.randn(numel, generator=torch.Generator("cpu").manual_seed(seed), dtype=self.noise_dtype).float()
        if self.noise_order is not None:
            noise = noise[self.noise_order]
        return (self.noise_scale * noise).reshape(self.capture.latent_shape)

    def _find_noise(self) -> tuple[Tensor | None, float, torch.dtype]:
        """Order, scale and dtype of the pipeline's own initial draw, found by matching its first state with ours."""
        seed = 1234
        first = (
            self.observer.run(
                self.call.one(self.prompt, seed), answer_output=lambda k, call: call.output, stop_after=1, freeze_encoders=True
            )
            .steps[0]
            .sample.detach()
            .float()
            .cpu()
            .flatten()
        )
        scale = float(first.square().mean().sqrt())
        level = self.capture.fit.schedule.levels[0]
        if first.numel() >= 256 and not 0.8 < scale / (level.sigma**2 + level.alpha**2) ** 0.5 < 1.25:
            raise CaptureError(
                f"{self.call.name} does not start from pure noise: its first state has standard deviation {scale:.3g}, the schedule's "
                f"first level {level.sigma:.3g}. Image-to-image and video continuation start part of the way; set strength=1.0 or "
                "use the family's text-to-media pipeline"
            )
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            noise = torch.randn(first.numel(), generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype).float()
            ratio = float(first.square().sum().sqrt() / noise.square().sum().sqrt())
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            if torch.allclose(first.sort().values, (ratio * noise).sort().values, rtol=tolerance, atol=tolerance):
                ratio = 1.0 if abs(ratio - 1) < 1e-4 else ratio
                self.own_draw = True
                if torch.allclose(first, ratio * noise, rtol=tolerance, atol=tolerance):
                    return None, ratio, dtype
                order = torch.empty(first.numel(), dtype=torch.int64)
                order[first.argsort()] = noise.argsort()
                return order, ratio, dtype
        return None, scale if abs(scale / max(level.sigma, 1e-6) - 1) > 0.1 else max(level.sigma, 1e-6), torch.float32

    def decode(self, latents: Tensor, prompts: Sequence[Prompt] | None = None) -> list[Media]:
        """Latents (B, *latent_shape) to canonical media; ``prompts`` as in `decode_tensor`."""
        tensor = self.decode_tensor(latents, prompts).detach().cpu()
        if self.kind == "audio":
            return [Media("audio", wave.float().clamp(-1, 1), rate=self.sample_rate) for wave in tensor]
        pixels = (tensor.float().clamp(0, 1) * 255).round().to(torch.uint8)
        return [Media("image", one) if self.kind == "image" else Media("video", one, rate=self.rate) for one in pixels]

    def decode_tensor(self, latents: Tensor, prompts: Sequence[Prompt] | None = None, grad: bool = False) -> Tensor:
        """Media as a tensor: images (B, 3, H, W) and video (B, F, 3, H, W) in [0, 1], audio (B, channels, samples).

        Args:
            prompts: one per sample; their condition images take part in decoding (a video's first frame). ``None`` means the probe's.
        """
        if tuple(latents.shape[1:]) != self.capture.latent_shape:
            raise ValueError(f"decode takes latents (B, {', '.join(map(str, self.capture.latent_shape))}), got {tuple(latents.shape)}")
        sources = [self.prompt.images if prompts is None else prompt.images for prompt in (prompts or [self.prompt] * latents.shape[0])]
        if len(set(sources)) > 1 or (not self.capture.batched and latents.shape[0] > 1):
            singles = [prompts[k : k + 1] if prompts else None for k in range(latents.shape[0])]
            return torch.cat([self.decode_tensor(one[None], single, grad) for one, single in zip(latents, singles, strict=True)])
        source = replace(self.prompt, images=sources[0])
        return self.output.apply(self._to_tensor(self._finish(latents, source, self.output.kind, grad), latents.shape[0]))

    def _finish(self, latents: Tensor, prompt: Prompt, kind: str | None, grad: bool) -> Any:
        """The pipeline's result of this output type when its loop ends in these latents."""
        last = self.capture.num_iterations - 1
        state = latents.to(self.capture.state_dtype)
        state = state if self.capture.state_lead == 1 else state.flatten(0, 1)

        def answer(k: int, sample: Tensor, output: Tensor) -> Tensor:
            return state.to(sample.device) if k == last else torch.zeros_like(sample)

        arguments = self.call.repeat(prompt, [0] * latents.shape[0], **({"output_type": kind} if kind else {}))
        return self.observer.run(
            arguments, answer_state=answer, answer_output=lambda k, call: call.output, grad=grad, freeze_encoders=True
        ).result

    @cached_property
    def output(self) -> OutputType:
        """How to ask the pipeline for media: "pt" where it gives what "np" shows users (up to a known affine), else "np" or "pil"."""
        if not self.call.understands("output_type"):
            return OutputType(None, None)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, *self.capture.latent_shape, generator=generator)
        found: dict[str, Tensor] = {}
        problem: Exception | None = None
        for kind in ("np", "pt", "pil"):
            if kind == "pil" and found:
                break
            try:
                found[kind] = self._to_tensor(self._finish(latents, self.prompt, kind, grad=False), 1).float()
            except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
                problem = error
        if not found:
            raise CaptureError(f"{self.call.name} decodes to none of the output types np, pt, pil: {problem}")
        shown = "np" if "np" in found else next(iter(found))
        if "pt" not in found:
            return OutputType(shown, shown)
        for scale, offset in ((1.0, 0.0), (0.5, 0.5)):  # some pipelines return [-1, 1] for "pt" and [0, 1] for "np"
            candidate = OutputType("pt", shown, scale, offset)
            if found["pt"].shape == found[shown].shape and torch.allclose(candidate.apply(found["pt"]), found[shown], atol=2e-3):
                return candidate
        return OutputType(shown, shown)

    def _to_tensor(self, result: Any, batch: int) -> Tensor:
        value = _first(result)
        if isinstance(value, list | tuple) and value and not isinstance(value[0], Tensor):
            value = np.stack(
                [np.stack([np.asarray(frame) for frame in one]) if isinstance(one, list) else np.asarray(one) for one in value]
            )
            value = value / 255.0 if value.dtype == np.uint8 else value
        elif isinstance(value, list | tuple):
            value = torch.stack(list(value))
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value)).float()
            if value.ndim >= 4 and value.shape[-1] in (1, 3):
                value = value.movedim(-1, -3)
        self.kind = "audio" if value.ndim <= 3 else "image" if value.ndim == 4 else "video"
        if self.kind == "audio" and value.ndim == 2:
            value = value[:, None]
        if value.shape[0] != batch:
            raise CaptureError(f"{self.call.name} decoded {batch} latents to {describe(value)}; one medium per sample was expected")
        return value

    @property
    def sample_rate(self) -> float:
        """Samples per second of decoded audio, from the VAE's or vocoder's configuration."""
        for name in ("vae", "vocoder", "vqvae"):
            part = self.observer.modules.get(name)
            config = getattr(part, "config", None)
            for key in ("sampling_rate", "sample_rate"):
                if getattr(config, key, None):
                    return float(getattr(config, key))
        return 16000.0

    def encode(self, media: Sequence[Media]) -> Tensor:
        """Media to loop latents, the inverse of `decode` up to the VAE's own loss.

        Raises:
            CaptureError: the pipeline has no VAE with an encoder, or its decode path is not invertible.
            ValueError: media of different sizes.
        """
        vae = self.vae()
        shapes = {tuple(one.data.shape) for one in media}
        if len(shapes) != 1:
            raise ValueError(f"encode_media takes media of one size per call, got {sorted(shapes)}; resize them or call it per size")
        stacked = torch.stack([one.data for one in media])
        parameter = next(vae.parameters())
        values = stacked.float() if media[0].kind == "audio" else stacked.float() / 127.5 - 1
        if media[0].kind == "video":
            values = values.movedim(1, 2)
        if media[0].kind == "audio" and hasattr(vae, "hop_length"):
            # The pipeline cuts what it decodes to the length asked for; the rest is silence.
            values = torch.nn.functional.pad(values, (0, max(0, vae.hop_length * self.vae_map()[3][-1] - values.shape[-1])))
        return self.from_vae(_posterior_mode(vae.encode(values.to(parameter))))

    def from_vae(self, z: Tensor) -> Tensor:
        """The VAE's own latents (B, ...) as loop latents (B, *latent_shape)."""
        index, scale, offset, _ = self.vae_map()
        flat = (z.flatten(1).float() - offset.float().flatten().to(z.device)) / scale.float().flatten().to(z.device)
        out = torch.empty_like(flat)
        out[:, index.flatten().to(z.device)] = flat
        return out.reshape(z.shape[0], *self.capture.latent_shape)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Loop latents (B, *latent_shape) as the input of ``vae.decode``, as the pipeline makes it."""
        index, scale, offset, shape = self.vae_map()
        flat = latents.flatten(1)[:, index.flatten().to(latents.device)]
        return (flat * scale.flatten().to(flat) + offset.flatten().to(flat)).reshape(latents.shape[0], *shape)

    def vae_map(self) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """(index, scale, offset, shape) with ``vae_input = scale * latents[index] + offset``, found by probing; computed once."""
        if self._to_vae is None:
            numel = int(np.prod(self.capture.latent_shape))
            zeros = self._vae_input(torch.zeros(numel))
            scale = self._vae_input(torch.ones(numel)) - zeros
            coded = [(self._vae_input(digit) - zeros) / scale for digit in digits(numel)]
            gather = None if (scale == 0).any() else decode_gather(coded, scale != 0, numel)
            if gather is None or gather.index.flatten().sort().values.tolist() != list(range(numel)):
                raise CaptureError(
                    f"{self.call.name} does not hand its latents to the VAE by permutation and scaling alone; encode_media cannot "
                    "invert it. Train from the pipeline's own samples, or override Codec.encode"
                )
            self._to_vae = gather.index, scale, zeros, tuple(zeros.shape)
        return self._to_vae

    def _vae_input(self, flat: Tensor) -> Tensor:
        """What ``vae.decode`` receives when the loop ends in these latents, float64, without batch axis."""
        received: list[Tensor] = []
        with self._intercepted_vae(received), suppress(_Received):
            self._finish(flat.reshape(1, *self.capture.latent_shape), self.prompt, None, grad=False)
        if not received:
            raise CaptureError(f"{self.call.name} decodes without vae.decode; encode_media needs a VAE")
        return received[0][0].double().cpu()

    @contextmanager
    def _intercepted_vae(self, received: list[Tensor]) -> Any:
        vae = self.vae()

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            received.append(z.detach())
            raise _Received

        vae.decode = decode  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            del vae.decode

    def vae(self) -> Any:
        for name in ("vae", "vqvae", "movq", "vqgan"):
            if hasattr(self.observer.modules.get(name), "encode"):
                return self.observer.modules[name]
        raise CaptureError(
            f"{self.call.name} has no VAE with an encoder among {sorted(self.observer.modules)}; it cannot turn media into latents"
        )


class _Received(BaseException):
    """Ends a decode once the VAE's input is known."""


def _first(result: Any) -> Any:
    for name in _FIELDS:
        if hasattr(result, name):
            return getattr(result, name)
    return result[0] if isinstance(result, tuple) else result


def _posterior_mode(encoded: Any) -> Tensor:
    """The latent an autoencoder's ``encode`` stands for, without sampling."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    for name in ("latents", "latent"):
        if hasattr(encoded, name):
            return getattr(encoded, name)
    return encoded[0]
