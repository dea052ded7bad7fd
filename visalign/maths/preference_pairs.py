"""Losses of pairs that depend on the margin ``u = u_w - u_l`` alone, or on ``u_w`` and ``u_l``; symbols in ``preference_inputs.py``.

``softplus(-u) = -log sigmoid(u)``. Every formula lowers the chosen sample's error and raises the rejected one's at the reference
(u = 0), except :func:`npo`, which learns what to avoid.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from visalign.maths.preference_declaration import Fraction, NonNegative, Positive, Range, preference_loss
from visalign.maths.preference_inputs import LossInput

FlipRate = Annotated[float, Range(low=0.0, high=0.5, exclude=(0.5,))]


@preference_loss(group="pair")
def dpo(inputs: LossInput) -> Tensor:
    """``softplus(-u)``; slopes ``+kappa sigmoid(-u)`` in e_w and the opposite in e_l.

    Source: Diffusion-DPO, arXiv:2311.12908, eq. 14; for rectified flow with constant weight: arXiv:2501.13918.
    """
    return softplus(-inputs.margin)


@preference_loss(group="pair")
def conservative_dpo(inputs: LossInput, *, label_smoothing: FlipRate = 0.1) -> Tensor:
    """``(1 - s) softplus(-u) + s softplus(u)``; its minimum is at the finite ``u = log((1 - s) / s)``.

    Source: the note on cDPO by E. Mitchell (2023), label smoothing ``s``.
    """
    u = inputs.margin
    return (1 - label_smoothing) * softplus(-u) + label_smoothing * softplus(u)


@preference_loss(group="pair")
def robust_dpo(inputs: LossInput, *, flip_rate: FlipRate = 0.1) -> Tensor:
    """``[(1 - q) softplus(-u) - q softplus(u)] / (1 - 2 q)``: over labels flipped with rate q its expectation is :func:`dpo`.

    Source: arXiv:2403.00409.
    """
    u = inputs.margin
    return ((1 - flip_rate) * softplus(-u) - flip_rate * softplus(u)) / (1 - 2 * flip_rate)


@preference_loss(group="pair")
def npo(inputs: LossInput) -> Tensor:
    """``softplus(u)``: :func:`dpo` with the labels swapped, for the negative model that guidance steers away from.

    Source: Diffusion-NPO, arXiv:2505.11245.
    """
    return softplus(inputs.margin)


@preference_loss(group="pair")
def ipo(inputs: LossInput) -> Tensor:
    """``(u - 1/2)^2``. Codes that square ``m - 1 / (2 kappa)`` with ``m = u / kappa`` are ``kappa^2`` smaller, with the same minimum.

    Source: arXiv:2310.12036.
    """
    return (inputs.margin - 0.5).square()


@preference_loss(group="pair")
def hinge(inputs: LossInput) -> Tensor:
    """``max(0, 1 - u)``. Source: SLiC-HF, arXiv:2305.10425, with the reference inside the margin."""
    return torch.relu(1 - inputs.margin)


@preference_loss(group="pair")
def brier(inputs: LossInput) -> Tensor:
    """``(1 - sigmoid(u))^2``, the Brier score of the implied preference: bounded, so that hopeless pairs lose their pull."""
    return torch.sigmoid(-inputs.margin).square()


@preference_loss(group="pair")
def exo(inputs: LossInput, *, label_smoothing: Annotated[float, Range(0.0, 0.5, exclude=(0.0, 0.5))] = 0.01) -> Tensor:
    """``KL(Bernoulli(sigmoid(u)) || Bernoulli(1 - s))``, the reverse KL where :func:`dpo` is the forward one.

    Sources: EXO, arXiv:2402.00856; for diffusion: DMPO, arXiv:2507.07510.
    """
    u = inputs.margin
    win, lose = torch.sigmoid(u), torch.sigmoid(-u)
    return win * (logsigmoid(u) - math.log1p(-label_smoothing)) + lose * (logsigmoid(-u) - math.log(label_smoothing))


@preference_loss(group="pair")
def bco(inputs: LossInput) -> Tensor:
    """``softplus(-u_w) + softplus(u_l)``: each sample against the reference, no margin; the paper's running reward shift is 0 here.

    Source: arXiv:2404.04656.
    """
    u = inputs.u
    return softplus(-u[:, 0]) + softplus(u[:, 1])


@preference_loss(group="pair")
def nca(inputs: LossInput) -> Tensor:
    """``softplus(-u_w) + softplus(u_w) / 2 + softplus(u_l) / 2``: u_w is held near log 2 instead of growing with the margin.

    Source: NCA, arXiv:2402.05369 (pair form).
    """
    u = inputs.u
    return softplus(-u[:, 0]) + 0.5 * softplus(u[:, 0]) + 0.5 * softplus(u[:, 1])


@preference_loss(group="pair")
def apo(inputs: LossInput) -> Tensor:
    """``(1 - sigmoid(u_w)) + sigmoid(u_l)``, the variant "zero": chosen up and rejected down, both with vanishing slope.

    Source: arXiv:2408.06266.
    """
    u = inputs.u
    return torch.sigmoid(-u[:, 0]) + torch.sigmoid(u[:, 1])


@preference_loss(group="pair")
def rpo(inputs: LossInput, *, sft_weight: NonNegative = 1.0) -> Tensor:
    """``softplus(-u) + lambda e_w``: keeps the chosen sample's own error from rising, which a margin alone allows.

    ``lambda`` is in units of 1 / error: its pull equals that of :func:`dpo` at the reference for ``lambda = kappa / 2``.
    Source: RPO, arXiv:2404.19733 (iterative reasoning) and arXiv:2405.16436 (its pessimism).
    """
    return softplus(-inputs.margin) + sft_weight * inputs.policy[:, 0]


@preference_loss(group="pair", reference=False)
def mapo(inputs: LossInput, *, weight: Positive = 0.1, eta: Positive = 0.5, scale: Positive = 1000.0) -> Tensor:
    """``e_w + weight softplus(-scale [phi(eta e_w) - phi(eta e_l)])``, ``phi(z) = z / (e^z - 1)``; no reference, kappa unused.

    The defaults are the published ones; with them the logit saturates unless the two errors are within about 1 %.
    Source: MaPO, arXiv:2406.06424.
    """
    odds = _inverse_odds(eta * inputs.policy)
    return inputs.policy[:, 0] + weight * softplus(-scale * (odds[:, 0] - odds[:, 1]))


def _inverse_odds(z: Tensor) -> Tensor:
    """``z / (e^z - 1)``, and 1 with slope -1/2 at 0."""
    small = z.abs() < 1e-4
    away = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 - z / 2 + z * z / 12, away / torch.expm1(away))


@preference_loss(group="pair")
def sppo(inputs: LossInput, *, eta: Positive = 1.0) -> Tensor:
    """``(u_w - eta / 2)^2 + (u_l + eta / 2)^2``: self-play with hard win probabilities 1 and 0; the reference is the last round's policy.

    Source: SPPO, arXiv:2405.00675.
    """
    u = inputs.u
    return (u[:, 0] - 0.5 * eta).square() + (u[:, 1] + 0.5 * eta).square()


@preference_loss(group="pair", reward=True)
def sppo_soft(inputs: LossInput, *, eta: Positive = 1.0, temperature: Positive = 1.0) -> Tensor:
    """:func:`sppo` with the win probability ``P = sigmoid((r_w - r_l) / temperature)``: targets ``+-eta (P - 1/2)``."""
    u, reward = inputs.u, inputs.given("reward")
    target = eta * (torch.sigmoid((reward[:, 0] - reward[:, 1]) / temperature) - 0.5)
    return (u[:, 0] - target).square() + (u[:, 1] + target).square()


@preference_loss(group="pair", old=True)
def inpo(inputs: LossInput, *, anchor: Fraction = 0.3333333333333333) -> Tensor:
    """Iterative Nash regression, ``(h_w - h_l - 1/2)^2`` with ``h = kappa [a e_reference + (1 - a) e_old - e_policy]``.

    ``a`` is the paper's ``tau / eta`` (its KL weight to the reference over that of the whole step) and kappa stands for ``eta``, so
    the value is ``eta^2`` times the paper's. ``a = 1`` is :func:`ipo`; ``a = 0`` regularises towards the last round alone.
    Source: INPO, arXiv:2407.00617.
    """
    mirror = anchor * inputs.given("reference") + (1 - anchor) * inputs.given("old")
    h = inputs.kappa * (mirror - inputs.policy)
    return (h[:, 0] - h[:, 1] - 0.5).square()


@preference_loss(group="pair")
def spo(inputs: LossInput, *, clip_range: Annotated[float, Range(0.0, 1.0, exclude=(0.0, 1.0))] = 0.1) -> Tensor:
    """``softplus(-kappa [c(delta_w) - c(delta_l)])``, ``c`` clamping to ``[log(1 - clip_range), log(1 + clip_range)]``.

    For step-aware preferences, where the errors are Gaussian transition densities and ``delta`` is a log ratio. A clamped sample has
    no gradient, also when it lies on the wrong side.
    Source: SPO, arXiv:2406.04314.
    """
    ratio = inputs.delta.clamp(math.log1p(-clip_range), math.log1p(clip_range))
    return softplus(-inputs.kappa * (ratio[:, 0] - ratio[:, 1]))
