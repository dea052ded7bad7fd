"""Observe a pipeline's own call and write down what its loop does, in a form that can be replayed with any dynamics.

The pipeline runs a few times with a denoiser and a scheduler that answer chosen values (`visalign.samplers.probes`); what arrives where
gives the loop's calls (`visalign.samplers.sites`), the process its scheduler samples (`visalign.samplers.schedule`) and the way it
combines predictions (`visalign.samplers.combine`). Arguments that double with the batch hold one set of rows per sample.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visalign.maths.combination import Combination
from visalign.samplers.calls import PipelineCall
from visalign.samplers.combine import fit_combination
from visalign.samplers.observe import CaptureError, Observation, ObservedStep, Observer
from visalign.samplers.probes import ProbeRuns, probe_runs
from visalign.samplers.schedule import ScheduleFit, fit_schedule, trim
from visalign.samplers.sites import LatentSlot, Site, find_sites, output_rows
from visalign.samplers.slots import Order, Unbatchable, describe, find_rows, split_rows
from visalign.types import Prompt


@dataclass(frozen=True)
class StepPlan:
    """One step of the loop: which sites run, how the state is scaled for each, how their predictions combine.

    ``row_sites`` names the site behind each of the combination's rows.
    """

    sites: tuple[int, ...]
    scales: tuple[float, ...]
    row_sites: tuple[int, ...]
    combination: Combination


@dataclass(frozen=True)
class Capture:
    """Everything observed of one pipeline under one set of call arguments."""

    sites: tuple[Site, ...]
    plans: tuple[StepPlan, ...]
    fit: ScheduleFit
    latent_shape: tuple[int, ...]
    state_lead: int
    state_dtype: torch.dtype
    batched: bool
    batch_note: str
    num_iterations: int
    scheduler: Any

    @property
    def steps_to_encode(self) -> int:
        """How many loop iterations a prompt's encoding must watch to see every site once."""
        return max(site.first[0] for site in self.sites) + 1


def capture(observer: Observer, call: PipelineCall, prompt: Prompt) -> Capture:
    """Observe ``call`` for one probe prompt.

    Raises:
        CaptureError: something in the loop is neither a gather, nor affine in time, nor a known combination of predictions.
    """
    if int(call.fixed.get("num_inference_steps", 2)) < 2:
        raise CaptureError(
            f"{call.name} with num_inference_steps={call.fixed['num_inference_steps']}: capture needs at least num_inference_steps=2, and "
            "policy gradients need a step before the deterministic last one"
        )
    real = observer.run(call.one(prompt), stop_after=2)
    if len(real.steps) >= 2 and not observer.denoisers:
        raise CaptureError(
            f"{call.name} steps its scheduler several times per call of its denoiser (several latent streams such as video with audio, one "
            "scheduler per frame, or a correction inside the step); visalign needs one scheduler.step per denoised state"
        )
    if len(real.steps) < 2:
        raise CaptureError(
            f"{call.name} took {len(real.steps)} scheduler step(s) and called {sorted(observer.denoisers) or 'no module'} in its loop; "
            "capture needs at least num_inference_steps=2 and a denoiser among the pipeline's components"
        )
    runs = probe_runs(observer, lambda: call.one(prompt))
    base = runs.zeros
    scheduler = copy.deepcopy(next(iter(_stepping(observer))))
    fit = fit_schedule(scheduler, [step.timestep for step in base.steps])
    sites, site_of = find_sites(runs)
    sites, batched, note = _find_rows(observer, call, prompt, runs, sites, site_of)
    plans = [_plan(runs, sites, site_of, k) for k in fit.first_index]
    heard = {site for plan in plans for site, weight in zip(plan.row_sites, plan.combination.weights, strict=True) if weight != 0}
    if any(site.output is not None and index not in heard for index, site in enumerate(sites)):
        sites = [site if index in heard else replace(site, output=None) for index, site in enumerate(sites)]
        plans = [_plan(runs, sites, site_of, k) for k in fit.first_index]
    sample = base.steps[0].sample
    lead = sample.shape[0]
    return Capture(
        tuple(sites),
        tuple(plans),
        fit,
        tuple(sample.shape[1:]) if lead == 1 else tuple(sample.shape),
        lead,
        sample.dtype,
        batched,
        note,
        len(base.steps),
        scheduler,
    )


def _stepping(observer: Observer) -> list[Any]:
    """The scheduler that ran, first: the one whose timesteps were set."""
    return sorted(observer.schedulers.values(), key=lambda scheduler: getattr(scheduler, "num_inference_steps", None) is None)


def _find_rows(
    observer: Observer, call: PipelineCall, prompt: Prompt, runs: ProbeRuns, sites: list[Site], site_of: dict[tuple[int, int], int]
) -> tuple[list[Site], bool, str]:
    """Compare with a run at batch 2: which arguments hold rows per sample, and in what order."""

    def state(k: int, sample: Tensor, output: Tensor) -> Tensor:
        halves = torch.zeros_like(sample)
        halves[: sample.shape[0] // 2] = 1
        return halves

    note = ""
    for ask in (call.batch, call.repeat_prompts):
        try:
            arguments = ask([prompt, prompt], [0, 0])
            two = observer.run(arguments, answer_state=state, answer_output=lambda k, seen: seen.output, stop_after=len(runs.zeros.steps))
            if two.steps[0].sample.shape[0] != 2 * runs.zeros.steps[0].sample.shape[0]:
                raise Unbatchable(f"two samples gave a state {describe(two.steps[0].sample)}")
            return [_batched_site(site, runs, two) for site in sites], True, ""
        except (Unbatchable, TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError) as error:
            note = f"{type(error).__name__}: {error}".split("\n")[0][:160]
    return sites, False, note


def _batched_site(site: Site, runs: ProbeRuns, two: Observation) -> Site:
    k, j = site.first
    small, large = runs.zeros.steps[k].calls[j], two.steps[k].calls[j]
    if small.module != large.module or len(runs.zeros.steps[k].calls) != len(two.steps[k].calls):
        raise Unbatchable(f"step {k} makes other calls at batch 2 than at batch 1")
    rows = find_rows(small.arguments, large.arguments)
    if site.latent is None:
        return replace(site, rows=rows)
    held = rows.get(site.latent.path)
    if held is None or held.copies != len(site.latent.gathers):
        raise Unbatchable(f"the state argument does not grow with the batch ({describe(site.latent.path)})")
    order: Order = "chunk"
    if held.copies > 1:
        later = next(step.calls[j] for step in two.steps[1:] if len(step.calls) > j and step.calls[j].signature == large.signature)
        value: Any = later.arguments
        for key in site.latent.path:
            value = value[key]
        from_first = [
            bool((row[gather.index >= 0] != 0).any())
            for row, gather in zip(split_rows(value, held), [g for g in site.latent.gathers for _ in range(2)], strict=True)
        ]
        alternating, blocked = [True, False] * held.copies, [True] * held.copies + [False] * held.copies
        if from_first not in (alternating, blocked):
            raise Unbatchable(f"rows of two samples are interleaved in an unknown order {from_first}")
        order = "chunk" if from_first == alternating else "sample"
    return replace(site, rows=rows, order=order)


def _plan(runs: ProbeRuns, sites: list[Site], site_of: dict[tuple[int, int], int], k: int) -> StepPlan:
    """Scales and guidance of step k, by least squares on two random runs."""
    indices = tuple(site_of[k, j] for j in range(len(runs.zeros.steps[k].calls)))
    scales: list[float] = []
    for j, index in enumerate(indices):
        latent = sites[index].latent
        scales.append(1.0 if latent is None else _scale(runs.random[0].steps[k], j, latent))
    rows_of = [[output_rows(sites[index], runs.random[0].steps[k].calls[j]) for j, index in enumerate(indices)]]
    rows_of.append([output_rows(sites[index], runs.random[1].steps[k].calls[j]) for j, index in enumerate(indices)])
    row_sites = tuple(index for index, rows in zip(indices, rows_of[0], strict=True) for _ in rows)
    if not row_sites:
        raise CaptureError(
            f"step {k}: what {', '.join(sorted({sites[i].module for i in indices}))} returns does not reach scheduler.step by moving "
            "elements; the pipeline converts its predictions nonlinearly, which visalign cannot replay"
        )
    predictions = [[row for rows in one for row in rows] for one in rows_of]
    steps = [run.steps[k] for run in runs.random]
    answers, states = [trim(step.model_output, step.sample) for step in steps], [step.sample for step in steps]
    return StepPlan(indices, tuple(scales), row_sites, fit_combination(predictions, answers, states, k))


def _scale(step: ObservedStep, j: int, latent: LatentSlot) -> float:
    """The factor between state and denoiser input at one step (``scale_model_input``)."""
    value: Any = step.calls[j].arguments
    for key in latent.path:
        value = value[key]
    row = value[0].double()
    gather = latent.gathers[0]
    given = gather(step.sample.reshape(1, -1))[0].double()
    used = gather.index >= 0
    # A cast to the module's dtype is no factor, though the projection of its rounding is not exactly 1.
    if torch.equal(row[used], given[used].to(value[0].dtype).double()):
        return 1.0
    factor = float((row[used] * given[used]).sum() / given[used].square().sum())
    return round(factor, 12) if abs(factor - 1) > 1e-6 else 1.0
