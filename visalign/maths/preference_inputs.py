"""What a preference loss is given: the errors of one noised copy per sample, and what is known about the samples.

Notation of all ``visalign/maths/preference*.py`` files, for one noised copy of a sample at a time t with noise eps:

    e_phi  = mean over the latent's elements of (f_phi(x_t, t, c) - target)^2       one number per sample, phi: policy, reference, old
    delta  = e_reference - e_policy      > 0: the policy denoises the sample better than the reference does
    u      = kappa delta                 the implicit reward, beta log(pi / pi_reference) up to the bound's constant
    margin = u_w - u_l                   chosen minus rejected

``kappa`` is the one strength. Codes that write ``sigmoid(-0.5 beta ...)`` use ``kappa = beta / 2``, see ``preference_scale.py``.

Source: Diffusion-DPO, arXiv:2311.12908.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

HOW_TO_GIVE: Mapping[str, str] = {
    "reference": "compute the reference's errors on the same noised samples, without gradient",
    "old": "compute the errors of the previous round's policy on the same noised samples, without gradient",
    "reward": "score the samples, or choose a loss that reads the order alone (dpo, plackett_luce)",
    "label": "give +1 for good and -1 for bad samples",
    "from_reference": "mark the candidates that the reference generated",
}
"""What to do about an input that is missing."""


@dataclass(frozen=True, kw_only=True)
class LossInput:
    """Errors of P groups of K candidates, ordered best first (pairs: column 0 chosen, column 1 rejected; labels: K is 1).

    Attributes:
        policy: e_policy, float32 or float64 (P, K), with gradient.
        reference, old: e_reference and e_old (P, K) without gradient, ``None`` when the loss does not need them.
        kappa: strength, > 0.
        reward: (P, K), larger is better.
        label: (P, K), +1 good, -1 bad, values between for graded labels.
        from_reference: bool (P, K), candidates that the reference (not the policy) generated.
        weight: (P,), multiplies the loss of each group.
        statistics: detached means over the whole optimizer step on all processes, the ones the loss declares.
    Raises:
        ValueError: shapes or precision do not fit, kappa is not positive, or gradient flows into what is a constant.
    """

    policy: Tensor
    kappa: float
    reference: Tensor | None = None
    old: Tensor | None = None
    reward: Tensor | None = None
    label: Tensor | None = None
    from_reference: Tensor | None = None
    weight: Tensor | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy.dim() != 2 or self.policy.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"policy errors must be float32 or float64 of shape (P, K), got {self.policy.dtype} "
                             f"{tuple(self.policy.shape)}; take the mean over all latent dimensions in float32, one number per sample")
        if not (math.isfinite(self.kappa) and self.kappa > 0):
            raise ValueError(f"kappa must be a finite number > 0, got {self.kappa}; to prefer the rejected sample use the loss 'npo'")
        for name in ("reference", "old", "reward", "label", "from_reference"):
            self._check_constant(name, self.policy.shape)
        self._check_constant("weight", self.policy.shape[:1])

    def _check_constant(self, name: str, shape: torch.Size) -> None:
        value: Tensor | None = getattr(self, name)
        if value is None:
            return
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} like the policy errors, got {tuple(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name} is a constant of the loss but carries gradient; compute it under torch.no_grad() or detach it")

    @property
    def num_candidates(self) -> int:
        """K."""
        return self.policy.shape[1]

    @property
    def delta(self) -> Tensor:
        """``e_reference - e_policy`` (P, K)."""
        if self.reference is None:
            raise ValueError("this loss compares with the reference but LossInput.reference is None; "
                             "declare reference=True and compute the reference's errors")
        return self.reference - self.policy

    @property
    def u(self) -> Tensor:
        """Implicit rewards ``kappa delta`` (P, K)."""
        return self.kappa * self.delta

    @property
    def margin(self) -> Tensor:
        """``u_w - u_l`` (P,)."""
        if self.num_candidates != 2:
            raise ValueError(f"a margin needs pairs, (P, 2); got groups of {self.num_candidates}")
        u = self.u
        return u[:, 0] - u[:, 1]

    def given(self, name: Literal["reference", "old", "reward", "label", "from_reference"]) -> Tensor:
        """The optional input ``name``.

        Raises:
            ValueError: it is ``None``.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs LossInput.{name}, which is None; {HOW_TO_GIVE[name]}")
        return value
