"""The probe runs: a pipeline's own call with a denoiser and a scheduler that answer chosen values.

No network is evaluated: outputs are filled into the structure the real denoiser returned once. In ``zeros`` every state is 0 and every
output 1; in ``ones`` both are 1; the digit runs code positions (`visalign.samplers.slots.digits`); two runs are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visalign.samplers.observe import CaptureError, Observation, Observer, fill_like
from visalign.samplers.slots import describe, digits


@dataclass
class ProbeRuns:
    """The probe runs at batch 1. In ``zeros`` every state is 0; in ``ones`` 1; ``state_digits`` code positions; and so for outputs."""

    zeros: Observation
    ones: Observation
    state_digits: list[Observation]
    output_digits: list[Observation]
    random: list[Observation]


def probe_runs(observer: Observer, one: dict[str, Any]) -> ProbeRuns:
    def run(state: Any, output: Any, stop: int | None) -> Observation:
        return observer.run(
            one,
            answer_state=lambda k, sample, output: state(sample).to(sample.dtype),
            answer_output=lambda k, call: fill_like(call.output, output),
            stop_after=stop,
            freeze_encoders=True,
        )

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
    outputs = [main_output(call.output) for step in zeros.steps for call in step.calls]
    longest = max(
        (len(digits(leaf.numel() if as_list else leaf[0].numel())) for leaf_list, as_list in outputs for leaf in leaf_list[:1]), default=1
    )
    return ProbeRuns(
        zeros=zeros,
        ones=run(constant(1.0), constant(1.0), num_steps),
        state_digits=[run(whole(place), constant(1.0), num_steps) for place in range(len(digits(sample.numel())))],
        output_digits=[run(constant(0.0), code(place), num_steps) for place in range(longest)],
        random=[run(noise(seed), noise(seed + 100), num_steps) for seed in (1, 2)],
    )


def main_output(output: Any) -> tuple[list[Tensor], bool]:
    """The part of a module's return value that holds predictions: (its tensors, whether they came as a list of rows)."""
    while not isinstance(output, Tensor):
        if (
            isinstance(output, list | tuple)
            and len(output) > 0
            and not (isinstance(output, list) and all(isinstance(o, Tensor) for o in output))
        ):
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
                f"the pipeline changes its latents between scheduler steps {k} and {k + 1} (inpainting and latent blending do this): the "
                f"next step's sample {describe(after.sample)} is not what scheduler.step returned {describe(before.returned)}. "
                "Such a loop is not a sampler of one process; use the family's plain text- or image-conditioned pipeline"
            )
