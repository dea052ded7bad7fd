"""Which process a scheduler samples and what its network predicts, found by probing the scheduler's own step.

Candidates (noise levels x prediction kinds) are derived from the scheduler's ``sigmas`` or ``alphas_cumprod``. The right one is the one
whose deterministic transition, or whose x0 prediction, equals what the scheduler computes from the same state and output.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visalign.maths.process import to_prediction
from visalign.samplers.observe import CaptureError
from visalign.types import NoiseLevel, PredictionKind, Schedule

TOLERANCE = 2e-4
_KINDS: tuple[PredictionKind, ...] = ("flow", "epsilon", "v_prediction", "sample", "edm")
_DECLARED: dict[str, tuple[PredictionKind, ...]] = {
    "epsilon": ("epsilon", "edm"),
    "v_prediction": ("v_prediction",),
    "sample": ("sample",),
    "flow_prediction": ("flow",),
}


@dataclass(frozen=True)
class ScheduleFit:
    """The process a scheduler was found to sample.

    Attributes:
        schedule: levels and timesteps of the pipeline's own run, duplicates (Heun, PNDM) removed.
        first_index: for each step, the index of the pipeline's loop iteration that first visits it.
        kind, sigma_data: how the network's output is to be read.
        process: "flow", "VP" or "sigma" (alpha = 1).
        first_order: a run of the scheduler is our chain of deterministic steps, so that parity with it is exact.
        error: the largest deviation that was accepted, absolute, for unit inputs.
    """

    schedule: Schedule
    first_index: tuple[int, ...]
    kind: PredictionKind
    sigma_data: float
    process: str
    first_order: bool
    error: float


def fit_schedule(scheduler: Any, timesteps: Sequence[float]) -> ScheduleFit:
    """Find the process behind ``scheduler`` as a pipeline left it after a run that visited ``timesteps``.

    Raises:
        CaptureError: the scheduler clips its x0 prediction, or no candidate reproduces it (the message says how far each was off).
    """
    first_index = [i for i, t in enumerate(timesteps) if i == 0 or t != timesteps[i - 1]]
    unique = [timesteps[i] for i in first_index]
    probes = [_probe(scheduler, t) for t in unique]
    if not _close(probes[0], _probe(scheduler, unique[0], amplitude=1e3)):
        raise CaptureError(
            f"{type(scheduler).__name__} clips its x0 prediction (clip_sample or thresholding), which other dynamics would not; set "
            "pipe.scheduler.register_to_config(clip_sample=False, thresholding=False), as latent models do, or use this pipeline as it is"
        )
    sigma_data = float(scheduler.config.get("sigma_data") or 0.5)
    kinds = _DECLARED.get(str(scheduler.config.get("prediction_type")), _KINDS)
    accepted: list[ScheduleFit] = []
    tried: list[tuple[float, str]] = []
    for (process, levels), kind in itertools.product(_level_candidates(scheduler, unique), kinds):
        step_errors, x0_errors = [], []
        for i, probe in enumerate(probes):
            expected = _expected(levels[i], levels[i + 1], kind, sigma_data)
            if expected is None:
                step_errors.append(float("inf"))
                x0_errors.append(float("inf"))
                continue
            step_errors.append(max(abs(a - b) for a, b in zip(expected[:2], probe.step, strict=True)) if probe.step else float("inf"))
            x0_errors.append(
                max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(expected[2:], probe.x0, strict=True)) if probe.x0 else float("inf")
            )
        first_order = max(step_errors) < TOLERANCE
        error = max(step_errors) if first_order else max(x0_errors)
        schedule = Schedule(tuple(levels), tuple(unique))
        fit = ScheduleFit(schedule, tuple(first_index), kind, sigma_data, process, first_order, error)
        if error < TOLERANCE:
            accepted.append(fit)
        tried.append((min(error, max(step_errors)), f"{process}/{kind}"))
    if accepted:
        best = next((fit for fit in accepted if fit.first_order), accepted[0])
        return replace(best, first_order=best.first_order and _memoryless(scheduler, best, len(timesteps)))
    close = ", ".join(f"{name} off by {error:.2g}" for error, name in sorted(tried)[:4]) or "no sigmas or alphas_cumprod to read"
    raise CaptureError(
        f"{type(scheduler).__name__} (prediction_type {scheduler.config.get('prediction_type', 'unset')!r}) samples none of the known "
        f"processes ({close}). Give the pipeline a scheduler for the same model with a first-order step, for example "
        "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config) or FlowMatchEulerDiscreteScheduler.from_config(...)"
    )


def first_order_step(fit: ScheduleFit, index: int, sample: Tensor, output: Tensor) -> Tensor:
    """One deterministic step of the fitted process from loop state and model output: ``alpha' x0 + sigma' x1``."""
    here, there = fit.schedule.levels[index], fit.schedule.levels[index + 1]
    prediction = to_prediction(trim(output, sample), sample, here.alpha, here.sigma, fit.kind, fit.sigma_data)
    return there.alpha * prediction.x0 + there.sigma * prediction.x1


def trim(output: Tensor, sample: Tensor) -> Tensor:
    """Drop learned-variance channels: a model output with twice the sample's channels holds the prediction in its first half."""
    if output.shape != sample.shape and output.ndim == sample.ndim and output.shape[1] == 2 * sample.shape[1]:
        return output[:, : sample.shape[1]]
    return output


@dataclass(frozen=True)
class _Probe:
    """A scheduler step's linear coefficients: next state and x0 prediction per unit of state and per unit of output."""

    step: tuple[float, float] | None
    x0: tuple[float, float] | None


def _expected(here: NoiseLevel, there: NoiseLevel, kind: PredictionKind, sigma_data: float) -> tuple[float, float, float, float] | None:
    """(state -> next, output -> next, state -> x0, output -> x0), or ``None`` where this kind is undefined."""
    x, m = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    try:
        prediction = to_prediction(m, x, here.alpha, here.sigma, kind, sigma_data)
    except ValueError:
        return None
    following = there.alpha * prediction.x0 + there.sigma * prediction.x1
    return (*following.tolist(), *prediction.x0.tolist())


def _level_candidates(scheduler: Any, timesteps: Sequence[float]) -> Iterator[tuple[str, list[NoiseLevel]]]:
    """Every reading of the scheduler's tables as T + 1 noise levels."""
    all_timesteps = [float(t) for t in scheduler.timesteps]
    where = [_last_index(all_timesteps, t) for t in timesteps]
    table = getattr(scheduler, "sigmas", None)
    if isinstance(table, Tensor) and len(table) >= len(all_timesteps):
        own = [float(s) for s in table] + [0.0]
        sigmas = [own[i] for i in (*where, where[-1] + 1)]
        if max(sigmas) <= 1.0 + 1e-6:
            yield "flow", [NoiseLevel(1 - s, s) for s in sigmas]
        yield "sigma", [NoiseLevel(1.0, s) for s in sigmas]
        yield "VP", [NoiseLevel((1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5) for s in sigmas]
    cumprod = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(cumprod, Tensor):
        last = timesteps[-1] - scheduler.config.num_train_timesteps // max(int(scheduler.num_inference_steps or len(timesteps)), 1)
        final = getattr(scheduler, "final_alpha_cumprod", None)
        ends = dict.fromkeys([1.0, *([float(final)] if final is not None else []), float(cumprod[int(last)]) if last >= 0 else 1.0])
        bars = [float(cumprod[int(t)]) for t in timesteps if 0 <= t < len(cumprod)]
        if len(bars) == len(timesteps):
            for end in ends:
                yield "VP", [NoiseLevel(bar**0.5, (1 - bar) ** 0.5) for bar in (*bars, end)]


def _last_index(timesteps: Sequence[float], timestep: float) -> int:
    """Second-order schedulers visit a level twice; the last visit is where a step from it starts afresh."""
    return len(timesteps) - 1 - list(reversed(timesteps)).index(timestep)


def _close(one: _Probe, two: _Probe) -> bool:
    """Whether a scheduler responds the same to small and large inputs, that is, linearly."""
    pairs = [(a, b) for first, second in ((one.step, two.step), (one.x0, two.x0)) for a, b in zip(first or (), second or (), strict=True)]
    return all(abs(a - b) <= TOLERANCE * max(1.0, abs(a)) for a, b in pairs)


def _fresh(scheduler: Any, timestep: float) -> Any:
    """A copy of the scheduler without memory of earlier steps, about to step from ``timestep``."""
    fresh = copy.deepcopy(scheduler)
    for name, value in (("_step_index", None), ("lower_order_nums", 0), ("counter", 0), ("ets", [])):
        if hasattr(fresh, name):
            setattr(fresh, name, value)
    for name in ("model_outputs", "derivatives"):
        if isinstance(getattr(fresh, name, None), list):
            setattr(fresh, name, [None] * len(fresh.model_outputs) if name == "model_outputs" else [])
    for name in ("last_sample", "sample", "prev_derivative", "dt", "cur_sample"):
        if name in fresh.__dict__:
            setattr(fresh, name, None)
    if hasattr(fresh, "_begin_index"):
        fresh._begin_index = _last_index([float(t) for t in fresh.timesteps], timestep)
    return fresh


def _memoryless(scheduler: Any, fit: ScheduleFit, num_iterations: int) -> bool:
    """Whether a whole run of the scheduler on random inputs is our chain of deterministic steps."""
    if num_iterations != fit.schedule.num_steps:
        return False
    generator = torch.Generator().manual_seed(0)
    fresh = _fresh(scheduler, fit.schedule.timesteps[0])
    x = 1e-2 * torch.randn(1, 4, 8, 8, generator=generator)
    for index, timestep in enumerate(fit.schedule.timesteps):
        m = 1e-2 * torch.randn(x.shape, generator=generator)
        t = next(t for t in fresh.timesteps if float(t) == timestep)
        ours = first_order_step(fit, index, x, m)
        theirs = fresh.step(m, t, x, return_dict=False)[0]
        if (ours - theirs).abs().max() > TOLERANCE * theirs.abs().max():
            return False
        x = theirs
    return True


def _probe(scheduler: Any, timestep: float, amplitude: float = 1e-2) -> _Probe:
    """Linear response of ``scheduler.step`` at one timestep, measured on a fresh copy in its first-order state."""

    def respond(x: float, m: float, seed: int = 0) -> tuple[float, float | None]:
        fresh = _fresh(scheduler, timestep)
        t = next(t for t in fresh.timesteps if float(t) == timestep)
        state, output = torch.full((1, 4, 8, 8), x * amplitude), torch.full((1, 4, 8, 8), m * amplitude)
        if str(fresh.config.get("variance_type")).startswith("learned"):
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        parameters = inspect.signature(fresh.step).parameters
        more: dict[str, Any] = {name: None for name in ("old_pred_original_sample", "timestep_back") if name in parameters}
        if "return_dict" in parameters:
            more["return_dict"] = True
        if "eta" in parameters:
            more["eta"] = 0.0
        if "generator" in parameters:
            more["generator"] = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        out = fresh.step(model_output=output, timestep=t, sample=state, **more)
        following = out[0] if isinstance(out, tuple) else out.prev_sample
        x0 = None if isinstance(out, tuple) else getattr(out, "pred_original_sample", getattr(out, "denoised", None))
        if isinstance(out, tuple) and "old_pred_original_sample" in parameters:
            x0 = out[1]
        if x0 is None and hasattr(fresh, "convert_model_output") and "sample" in inspect.signature(fresh.convert_model_output).parameters:
            converted = copy.deepcopy(fresh)
            converted._step_index = fresh.step_index - 1 if getattr(fresh, "step_index", None) else getattr(fresh, "step_index", None)
            x0 = converted.convert_model_output(output, sample=state)
        return float(following.flatten()[0]) / amplitude, None if x0 is None else float(x0.flatten()[0]) / amplitude

    try:
        with torch.random.fork_rng(devices=[]):
            (base, base_x0), (state, state_x0), (output, output_x0) = respond(0, 0), respond(1, 0), respond(0, 1)
            noisy = abs(respond(0, 0, seed=1)[0] - base) > 1e-9
    except (TypeError, ValueError, AttributeError, IndexError, AssertionError, StopIteration):
        return _Probe(None, None)
    step = None if noisy else (state - base, output - base)
    x0 = None if base_x0 is None or state_x0 is None or output_x0 is None else (state_x0 - base_x0, output_x0 - base_x0)
    return _Probe(step, x0)
