"""The probe runs: a pipeline's own call with a denoiser and a scheduler that answer chosen values.

No network is evaluated: outputs are filled into the structure the real denoiser returned once. Digit runs code positions, see
`visalign.samplers.slots.digits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.samplers.observe import CaptureError, Observation, Observer, fill_like
from visalign.samplers.slots import describe, digits

Fill = Callable[[Tensor], Tensor]


@dataclass
class ProbeRuns:
    """The probe runs at batch 1. In ``zeros`` every state is 0, in ``ones`` 1; the digit runs code positions; two are random."""

    zeros: Observation
    ones: Observation
    state_digits: list[Observation]
    output_digits: list[Observation]
    output_double: Observation
    random: list[Observation]


def probe_runs(observer: Observer, one: Callable[[], dict[str, Any]]) -> ProbeRuns:
    """Run the pipeline's call with every pair of chosen states and outputs that the inference needs.

    Raises:
        CaptureError: the pipeline changes its state between scheduler steps.
    """

    def run(state: Fill, output: Fill, stop: int | None) -> Observation:
        return observer.run(
            one(),  # anew each time: a generator among the arguments draws condition latents and must not move on
            answer_state=lambda k, sample, model_output: state(sample).to(sample.dtype),
            answer_output=lambda k, call: fill_like(call.output, _by_row(call.output, output)),
            stop_after=stop,
            freeze_encoders=True,
        )

    known: set[str] = set()
    while True:  # a denoiser that takes over late in the loop is known only after it was called once
        zeros = run(_constant(0.0), _same_rows(0), None)
        if known == observer.denoisers:
            break
        known = set(observer.denoisers)
    num_steps = len(zeros.steps)
    random = [run(_noise(seed), _noise(seed + 100), num_steps) for seed in (1, 2)]
    _check_states(random[0])
    sample = zeros.steps[0].sample
    row_sizes = [
        parts[0].numel() if as_list else parts[0][0].numel()
        for step in zeros.steps
        for call in step.calls
        for parts, as_list in [main_output(call.output)]
        if parts
    ]
    return ProbeRuns(
        zeros=zeros,
        ones=run(_constant(1.0), _same_rows(0), num_steps),
        state_digits=[run(_state_digit(place), _same_rows(0), num_steps) for place in range(len(digits(sample.numel())))],
        output_digits=[run(_constant(0.0), _row_digit(place), num_steps) for place in range(len(digits(max(row_sizes, default=1))))],
        output_double=run(_constant(0.0), lambda like: 2 * _row_digit(0)(like), num_steps),
        random=random,
    )


def _constant(value: float) -> Fill:
    return lambda like: torch.full_like(like, value)


def _state_digit(place: int) -> Fill:
    return lambda like: digits(like.numel())[place].to(like).reshape(like.shape)


def _noise(seed: int) -> Fill:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator).to(like)


def _by_row(output: Any, fill: Fill) -> Fill:
    """A fill for tensors whose leading axis counts rows, applied to an output whose rows are a list of tensors."""
    return (lambda like: fill(like[None])[0]) if main_output(output)[1] else fill


def _rows(like: Tensor) -> Tensor:
    """A tensor as (rows, elements); scalars and vectors are one row."""
    return like.flatten(1) if like.ndim > 1 else like[None]


def _same_rows(seed: int) -> Fill:
    """Noise that is equal in every row: guidance of any kind then returns the row itself, and no norm or deviation is zero."""

    def fill(like: Tensor) -> Tensor:
        rows = _rows(like)
        return torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed)).to(like).expand_as(rows).reshape(like.shape)

    return fill


def _row_digit(place: int) -> Fill:
    """One digit of the position inside a row, equal in every row."""

    def fill(like: Tensor) -> Tensor:
        rows = _rows(like)
        coded = digits(rows.shape[1])
        return coded[place % len(coded)].to(like).expand_as(rows).reshape(like.shape)

    return fill


def main_output(output: Any) -> tuple[list[Tensor], bool]:
    """The part of a module's return value that holds predictions: (its tensors, whether they came as a list of rows)."""
    while not isinstance(output, Tensor):
        if isinstance(output, list) and output and all(isinstance(part, Tensor) and part.shape == output[0].shape for part in output):
            return output, True
        if isinstance(output, list | tuple) and output:
            output = output[0]
        elif hasattr(output, "to_tuple"):
            output = output.to_tuple()
        else:
            return [], False
    return [output], False


def _check_states(seen: Observation) -> None:
    for k, (before, after) in enumerate(zip(seen.steps, seen.steps[1:], strict=False)):
        if after.sample.shape != before.returned.shape or not torch.equal(after.sample.float(), before.returned.float()):
            raise CaptureError(
                f"the pipeline changes its latents between scheduler steps {k} and {k + 1} (inpainting and latent blending do this): the "
                f"next step's sample {describe(after.sample)} is not what scheduler.step returned {describe(before.returned)}. "
                "Such a loop is not a sampler of one process; use the family's plain text- or image-conditioned pipeline"
            )
