"""Density and divergences of a stored sampler step, in PyTorch, and their gradient written out.

    log_prob      = log N(x_next; mean, std^2 I),  mean = A x0 + B x1             nats, summed over the latent
    kl_reference  = c_v^2 |v - v_reference|^2 / (2 std^2)                         exact: from one state the means differ by c_v (v - v')
    kl_old        = c_v^2 |v - v_old|^2 / (2 std^2)                               the statistic of GRPO-Guard's ratio norm, times D
    output_gap    = |v - v_old| / |v_old|                                         not differentiated

With the coefficients c_k, v_k of output m_k in mean and velocity, and the factor F of a guidance correction (1 without),

    d/dm_k = F [ c_k s_mean + v_k s_velocity ] + dF/dm_k sum_d [ s_mean sum_k c_k m_k + s_velocity sum_k v_k m_k ]
    s_mean = g_log_prob (x_next - mean) / std^2,   s_velocity = c_v^2 / std^2 [ g_reference (v - v_reference) + g_old (v - v_old) ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.kernels.formula import Coefficients, StepFormula, mean_and_velocity
from visalign.kernels.guidance_rescale.reference import factor_gradients
from visalign.maths.gaussian import kl_divergence, log_prob, state_coefficients, transition_mean
from visalign.maths.outputs import Outputs
from visalign.types import NoiseLevel, Transition


@dataclass(frozen=True)
class StepTerms:
    """What is known of one stored step under the current outputs, each (B,).

    Attributes:
        log_prob: nats, of the stored ``x_next``.
        kl_reference, kl_old: nats, to the reference's step and to the one that was sampled, where these were given.
        output_gap: relative distance of the velocity from the sampled one, without gradient.
    """

    log_prob: Tensor
    kl_reference: Tensor | None = None
    kl_old: Tensor | None = None
    output_gap: Tensor | None = None


def reference(outputs: Outputs, x: Tensor, x_next: Tensor, transition: Transition, reference_outputs: Outputs | None,
              velocity_old: Tensor | None) -> StepTerms:
    """Arguments as `visalign.kernels.transition_log_prob.transition_log_prob`; float64 if a tensor is."""
    prediction = outputs.prediction(x)
    density = log_prob(x_next.to(prediction.x0), transition_mean(prediction, transition), transition.std)
    _, c_v = state_coefficients(NoiseLevel(float(outputs.alpha), float(outputs.sigma)), transition)
    kl_reference = kl_old = gap = None
    if velocity_old is not None:
        old = velocity_old.to(prediction.velocity)
        kl_old = kl_divergence(c_v * prediction.velocity, c_v * old, transition.std)
        gap = relative_gap(prediction.velocity, old)
    if reference_outputs is not None:
        held = reference_outputs.prediction(x).velocity
        kl_reference = kl_divergence(c_v * prediction.velocity, c_v * held, transition.std)
    return StepTerms(density, kl_reference, kl_old, gap)


def relative_gap(first: Tensor, second: Tensor) -> Tensor:
    """``||first - second|| / ||second||`` per sample, (B,), without gradient."""
    return (first.detach() - second).flatten(1).norm(dim=1) / second.flatten(1).norm(dim=1).clamp(min=1e-12)


def backward(formula: StepFormula, x: Tensor, x_next: Tensor, tensors: Sequence[Tensor], reference_tensors: Sequence[Tensor],
             velocity_old: Tensor | None, grad_log_prob: Tensor, grad_kl_reference: Tensor, grad_kl_old: Tensor, moments: Tensor,
             factors: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of all outputs, (B, ...) each, in the dtype of the outputs; the formulas of the module.

    Args:
        formula: of the step.
        reference_tensors, velocity_old: empty or ``None`` where there are none.
        grad_log_prob, grad_kl_reference, grad_kl_old: (B,), the last two read where their divergence exists.
        moments, factors: of `guidance_rescale` for the policy's outputs, and the factors of policy and reference; read if there is one.
    """
    of_mean, of_velocity = mean_and_velocity(formula)
    used, step, shape = formula.used, formula.transition, (-1, *[1] * (x.dim() - 1))
    wide = torch.promote_types(torch.promote_types(tensors[0].dtype, x.dtype), torch.float32)
    state = x.to(wide)
    own, held = ([tensors[k].to(wide) for k in used if tensors] for tensors in (tensors, reference_tensors))
    combination = None if formula.readout is None else formula.readout.combination
    rescaled = combination is not None and combination.correction == "rescale"
    factor, held_factor = (value.to(wide).reshape(shape) if rescaled and value.numel() else torch.ones((), dtype=wide) for value in factors)
    c_v = state_coefficients(NoiseLevel(formula.alpha, formula.sigma), step)[1]

    velocity = of_velocity.x * state + factor * _sum(of_velocity, own)
    s_mean = grad_log_prob.to(wide).reshape(shape) * (x_next.to(wide) - of_mean.x * state - factor * _sum(of_mean, own)) / step.std**2
    s_velocity = torch.zeros_like(velocity)
    if held:
        gap = velocity - of_velocity.x * state - held_factor * _sum(of_velocity, held)
        s_velocity = s_velocity + (c_v / step.std) ** 2 * grad_kl_reference.to(wide).reshape(shape) * gap
    if velocity_old is not None:
        s_velocity = s_velocity + (c_v / step.std) ** 2 * grad_kl_old.to(wide).reshape(shape) * (velocity - velocity_old.to(wide))
    found = [factor * (c * s_mean + v * s_velocity) for c, v in zip(of_mean.outputs, of_velocity.outputs, strict=True)]
    if rescaled:
        assert combination is not None
        of_factor = (s_mean * _sum(of_mean, own) + s_velocity * _sum(of_velocity, own)).flatten(1).sum(dim=1).reshape(shape)
        slopes = factor_gradients(tensors, combination, moments.to(wide))
        found = [grad + of_factor * slopes[k] for k, grad in zip(used, found, strict=True)]
    every = dict(zip(used, found, strict=True))
    return [every[k].to(tensor.dtype) if k in every else torch.zeros_like(tensor) for k, tensor in enumerate(tensors)]


def _sum(coefficients: Coefficients, tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(coefficients.outputs, tensors, strict=True)]).sum(dim=0)
