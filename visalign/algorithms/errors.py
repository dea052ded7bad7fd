"""The error pass: how well each role denoises noised copies of clean samples, one number per sample.

    e_phi = mean over the latent's (valid) elements of (f_phi(x_t, t, c) - y)^2        float32

in the space of ``f``: the network's own, noise (epsilon), data (x0) or velocity (v for VP models, x1 - x0 for the others). The spaces
differ by exact factors of the level, e.g. ``e_epsilon = alpha^2 e_v`` (VP) and ``(1 - t)^2 e_v`` (flow), so "constant strength" is another
objective in each; see ``maths.preference_scale.space_weight``. All roles answer the same ``x_t`` in the same precision, so that before
the first update policy and reference agree bit for bit.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from visalign.algorithms.noising import Noised
from visalign.kernels.backend import Backend
from visalign.kernels.paired_error import paired_error
from visalign.kernels.paired_error.reference import PairedErrors
from visalign.maths.outputs import Outputs
from visalign.maths.process import from_prediction
from visalign.protocols import Policy
from visalign.types import Prediction, PredictionKind

Space = Literal["native", "epsilon", "x0", "velocity"]


def errors(policy: Policy, noised: Noised, outputs: Outputs, reference: Outputs | None = None, space: Space = "native", *,
           mask: Tensor | None = None, gap: bool = False, norms: bool = False, backend: Backend = "auto") -> PairedErrors:
    """Errors of what a role said about noised samples, and of what the reference said; with gradients for whoever has trained weights,
    unless under ``no_grad``.

    Args:
        outputs, reference: `visalign.kernels.ask.outputs_at` at ``noised.x``.
        mask: bool, broadcastable to (n, ...): the elements that count.
        gap, norms: what to return besides.
    Raises:
        ValueError: a mask without a true element in some sample.
    """
    return paired_error(outputs, noised.x, noised.x0, noised.noise, space=kind_of(policy, space), sigma_data=policy.times.sigma_data,
                        reference_outputs=reference, mask=mask, gap=gap, norms=norms, backend=backend)


def residual(policy: Policy, noised: Noised, outputs: Outputs, space: Space = "native") -> Tensor:
    """``f - y``, (n, ...): what the error is the mean square of."""
    answer, target = (in_space(policy, prediction, noised, space)
                      for prediction in (outputs.prediction(noised.x), Prediction(x0=noised.x0, x1=noised.noise)))
    return answer - target


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
