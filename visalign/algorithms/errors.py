"""The error pass: how well each role denoises noised copies of clean samples, one number per sample.

    e_phi = mean over the latent's (valid) elements of (f_phi(x_t, t, c) - y)^2        float32

in the space of ``f``: the network's own, noise (epsilon), data (x0) or velocity (v for VP models, x1 - x0 for the others). The spaces
differ by exact factors of the level, e.g. ``e_epsilon = alpha^2 e_v`` (VP) and ``(1 - t)^2 e_v`` (flow), so "constant strength" is another
objective in each; see ``maths.preference_scale.space_weight``. All roles answer the same ``x_t`` in the same precision, so that before
the first update policy and reference agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.algorithms.noising import Noised
from visalign.maths.process import from_prediction
from visalign.protocols import Policy
from visalign.types import Prediction, PredictionKind, Role

Space = Literal["native", "epsilon", "x0", "velocity"]


@dataclass(frozen=True)
class Answer:
    """What a role said about noised samples.

    Attributes:
        output: in the chosen space, float32 (n, ...).
        target: what it should have said.
    """

    output: Tensor
    target: Tensor

    def error(self, mask: Tensor | None = None) -> Tensor:
        """Mean squared error over all but the batch axis, (n,); with ``mask`` (n, ...) over its true elements.

        Raises:
            ValueError: a mask without a true element in some sample.
        """
        return mean_squared(self.output, self.target, mask)


def mean_squared(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """One number per sample, float32 (n,), whatever the latent's number of axes: images, video and audio alike."""
    squared = (output.float() - target.float()).square().flatten(1)
    if mask is None:
        return squared.mean(dim=1)
    kept = mask.expand(output.shape).flatten(1)
    count = kept.sum(dim=1)
    if bool((count == 0).any()):
        raise ValueError(f"sample {int((count == 0).nonzero()[0])} has no valid element in its mask; leave it out of the data")
    return torch.where(kept, squared, 0.0).sum(dim=1) / count


def answer(policy: Policy, noised: Noised, conditioning: Any, role: Role = "policy", space: Space = "native") -> Answer:
    """This role's answer about noised samples; with gradients for whoever has trained weights, unless under ``no_grad``.

    Args:
        conditioning: what ``policy.encode`` returned, one row per sample.
    """
    prediction = policy.predict_at(noised.x, noised.timesteps, conditioning, role)
    return Answer(output=in_space(policy, prediction, noised, space),
                  target=in_space(policy, Prediction(x0=noised.x0, x1=noised.noise), noised, space))


def in_space(policy: Policy, prediction: Prediction, noised: Noised, space: Space) -> Tensor:
    """End points as the quantity whose error counts, (n, ...)."""
    return from_prediction(prediction, noised.alpha, noised.sigma, kind_of(policy, space), policy.times.sigma_data)


def kind_of(policy: Policy, space: Space) -> PredictionKind:
    """The prediction kind a space means for this policy's process."""
    if space == "native":
        return policy.times.kind
    if space == "velocity":
        return "v_prediction" if policy.times.process == "VP" else "flow"
    return "epsilon" if space == "epsilon" else "sample"
