"""Safeguard of the chosen sample: scale the rejected sample's gradient so that a step cannot raise the chosen one's error.

With output-space gradients ``g_w``, ``g_l`` of the two errors a pair loss moves along ``-(g_w - lambda g_l)``. To first order the chosen
error changes by ``-|g_w|^2 + lambda <g_w, g_l>``, which stays below ``-mu |g_w|^2`` for

    lambda = min(1, (1 - mu) |g_w|^2 / <g_w, g_l>)     if <g_w, g_l> > 0, else 1

Source: Diffusion-SDPO, arXiv:2511.03317 (there one lambda per local batch; here one per pair, the same on every number of processes).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from visalign.maths.preference_inputs import LossInput


def safeguard(gradient_winner: Tensor, gradient_loser: Tensor, mu: float) -> Tensor:
    """``lambda`` per pair, (P,) in [0, 1], detached.

    Args:
        gradient_winner, gradient_loser: gradients of the chosen and the rejected error by the network's output, (P, ...); residuals
            ``f - target`` serve as well, being proportional to them. Elements masked out of the error must be 0.
        mu: share of the chosen sample's own descent that must remain, in [0, 1]; published: 0.9 (SD 1.5), 0.6 (SDXL).
    Raises:
        ValueError: different shapes, or mu outside [0, 1].
    """
    if gradient_winner.shape != gradient_loser.shape or gradient_winner.dim() < 2:
        raise ValueError("safeguard needs both gradients in one shape (P, ...), got "
                         f"{tuple(gradient_winner.shape)} and {tuple(gradient_loser.shape)}")
    if not 0 <= mu <= 1:
        raise ValueError(f"safeguard needs mu in [0, 1], the share of the chosen sample's descent to keep; got {mu}")
    g_w, g_l = (g.detach().flatten(1).to(torch.promote_types(g.dtype, torch.float32)) for g in (gradient_winner, gradient_loser))
    along = (g_w * g_l).sum(dim=1)
    opposed = along <= 0
    limit = (1 - mu) * g_w.square().sum(dim=1) / torch.where(opposed, torch.ones_like(along), along)
    return torch.where(opposed, torch.ones_like(along), limit.clamp(max=1.0))


def scale_loser(inputs: LossInput, scale: Tensor) -> LossInput:
    """``inputs`` whose rejected errors keep their value while their gradient is multiplied by ``scale`` (P,): lambda e + (1 - lambda) e'.

    ``e'`` is detached. Every pair loss then has its value unchanged and its loser's slope scaled.

    Raises:
        ValueError: no pairs, or another shape.
    """
    if inputs.num_candidates != 2 or scale.shape != inputs.policy.shape[:1]:
        raise ValueError(f"scale_loser needs pairs and one scale per pair, got errors {tuple(inputs.policy.shape)} "
                         f"and scales {tuple(scale.shape)}")
    winner, loser = inputs.policy.unbind(dim=1)
    scale = scale.detach().to(loser.dtype)
    return replace(inputs, policy=torch.stack([winner, loser.detach() + scale * (loser - loser.detach())], dim=1))
