"""Proof that a captured policy is the pipeline: the pipeline's own deterministic run against our loop, prompt by prompt."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from visalign.samplers.observe import CaptureError
from visalign.samplers.schedule import first_order_step
from visalign.types import Prompt

if TYPE_CHECKING:
    from visalign.samplers.policy import PipelinePolicy

OTHER = "two red squares above a very large green circle"
# bfloat16: a pipeline that keeps its state in it loses up to 5e-2 in three coarse steps from sigma 500; a wrong capture is off by 1.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class CaptureReport:
    """What was found and how exactly it replays; errors are relative to the largest value.

    Attributes:
        rows: (what, finding) lines for the table of ``visalign inspect``.
        latent_error: final latents of our loop against the pipeline's own run, worst of two prompts.
        decode_error: our decode of the pipeline's latents against its result, absolute on [0, 1].
        batch_error: two prompts in one batch against one at a time.
        parity: "own scheduler" or "first-order run" (the pipeline's scheduler has memory or adds noise; its step was replaced).
    """

    rows: tuple[tuple[str, str], ...]
    latent_error: float
    decode_error: float
    batch_error: float
    parity: str


@torch.no_grad()
def verify(policy: PipelinePolicy) -> CaptureReport:
    """Compare with the pipeline's own run. A pipeline whose prompts influence one another in a batch is switched to one at a time.

    Raises:
        CaptureError: a mismatch beyond the tolerance of the pipeline's dtype; the message names the part that differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        other = OTHER if policy.call.understands("prompt") else "1"
        images = tuple(_mirrored(path, Path(folder)) for path in policy.probe.images)
        return _compare(policy, (policy.probe, replace(policy.probe, text=other, images=images)))


def _compare(policy: PipelinePolicy, prompts: tuple[Prompt, Prompt]) -> CaptureReport:
    """`verify` for these two prompts."""
    tolerance = TOLERANCES[policy.capture.sites[0].latent.dtype if policy.capture.sites[0].latent else torch.float32]
    own = policy.capture.fit.first_order
    latent_errors: list[float] = []
    decode_errors: list[float] = []
    for prompt in prompts:
        seen = policy.observer.run(policy.call.one(prompt, **_shown(policy)), answer_state=None if own else _first_order(policy))
        theirs = _state(policy, seen.steps[-1].returned)
        latent_errors.append(relative(replay(policy, prompt, _state(policy, seen.steps[0].sample)), theirs))
        direct = policy.codec._to_tensor(seen.result, 1)
        decode_errors.append(float((policy.codec.decode_tensor(theirs, [prompt]).float() - direct.float()).abs().max()))
    error, parity = max(latent_errors), "own scheduler" if own else "first-order run"
    batch = _batch_error(policy, prompts)
    if batch > tolerance and policy.capture.batched:
        note = f"two prompts in one call differ by {batch:.1e} from one at a time"
        policy.capture = replace(policy.capture, batched=False, batch_note=note)
        batch = _batch_error(policy, prompts)
    report = CaptureReport(
        tuple(describe_capture(policy, parity, error, max(decode_errors), batch)), error, max(decode_errors), batch, parity
    )
    for what, value, hint in (
        (
            "final latents",
            error,
            "guidance, timestep or state entered the denoiser differently than observed; a denoiser with hidden state "
            "(caching, step counters) or a scheduler that clips (clip_sample, thresholding) does this",
        ),
        ("decoded media", report.decode_error, "decoding depends on something besides the latents"),
        ("batched prediction", batch, "rows of a batch influence each other"),
    ):
        if not value <= tolerance:
            raise CaptureError(
                f"{policy.call.name}: {what} differ from the pipeline's own run by {value:.2g} (allowed {tolerance:g}): {hint}"
            )
    return report


def replay(policy: PipelinePolicy, prompt: Prompt, initial: Tensor) -> Tensor:
    """The deterministic run from one initial state (1, ...) through `PipelinePolicy.predict`."""
    conditioning, x = policy.encode([prompt]), initial
    for step, there in enumerate(policy.schedule.levels[1:]):
        prediction = policy.predict(x, step, conditioning)
        x = there.alpha * prediction.x0 + there.sigma * prediction.x1
    return x


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest deviation relative to the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-12))


def _first_order(policy: PipelinePolicy) -> Any:
    """A scheduler step without memory or noise: the fitted process, moved on at the last visit of each level."""
    fit = policy.capture.fit
    ends = {first - 1 for first in fit.first_index[1:]} | {policy.capture.num_iterations - 1}

    def answer(k: int, sample: Tensor, output: Tensor) -> Tensor:
        index = max(i for i, first in enumerate(fit.first_index) if first <= k)
        return first_order_step(fit, index, sample, output).to(sample.dtype) if k in ends else sample

    return answer


def _batch_error(policy: PipelinePolicy, prompts: tuple[Prompt, Prompt]) -> float:
    x = policy.initial_latents([11, 12])
    together = policy.predict(x, 0, policy.encode(prompts)).velocity
    apart = torch.cat([policy.predict(x[i : i + 1], 0, policy.encode([prompt])).velocity for i, prompt in enumerate(prompts)])
    return relative(together, apart)


def _mirrored(path: str, folder: Path) -> str:
    """Another condition image of the same size: this one upside down, as a file in ``folder``."""
    mirrored = folder / f"{len(list(folder.iterdir()))}.png"
    ImageOps.flip(Image.open(path).convert("RGB")).save(mirrored)
    return str(mirrored)


def _state(policy: PipelinePolicy, sample: Tensor) -> Tensor:
    return sample.reshape(1, *policy.latent_shape).float()


def _shown(policy: PipelinePolicy) -> dict[str, Any]:
    return {"output_type": policy.codec.output.shown} if policy.codec.output.shown else {}


def describe_capture(policy: PipelinePolicy, parity: str, latent: float, decode: float, batch: float) -> list[tuple[str, str]]:
    """The lines of the inspect table."""
    found, fit = policy.capture, policy.capture.fit
    rows = [
        ("pipeline", policy.call.name),
        ("latent", f"{list(policy.latent_shape)} {str(found.state_dtype).removeprefix('torch.')}"),
        (
            "process",
            f"{fit.process}, network predicts {fit.kind}, {fit.schedule.num_steps} steps, sigma "
            f"{fit.schedule.levels[0].sigma:.4g} -> {fit.schedule.levels[-1].sigma:.4g}",
        ),
    ]
    for number, site in enumerate(found.sites):
        where = (
            "not fed the state"
            if site.latent is None
            else (
                f"state -> {'.'.join(map(str, site.latent.path))}"
                + (" (list)" if site.latent.as_list else "")
                + ("" if all(g.covers for g in site.latent.gathers) else " beside condition channels")
                + (
                    ""
                    if all(g.identity for g in site.latent.gathers) or not all(g.covers for g in site.latent.gathers)
                    else " (rearranged)"
                )
            )
        )
        times = ", ".join(f"{'.'.join(map(str, t.path))} = {_affine(t)}" for t in site.times) or "no time argument"
        rows.append(
            (
                f"call {number}: {site.module}",
                f"{where}; {times}; {site.copies} row(s) per sample" + (f", {site.order}-major" if site.copies > 1 else ""),
            )
        )
    distinct = list(dict.fromkeys(f"{plan.combination.describe()} (calls {', '.join(map(str, plan.sites))})" for plan in found.plans))
    rows.append(("guidance", "; ".join(distinct[:3]) + (f"; {len(distinct) - 3} more over the steps" if len(distinct) > 3 else "")))
    scales = sorted({round(scale, 4) for plan in found.plans for scale in plan.scales})
    rows.append(("input scale", "1" if scales == [1.0] else f"{scales[0]:g} ... {scales[-1]:g} by step"))
    rows.append(("batching", "rows" if found.batched else f"one sample at a time ({found.batch_note})"))
    own = "the pipeline's own draw per seed" + ("" if policy.codec.noise_order is None else ", rearranged")
    rows.append(("initial noise", own if policy.codec.own_draw else "our draw per seed (the pipeline's generator draws conditions first)"))
    rows.append(("parity", f"latents {latent:.1e} ({parity}), decode {decode:.1e}, batch {batch:.1e}"))
    return rows


def _affine(slot: Any) -> str:
    slope, offset = float(slot.slope.flatten().double().abs().max() * slot.slope.flatten().sum().sign()), float(slot.offset.flatten()[-1])
    text = f"{slope:.6g} t" if abs(slope - 1) > 1e-9 else "t"
    return (
        text + (f" {offset:+.4g}" if abs(offset) > 1e-9 else "") + (f" per element {list(slot.slope.shape)}" if slot.slope.ndim > 1 else "")
    )
