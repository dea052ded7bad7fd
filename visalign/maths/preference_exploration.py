"""Optimism and pessimism: DPO plus a multiple of the value of the policy it implies.

A reward is known from comparisons only up to a constant per prompt. Fix it by ``E_c[r] = 0`` over a calibration distribution ``c`` of
samples. With ``r = beta log(pi / pi_reference) + beta log Z`` the best regularised value is

    max_pi  E_pi[r] - beta KL(pi || pi_reference)  =  beta log Z  =  -E_c[beta log(pi / pi_reference)]  =  -E_c[u]

so favouring models of large value (optimism, for exploring online) adds ``+alpha E_c[u]`` to the loss, and favouring small values
(pessimism, for fixed data) adds ``-alpha E_c[u]``. ``u`` is the implicit reward of ``preference_inputs.py``.

The term is linear in the errors and, unlike a log density, the surrogate ``u`` is not normalised: nothing but the step size, the clip
of the gradient and ``alpha`` bounds it. Keep ``alpha`` far below 1/2, where its slope at the reference equals DPO's own.

Sources: XPO, arXiv:2405.21046; VPO, arXiv:2405.19320 (derived here from its value-regularised likelihood).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

from visalign.maths.preference_declaration import NonNegative, preference_loss
from visalign.maths.preference_inputs import LossInput


@preference_loss(group="pair", from_reference=True)
def xpo(inputs: LossInput, *, alpha: NonNegative = 0.01) -> Tensor:
    """``softplus(-u) + alpha u~``, ``u~`` the mean over the pair's candidates that the *reference* generated.

    Pushes the policy away from what the reference does already. The published bonus is ``alpha' log pi(x~)``: ``alpha' = beta alpha``.
    Raises:
        ValueError: a pair without a sample of the reference.
    """
    marked = inputs.given("from_reference").to(inputs.policy.dtype)
    count = marked.sum(dim=1)
    if not (count > 0).all():
        raise ValueError("xpo needs at least one sample of the reference in every pair: "
                         f"{int((count == 0).sum())} of {count.numel()} pairs have none; generate one side of each pair by the reference")
    return softplus(-inputs.margin) + alpha * (marked * inputs.u).sum(dim=1) / count


@preference_loss(group="pair")
def vpo(
    inputs: LossInput, *, alpha: NonNegative = 0.01, attitude: Literal["optimistic", "pessimistic"] = "pessimistic",
    calibration: Literal["chosen", "rejected", "both"] = "chosen",
) -> Tensor:
    """``softplus(-u) +- alpha E_c[u]``, plus when optimistic, ``c`` the chosen samples, the rejected ones, or both.

    Pessimistic and calibrated on the chosen samples it is :func:`~visalign.maths.preference_pairs.rpo` with
    ``sft_weight = alpha kappa``, up to a constant.
    """
    u = inputs.u
    value = {"chosen": u[:, 0], "rejected": u[:, 1], "both": u.mean(dim=1)}[calibration]
    return softplus(-inputs.margin) + (alpha if attitude == "optimistic" else -alpha) * value
