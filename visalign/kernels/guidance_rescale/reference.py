"""The factor of guidance rescale and what its gradient needs, in PyTorch.

    F = strength std(p) / std(m) + 1 - strength                        m = sum_k w_k m_k,  p = m_conditional
    dF/dm_i = -strength std(p) / std(m)^2 (m_i - mean(m)) / ((D - 1) std(m))
    dF/dp_i =  strength / std(m) (p_i - mean(p)) / ((D - 1) std(p))

The formula itself is `visalign.maths.combination.factor`. Source: arXiv:2305.08891, eq. 15-16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visalign.maths.combination import Combination


def moments(tensors: Sequence[Tensor], combination: Combination) -> Tensor:
    """Mean and standard deviation of m and of p, (B, 4), float32 (float64 if the outputs are)."""
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)).flatten(1) for tensor in tensors]
    combined = torch.stack([weight * row for weight, row in zip(combination.weights, wide, strict=True)]).sum(dim=0)
    return torch.stack([value for one in (combined, wide[combination.conditional]) for value in (one.mean(dim=1), one.std(dim=1))], dim=1)


def factor_gradients(tensors: Sequence[Tensor], combination: Combination, found: Tensor) -> list[Tensor]:
    """``dF / dm_k`` for every output, (B, ...) each, from `moments`."""
    wide = [tensor.to(found.dtype) for tensor in tensors]
    mean_m, std_m, mean_p, std_p = (value.reshape(-1, *[1] * (tensors[0].dim() - 1)) for value in found.unbind(dim=1))
    combined = torch.stack([weight * row for weight, row in zip(combination.weights, wide, strict=True)]).sum(dim=0)
    divisor = tensors[0][0].numel() - 1
    by_m = -combination.strength * std_p / std_m.square() * (combined - mean_m) / (divisor * std_m)
    by_p = combination.strength / std_m * (wide[combination.conditional] - mean_p) / (divisor * std_p)
    return [weight * by_m + (by_p if k == combination.conditional else 0.0) for k, weight in enumerate(combination.weights)]
