"""Losses of single labelled samples: no pairs, +1 for good and -1 for bad, graded labels between. Symbols: ``preference_inputs.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from visalign.maths.preference_declaration import NonNegative, preference_loss
from visalign.maths.preference_inputs import LossInput


@preference_loss(group="label", shared_noise=False, statistics=("kl",))
def kto(inputs: LossInput, *, weight_good: NonNegative = 1.0, weight_bad: NonNegative = 1.0) -> Tensor:
    """``weight_y [1 - sigmoid(y (u - z))]`` with the detached baseline ``z = kappa max(0, kl)``.

    ``kl`` is the mean of ``delta`` over all samples of the optimizer step on all processes. From a single sample it would be that
    sample's own ``delta``, and every improved sample would sit at the sigmoid's steepest point for ever. A graded label mixes the
    two cases with weights (1 + y) / 2 and (1 - y) / 2.
    Sources: KTO, arXiv:2402.01306; Diffusion-KTO, arXiv:2404.04465.
    """
    advantage = inputs.u[:, 0] - inputs.kappa * max(0.0, inputs.statistics["kl"])
    good = 0.5 * (1 + inputs.given("label")[:, 0])
    return weight_good * good * torch.sigmoid(-advantage) + weight_bad * (1 - good) * torch.sigmoid(advantage)


@preference_loss(group="label", reference=False, shared_noise=False)
def dro(inputs: LossInput) -> Tensor:
    """``y e_policy``: good samples' errors down and bad ones' up, without reference. Unbounded below: it has to be stopped early.

    Source: direct reward optimisation in DSO, arXiv:2503.22677.
    """
    return inputs.given("label")[:, 0] * inputs.policy[:, 0]
