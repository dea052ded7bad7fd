"""Observe a pipeline's own call and write down what its loop does, in a form that can be replayed with any dynamics.

The pipeline runs a few times with a denoiser and a scheduler that answer chosen values (no network is evaluated after the first
two steps), and what arrives where is read off:

    denoiser input   =  scale_k * state[index]   (+ condition channels, tokens or frames)        -> `LatentSlot`
    denoiser time    =  slope * timestep + offset, elementwise                                   -> `TimeSlot`
    model output     =  sum_c weight_kc * output_c[index]  (+ weight * state)                    -> `OutputSlot`, `StepPlan`

Arguments that stay the same in every step are conditioning; those that double with the batch are one per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from visalign.samplers.calls import PipelineCall
from visalign.samplers.combine import Combination, fit_combination
from visalign.samplers.observe import CaptureError, Observation, ObservedCall, ObservedStep, Observer, fill_like
from visalign.samplers.schedule import ScheduleFit, fit_schedule, trim
from visalign.samplers.slots import Gather, Order, Path, Rows, Unbatchable, decode_gather, describe, digits, find_rows, leaves, split_rows
from visalign.types import Prompt


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


@dataclass(frozen=True)
class StepPlan:
    """One step of the loop: which sites run, how the state is scaled for each, how their predictions combine."""

    sites: tuple[int, ...]
    scales: tuple[float, ...]
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

    @property
    def steps_to_encode(self) -> int:
        """How many loop iterations a prompt's encoding must watch to see every site once."""
        return max(site.first[0] for site in self.sites) + 1


def capture(observer: Observer, call: PipelineCall, prompt: Prompt) -> Capture:
    """Observe ``call`` for one probe prompt.

    Raises:
        CaptureError: something in the loop is neither a gather, nor affine in time, nor a known combination of predictions.
    """
    one = call.one(prompt)
    real = observer.run(one, stop_after=2)
    if len(real.steps) < 2 or not observer.denoisers:
        raise CaptureError(f"{call.name} took {len(real.steps)} scheduler step(s) and called {sorted(observer.denoisers) or 'no module'} in its loop; "
                           "capture needs at least num_inference_steps=2 and a denoiser among the pipeline's components")
    runs = _probe_runs(observer, one)
    base = runs.zeros
    fit = fit_schedule(next(iter(_stepping(observer))), [step.timestep for step in base.steps])
    sites, site_of = _find_sites(runs)
    sites, batched, note = _find_rows(observer, call, prompt, runs, sites, site_of)
    plans = tuple(_plan(runs, sites, site_of, k) for k in fit.first_index)
    sample = base.steps[0].sample
    lead = sample.shape[0]
    return Capture(tuple(sites), plans, fit, tuple(sample.shape[1:]) if lead == 1 else tuple(sample.shape), lead, sample.dtype,
                   batched, note, len(base.steps))


def _stepping(observer: Observer) -> list[Any]:
    """The scheduler that ran, first: the one whose timesteps were set."""
    return sorted(observer.schedulers.values(), key=lambda scheduler: getattr(scheduler, "num_inference_steps", None) is None)


@dataclass
class _Runs:
    """The probe runs at batch 1. In ``zeros`` every state is 0; in ``ones`` 1; ``state_digits`` code positions; and so for outputs."""

    zeros: Observation
    ones: Observation
    state_digits: list[Observation]
    output_digits: list[Observation]
    random: list[Observation]


def _probe_runs(observer: Observer, one: dict[str, Any]) -> _Runs:
    def run(state: Any, output: Any, stop: int | None) -> Observation:
        return observer.run(one, answer_state=lambda k, sample, output: state(sample).to(sample.dtype),
                            answer_output=lambda k, call: fill_like(call.output, output), stop_after=stop, freeze_encoders=True)

    def constant(value: float) -> Any:
        return lambda like: torch.full_like(like, value)

    def code(place: int) -> Any:
        def fill(like: Tensor) -> Tensor:
            rows = like.flatten(1) if like.ndim > 1 else like[None]
            coded = digits(rows.shape[1])
            digit = coded[place] if place < len(coded) else torch.ones(rows.shape[1])
            return digit.to(like).expand_as(rows).reshape(like.shape)
        return fill

    def whole(place: int) -> Any:
        return lambda like: digits(like.numel())[place].to(like).reshape(like.shape)

    def noise(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return lambda like: torch.randn(like.shape, generator=generator).to(like)

    zeros = run(constant(0.0), constant(1.0), None)
    num_steps = len(zeros.steps)
    _check_states(zeros)
    sample = zeros.steps[0].sample
    outputs = [_main(call.output) for step in zeros.steps for call in step.calls]
    longest = max((len(digits(leaf.numel() if as_list else leaf[0].numel())) for leaf_list, as_list in outputs for leaf in leaf_list[:1]), default=1)
    return _Runs(
        zeros=zeros,
        ones=run(constant(1.0), constant(1.0), num_steps),
        state_digits=[run(whole(place), constant(1.0), num_steps) for place in range(len(digits(sample.numel())))],
        output_digits=[run(constant(0.0), code(place), num_steps) for place in range(longest)],
        random=[run(noise(seed), noise(seed + 100), num_steps) for seed in (1, 2)])


def _main(output: Any) -> tuple[list[Tensor], bool]:
    """The part of a module's return value that holds predictions: (its tensors, whether they came as a list of rows)."""
    while not isinstance(output, Tensor):
        if isinstance(output, list | tuple) and len(output) > 0 and not (isinstance(output, list) and all(isinstance(o, Tensor) for o in output)):
            output = output[0]
        elif isinstance(output, list):
            return output, True
        elif hasattr(output, "to_tuple"):
            output = output.to_tuple()[0]
        else:
            return [], False
    return [output], False


def _check_states(seen: Observation) -> None:
    for k, (before, after) in enumerate(zip(seen.steps, seen.steps[1:], strict=False)):
        if after.sample.shape != before.returned.shape or not torch.equal(after.sample.float(), before.returned.float()):
            raise CaptureError(
                f"the pipeline changes its latents between scheduler steps {k} and {k + 1} (inpainting and latent blending do this): the next step's "
                f"sample {describe(after.sample)} is not what scheduler.step returned {describe(before.returned)}. Such a loop is not a "
                "sampler of one process; use the family's plain text- or image-conditioned pipeline")


def _find_sites(runs: _Runs) -> tuple[list[Site], dict[tuple[int, int], int]]:
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
            raise CaptureError(f"module {signature[0]!r} is called with these arguments in the first step only; run with more "
                               "num_inference_steps, or switch off the option that treats the first step differently")
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
                sites.append(Site(signature[0], (k, j), copies, "chunk", latent, times, {}, links, _find_output(runs, k, j), call.arguments))
            site_of[k, j] = same
    if not any(site.latent for site in sites):
        raise CaptureError(f"no argument of {sorted({site.module for site in sites})} follows the state given to scheduler.step; "
                           "the denoiser sees a state that visalign cannot set")
    return sites, site_of


def _find_latent(runs: _Runs, k: int, j: int) -> LatentSlot | None:
    """The argument of call (k, j) that depends on the state, and how."""
    def argument(seen: Observation) -> dict[Path, Tensor]:
        return {path: leaf for path, leaf in leaves(seen.steps[k].calls[j].arguments) if isinstance(leaf, Tensor)}

    zero, one = argument(runs.zeros), argument(runs.ones)
    paths = [path for path in zero if zero[path].is_floating_point() and not torch.equal(zero[path], one[path])
             and path not in _find_links(runs.zeros.steps[k], j)]
    if not paths:
        return None
    parents = {path[:-1] for path in paths}
    as_list = len(parents) == 1 and isinstance(paths[0][-1], int)
    if len(paths) > 1 and not as_list:
        raise CaptureError(f"{len(paths)} arguments of the denoiser follow the state ({', '.join('.'.join(map(str, p)) for p in paths)}); one was expected")
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
            raise CaptureError(f"argument {'.'.join(map(str, path))} {describe(one[path])} of {runs.zeros.steps[k].calls[j].module} mixes or weights elements of the "
                               "state instead of moving them; visalign needs input = scale * state[index]")
        gathers.append(gather)
    if not as_list:
        gathers = [Gather(row, bool(row.numel() == numel and torch.equal(row.flatten(), torch.arange(numel)))) for row in gathers[0].index.unbind(0)]
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
        if ((fitted - stacked).abs().max() <= (1e-2 if coarse else 1e-5) * stacked.abs().max()):
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


def _find_output(runs: _Runs, k: int, j: int) -> OutputSlot | None:
    """How a row of call (k, j)'s output becomes the prediction; ``None`` if it does not reach the scheduler."""
    step = runs.zeros.steps[k]
    answer = trim(step.model_output, step.sample).double()
    parts, as_list = _main(step.calls[j].output)
    if not parts:
        return None
    row_numel = parts[0].numel() if as_list else parts[0][0].numel()
    scale = answer.flatten()[answer.abs().flatten().argmax()]
    if scale == 0:
        return None
    coded = [trim(run.steps[k].model_output, step.sample).double() / scale for run in runs.output_digits]
    gather = decode_gather(coded[: len(digits(row_numel))], torch.ones_like(answer, dtype=torch.bool), row_numel)
    if gather is None or answer.numel() > row_numel * max(1, len(parts) if as_list else parts[0].shape[0]):
        return None
    return OutputSlot(gather, as_list)


def _find_rows(observer: Observer, call: PipelineCall, prompt: Prompt, runs: _Runs, sites: list[Site],
               site_of: dict[tuple[int, int], int]) -> tuple[list[Site], bool, str]:
    """Compare with a run at batch 2: which arguments hold rows per sample, and in what order."""
    def state(k: int, sample: Tensor, output: Tensor) -> Tensor:
        halves = torch.zeros_like(sample)
        halves[: sample.shape[0] // 2] = 1
        return halves

    note = ""
    for arguments in (call.batch([prompt, prompt], [0, 0]), call.repeat(prompt, [0, 0])):
        try:
            two = observer.run(arguments, answer_state=state, answer_output=lambda k, seen: seen.output,
                               stop_after=len(runs.zeros.steps))
            if two.steps[0].sample.shape[0] != 2 * runs.zeros.steps[0].sample.shape[0]:
                raise Unbatchable(f"two samples gave a state {describe(two.steps[0].sample)}")
            return [_batched_site(site, runs, two) for site in sites], True, ""
        except (Unbatchable, TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError) as error:
            note = f"{type(error).__name__}: {error}".split("\n")[0][:160]
    return sites, False, note


def _batched_site(site: Site, runs: _Runs, two: Observation) -> Site:
    k, j = site.first
    small, large = runs.zeros.steps[k].calls[j], two.steps[k].calls[j]
    if small.module != large.module or len(runs.zeros.steps[k].calls) != len(two.steps[k].calls):
        raise Unbatchable(f"step {k} makes other calls at batch 2 than at batch 1")
    rows = find_rows(small.arguments, large.arguments)
    if site.latent is None:
        return _with(site, rows=rows)
    held = rows.get(site.latent.path)
    if held is None or held.copies != len(site.latent.gathers):
        raise Unbatchable(f"the state argument does not grow with the batch ({describe(site.latent.path)})")
    order: Order = "chunk"
    if held.copies > 1:
        later = next(step.calls[j] for step in two.steps[1:] if len(step.calls) > j and step.calls[j].signature == large.signature)
        value: Any = later.arguments
        for key in site.latent.path:
            value = value[key]
        from_first = [bool((row[gather.index >= 0] != 0).any())
                      for row, gather in zip(split_rows(value, held), [g for g in site.latent.gathers for _ in range(2)], strict=True)]
        alternating, blocked = [True, False] * held.copies, [True] * held.copies + [False] * held.copies
        if from_first not in (alternating, blocked):
            raise Unbatchable(f"rows of two samples are interleaved in an unknown order {from_first}")
        order = "chunk" if from_first == alternating else "sample"
    return _with(site, rows=rows, order=order)


def _with(site: Site, **changes: Any) -> Site:
    return Site(**{**site.__dict__, **changes})


def _plan(runs: _Runs, sites: list[Site], site_of: dict[tuple[int, int], int], k: int) -> StepPlan:
    """Scales and guidance of step k, by least squares on two random runs."""
    indices = tuple(site_of[k, j] for j in range(len(runs.zeros.steps[k].calls)))
    scales: list[float] = []
    for j, index in enumerate(indices):
        latent = sites[index].latent
        scales.append(1.0 if latent is None else _scale(runs.random[0].steps[k], j, latent))
    predictions, answers, states = [], [], []
    for run in runs.random:
        step = run.steps[k]
        predictions.append([row for j, index in enumerate(indices) for row in output_rows(sites[index], step.calls[j])])
        answers.append(trim(step.model_output, step.sample))
        states.append(step.sample)
    return StepPlan(indices, tuple(scales), fit_combination(predictions, answers, states, k))


def output_rows(site: Site, call: ObservedCall) -> list[Tensor]:
    """The predictions in one observed call at batch 1, one per row, each in the state's shape."""
    if site.output is None:
        return []
    parts, as_list = _main(call.output)
    return [site.output.gather(row[None])[0] for row in (parts if as_list else parts[0].unbind(0))]


def batch_rows(site: Site, output: Any, batch: int) -> Tensor:
    """The predictions in a module's return value for a batch: (copies, batch, *state shape)."""
    assert site.output is not None
    parts, as_list = _main(output)
    rows = torch.stack(parts) if as_list else parts[0]
    predictions = site.output.gather(rows)
    copies = predictions.shape[0] // batch
    if site.order == "chunk":
        return predictions.reshape(copies, batch, *predictions.shape[1:])
    return predictions.reshape(batch, copies, *predictions.shape[1:]).transpose(0, 1)


def _scale(step: ObservedStep, j: int, latent: LatentSlot) -> float:
    """The factor between state and denoiser input at one step (``scale_model_input``)."""
    value: Any = step.calls[j].arguments
    for key in latent.path:
        value = value[key]
    row = value[0].double()
    gather = latent.gathers[0]
    given = gather(step.sample.reshape(1, -1))[0].double()
    used = gather.index >= 0
    factor = float((row[used] * given[used]).sum() / given[used].square().sum())
    return round(factor, 12) if abs(factor - 1) > 1e-6 else 1.0


def argument_tensors(call: ObservedCall) -> list[Tensor]:
    """All tensors a call was given, for checks and tables."""
    return [leaf for leaf in pytree.tree_leaves(call.arguments) if isinstance(leaf, Tensor)]
