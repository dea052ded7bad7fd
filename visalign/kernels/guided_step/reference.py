"""One sampler step, in PyTorch.

    x0, x1   = prediction of the outputs at x                          guidance, parametrisation, reward gradients: `maths.outputs`
    mean     = A x0 + B x1
    x_next   = round(mean + std noise)                                 to the storage dtype; mean itself where std is 0
    log_prob = log N(x_next; mean, std^2 I)                            of the rounded x_next: the update sees the stored value
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.maths.gaussian import log_prob, transition_mean
from visalign.maths.outputs import Outputs
from visalign.maths.philox import philox_normal
from visalign.types import Transition


@dataclass(frozen=True)
class Step:
    """What a sampler step gave.

    Attributes:
        x_next: (B, ...), in the storage dtype, or that of the computation if none was asked for.
        log_prob: nats, (B,), if asked for.
        velocity: predicted, (B, ...), if asked for.
        mean: of x_next, (B, ...), if asked for.
    """

    x_next: Tensor
    log_prob: Tensor | None = None
    velocity: Tensor | None = None
    mean: Tensor | None = None


def reference(outputs: Outputs, x: Tensor, transition: Transition, noise: Tensor | None, seeds: Tensor | None,
              storage_dtype: torch.dtype | None, want_log_prob: bool, want_velocity: bool, want_mean: bool) -> Step:
    """Arguments as `visalign.kernels.guided_step.guided_step`; float64 if a tensor is."""
    prediction = outputs.prediction(x)
    mean = after = transition_mean(prediction, transition)
    if transition.std > 0:
        drawn = philox_normal(seeds, x.shape[1:]) if noise is None and seeds is not None else noise
        assert drawn is not None, "the caller gives noise or seeds for a step with std > 0"
        after = mean + transition.std * drawn.to(mean)
    if storage_dtype is not None:
        after = after.to(storage_dtype)
    return Step(x_next=after, log_prob=log_prob(after, mean, transition.std) if want_log_prob else None,
                velocity=prediction.velocity if want_velocity else None, mean=mean if want_mean else None)
