"""Sites: the calls a pipeline's loop makes, and where state, time and prediction sit in each.

denoiser input   =  scale_k * state[index]   (+ condition channels, tokens or frames)        -> `LatentSlot`
denoiser time    =  slope * timestep + offset, elementwise                                   -> `TimeSlot`
prediction       =  output[index]                                                            -> `OutputSlot`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.samplers.observe import CaptureError, Observation, ObservedCall, ObservedStep
from visalign.samplers.probes import ProbeRuns, main_output
from visalign.samplers.schedule import trim
from visalign.samplers.slots import Gather, Order, Path, Rows, decode_gather, describe, digits, leaves


@dataclass(frozen=True)
class LatentSlot:
    """The argument that carries the state: one gather per row of a sample, cast to the argument's dtype."""

    path: Path
    gathers: tuple[Gather, ...]
    as_list: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class TimeSlot:
    """An argument that is affine in the scheduler's timestep, elementwise; ``slope`` and ``offset`` as seen at batch 1, float64."""

    path: Path
    slope: Tensor
    offset: Tensor
    dtype: torch.dtype | None

    def value(self, timestep: float) -> Tensor | float:
        """The argument at batch 1 for one timestep; a plain number where the pipeline passes one."""
        value = self.slope * timestep + self.offset
        return float(value) if self.dtype is None else value.to(self.dtype)


@dataclass(frozen=True)
class OutputSlot:
    """Where the prediction sits in what a module returns: rows of one tensor or list, and the gather from a row to the state's shape."""

    gather: Gather
    as_list: bool


@dataclass(frozen=True)
class Site:
    """One call the loop makes: the module, where state and time enter, what is fed from earlier calls, where the prediction leaves.

    Attributes:
        first: (step, call) at which this call was first observed; conditioning is recorded there.
        rows: arguments that hold one set of rows per sample; ``None`` when the pipeline cannot be batched.
        links: arguments that are outputs of an earlier call of the same step: path -> (call position, output tensor position).
        template: the arguments at batch 1, with conditioning of the probe prompt still in place.
    """

    module: str
    first: tuple[int, int]
    copies: int
    order: Order
    latent: LatentSlot | None
    times: tuple[TimeSlot, ...]
    rows: dict[Path, Rows]
    links: dict[Path, tuple[int, int]]
    output: OutputSlot | None
    template: dict[str, Any]


def find_sites(runs: ProbeRuns) -> tuple[list[Site], dict[tuple[int, int], int]]:
    """Group the loop's calls into sites: same arguments apart from state and time."""
    steps = runs.zeros.steps
    lanes: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for k, step in enumerate(steps):
        occurrences: dict[Any, int] = {}
        for j, call in enumerate(step.calls):
            ordinal = occurrences.setdefault(call.signature, 0)
            occurrences[call.signature] += 1
            lanes.setdefault((call.signature, ordinal), []).append((k, j))
    sites: list[Site] = []
    site_of: dict[tuple[int, int], int] = {}
    for (signature, _), visits in lanes.items():
        controlled = [(k, j) for k, j in visits if k > 0]
        if not controlled:
            raise CaptureError(
                f"module {signature[0]!r} is called with these arguments in the first step only; run with more "
                "num_inference_steps, or switch off the option that treats the first step differently"
            )
        latent = _find_latent(runs, *controlled[0])
        times = _find_times(steps, visits, latent)
        moving = {slot.path for slot in times} | ({latent.path} if latent else set())
        variants: list[int] = []
        for k, j in visits:
            call = steps[k].calls[j]
            same = next((index for index in variants if _same_arguments(sites[index].template, call.arguments, moving)), None)
            if same is None:
                same = len(sites)
                variants.append(same)
                links = _find_links(steps[k], j)
                copies = len(latent.gathers) if latent else 1
                sites.append(
                    Site(signature[0], (k, j), copies, "chunk", latent, times, {}, links, _find_output(runs, k, j), call.arguments)
                )
            site_of[k, j] = same
    if not any(site.latent for site in sites):
        raise CaptureError(
            f"no argument of {sorted({site.module for site in sites})} follows the state given to scheduler.step; "
            "the denoiser sees a state that visalign cannot set"
        )
    return sites, site_of


def _find_latent(runs: ProbeRuns, k: int, j: int) -> LatentSlot | None:
    """The argument of call (k, j) that depends on the state, and how."""

    def argument(seen: Observation) -> dict[Path, Tensor]:
        return {path: leaf for path, leaf in leaves(seen.steps[k].calls[j].arguments) if isinstance(leaf, Tensor)}

    zero, one = argument(runs.zeros), argument(runs.ones)
    paths = [
        path
        for path in zero
        if zero[path].is_floating_point() and not torch.equal(zero[path], one[path]) and path not in _find_links(runs.zeros.steps[k], j)
    ]
    if not paths:
        return None
    parents = {path[:-1] for path in paths}
    as_list = len(parents) == 1 and isinstance(paths[0][-1], int)
    if len(paths) > 1 and not as_list:
        raise CaptureError(
            f"{len(paths)} arguments of the denoiser follow the state ({', '.join('.'.join(map(str, p)) for p in paths)}); one was expected"
        )
    gathers: list[Gather] = []
    numel = runs.zeros.steps[k].sample.numel()
    for path in paths:
        difference = one[path].double() - zero[path].double()
        dependent = difference != 0
        scale = difference[dependent].median()
        coded = [(argument(run)[path].double() - zero[path].double()) / scale for run in runs.state_digits]
        uneven = ((difference[dependent] - scale).abs() > 0.02 * scale.abs()).any()
        gather = None if uneven else decode_gather(coded, dependent, numel)
        if gather is None:
            raise CaptureError(
                f"argument {'.'.join(map(str, path))} {describe(one[path])} of {runs.zeros.steps[k].calls[j].module} mixes or weights "
                "elements of the state instead of moving them; visalign needs input = scale * state[index]"
            )
        gathers.append(gather)
    if not as_list:
        gathers = [
            Gather(row, bool(row.numel() == numel and torch.equal(row.flatten(), torch.arange(numel))))
            for row in gathers[0].index.unbind(0)
        ]
    return LatentSlot(paths[0][:-1] if as_list else paths[0], tuple(gathers), as_list, one[paths[0]].dtype)


def _find_times(steps: Sequence[ObservedStep], visits: Sequence[tuple[int, int]], latent: LatentSlot | None) -> tuple[TimeSlot, ...]:
    """Arguments that vary from step to step and are affine in the scheduler's timestep."""
    if len(visits) < 2:
        return ()
    found: list[TimeSlot] = []
    series: dict[Path, list[Any]] = {}
    for k, j in visits:
        for path, leaf in leaves(steps[k].calls[j].arguments):
            if latent is None or path[: len(latent.path)] != latent.path:
                series.setdefault(path, []).append(leaf)
    t = torch.tensor([steps[k].timestep for k, _ in visits], dtype=torch.float64)
    for path, values in series.items():
        if len(values) != len(visits) or not all(isinstance(v, Tensor) or type(v) is float or type(v) is int for v in values):
            continue
        stacked = torch.stack([torch.as_tensor(v).detach().double().cpu() for v in values])
        if (stacked == stacked[0]).all():
            continue
        first, last = int(t.argmax()), int(t.argmin())
        slope = (stacked[first] - stacked[last]) / (t[first] - t[last]) if t[first] != t[last] else torch.zeros_like(stacked[0])
        offset = stacked[first] - slope * t[first]
        fitted = slope * t.view(-1, *[1] * slope.ndim) + offset
        tensor = values[0] if isinstance(values[0], Tensor) else None
        coarse = tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)
        if (fitted - stacked).abs().max() <= (1e-2 if coarse else 1e-5) * stacked.abs().max():
            exact = slope.abs() < 1e-12
            found.append(TimeSlot(path, torch.where(exact, 0.0, slope), offset, None if tensor is None else tensor.dtype))
    return tuple(found)


def _same_arguments(one: Any, two: Any, moving: set[Path]) -> bool:
    """Whether two calls agree in everything but the state and time arguments."""
    for (path, a), (_, b) in zip(leaves(one), leaves(two), strict=True):
        if any(path[: len(skip)] == skip for skip in moving):
            continue
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        if isinstance(a, Tensor):
            if a is not b and not torch.equal(a, b):
                return False
        elif isinstance(a, int | float | str | bool) and a != b:
            return False
    return True


def _find_links(step: ObservedStep, j: int) -> dict[Path, tuple[int, int]]:
    """Arguments that are, by identity, tensors an earlier call of this step returned (ControlNet residuals)."""
    produced = {id(tensor): (i, position) for i in range(j) for position, tensor in enumerate(step.calls[i].output_tensors())}
    return {path: produced[id(leaf)] for path, leaf in leaves(step.calls[j].arguments) if isinstance(leaf, Tensor) and id(leaf) in produced}


def _find_output(runs: ProbeRuns, k: int, j: int) -> OutputSlot | None:
    """How a row of call (k, j)'s output becomes the prediction; ``None`` if it does not reach the scheduler."""
    step = runs.zeros.steps[k]
    parts, as_list = main_output(step.calls[j].output)
    if not parts:
        return None
    row_numel = parts[0].numel() if as_list else parts[0][0].numel()
    answers = [trim(run.steps[k].model_output, step.sample).double() for run in runs.output_digits[: len(digits(row_numel))]]
    # What does not come from this output (a state that the pipeline mixes in) cancels in the difference to the doubled first digit.
    double = trim(runs.output_double.steps[k].model_output, step.sample).double()
    first = double - answers[0]
    # The smallest digit is 1 and always present, so it shows the scale: the sum of the guidance weights, nearly always 1 or -1.
    smallest = first.flatten()[first.abs().flatten().argmin()]
    if smallest == 0 or not torch.isfinite(smallest):
        return None
    coded = [first / smallest] + [(answer - double + 2 * first) / smallest for answer in answers[1:]]
    gather = decode_gather(coded, torch.ones_like(first, dtype=torch.bool), row_numel)
    if gather is None:
        return None
    return OutputSlot(gather, as_list)


def output_rows(site: Site, call: ObservedCall) -> list[Tensor]:
    """The predictions in one observed call at batch 1, one per row, each in the state's shape."""
    if site.output is None:
        return []
    parts, as_list = main_output(call.output)
    return [site.output.gather(row[None])[0] for row in (parts if as_list else parts[0].unbind(0))]


def batch_rows(site: Site, output: Any, batch: int) -> Tensor:
    """The predictions in a module's return value for a batch: (copies, batch, *state shape)."""
    assert site.output is not None
    parts, as_list = main_output(output)
    rows = torch.stack(parts) if as_list else parts[0]
    predictions = site.output.gather(rows)
    copies = predictions.shape[0] // batch
    if site.order == "chunk":
        return predictions.reshape(copies, batch, *predictions.shape[1:])
    return predictions.reshape(batch, copies, *predictions.shape[1:]).transpose(0, 1)
