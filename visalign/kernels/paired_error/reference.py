"""Squared errors of policy and reference on noised samples, in PyTorch, and their gradient written out.

    x   = alpha x0 + sigma noise                                       one level per sample
    f   = the prediction of the outputs at x, in the space whose error counts          `maths.process.from_prediction`
    y   = x0 and noise themselves in that space
    e   = mean_d (f - y)^2,     gap = mean_d (f - f_reference)^2       over the true elements of a mask, if there is one
    de/dm_k = 2 a_k (f - y) / D,  dgap/dm_k = 2 a_k (f - f_reference) / D              a_k: coefficient of m_k in f
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.kernels.paired_error.formula import PairFormula, coefficients
from visalign.maths.outputs import Outputs
from visalign.maths.process import from_prediction
from visalign.types import Prediction, PredictionKind


@dataclass(frozen=True)
class PairedErrors:
    """What is known of noised samples, each (B,).

    Attributes:
        policy, reference: mean squared errors of the two, the second without gradient and only if there is a reference.
        gap: mean squared distance of the two answers, if asked for.
        norm_policy, norm_reference: of the answers, over all elements and without gradient, if asked for.
    """

    policy: Tensor
    reference: Tensor | None = None
    gap: Tensor | None = None
    norm_policy: Tensor | None = None
    norm_reference: Tensor | None = None


def reference(outputs: Outputs, x: Tensor, x0: Tensor, noise: Tensor, space: PredictionKind, sigma_data: float,
              reference_outputs: Outputs | None, mask: Tensor | None, want_gap: bool, want_norms: bool) -> PairedErrors:
    """Arguments as `visalign.kernels.paired_error.paired_error`; float32."""

    def in_space(prediction: Prediction) -> Tensor:
        return from_prediction(prediction, outputs.alpha, outputs.sigma, space, sigma_data)

    own, target = in_space(outputs.prediction(x)), in_space(Prediction(x0=x0, x1=noise))
    held = None if reference_outputs is None else in_space(reference_outputs.prediction(x))
    error = mean_squared(own, target, mask)
    return PairedErrors(error, None if held is None else mean_squared(held, target, mask),
                        mean_squared(own, held, mask) if held is not None and want_gap else None,
                        own.detach().flatten(1).norm(dim=1) if want_norms else None,
                        held.flatten(1).norm(dim=1) if held is not None and want_norms else None)


def mean_squared(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """One number per sample, float32 (B,), whatever the latent's number of axes: images, video and audio alike.

    Raises:
        ValueError: a mask without a true element in some sample.
    """
    squared = (output.float() - target.float()).square().flatten(1)
    if mask is None:
        return squared.mean(dim=1)
    kept = mask.expand(output.shape).flatten(1)
    count = kept.sum(dim=1)
    check_mask(count)
    return torch.where(kept, squared, 0.0).sum(dim=1) / count


def check_mask(count: Tensor) -> None:
    """Raises ValueError if a sample has no valid element."""
    if bool((count == 0).any()):
        raise ValueError(f"sample {int((count == 0).nonzero()[0])} has no valid element in its mask; leave it out of the data")


def backward(formula: PairFormula, x0: Tensor, noise: Tensor, tensors: Sequence[Tensor], reference_tensors: Sequence[Tensor],
             mask: Tensor | None, grad_error: Tensor, grad_gap: Tensor, count: Tensor) -> list[Tensor]:
    """Gradients of all outputs, (B, ...) each, in their dtype; ``count`` (B,) of the elements that enter the means."""
    wide = torch.promote_types(torch.promote_types(tensors[0].dtype, x0.dtype), torch.float32)
    found, shape = coefficients(formula), (-1, *[1] * (x0.dim() - 1))
    columns = [column.to(x0.device, wide).reshape(shape) for column in found.table.unbind(dim=1)]
    of_x0, of_noise, target_x0, target_noise = columns[-4:]

    def answer(outputs: Sequence[Tensor]) -> Tensor:
        terms = [column * outputs[k].to(wide) for k, column in zip(found.used, columns, strict=False)]
        return torch.stack([*terms, of_x0 * x0.to(wide), of_noise * noise.to(wide)]).sum(dim=0)

    own, scale = answer(tensors), 2 / count.to(wide).reshape(shape)
    slope = grad_error.to(wide).reshape(shape) * (own - target_x0 * x0.to(wide) - target_noise * noise.to(wide))
    if reference_tensors:
        slope = slope + grad_gap.to(wide).reshape(shape) * (own - answer(reference_tensors))
    if mask is not None:
        slope = torch.where(mask.expand(slope.shape), slope, 0.0)
    every = {k: scale * column * slope for k, column in zip(found.used, columns, strict=False)}
    return [every[k].to(tensor.dtype) if k in every else torch.zeros_like(tensor) for k, tensor in enumerate(tensors)]
