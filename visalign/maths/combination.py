"""How guidance combines a denoiser's predictions into one model output ``m``.

Linear guidance is a weighted sum (-3.5 and 4.5 for scale 4.5; 1 without guidance; -1 for a negated output). Three published nonlinear
corrections multiply that sum by a factor that depends on the conditional prediction ``p``:

    rescale       m * (phi std(p) / std(m) + 1 - phi)            guidance_rescale, arXiv:2305.08891 eq. 15-16
    token norm    m * |p|_token / |m|_token                      true CFG of Qwen-Image
    norm cap      m * min(1, c |p| / |m|)                        cfg_normalization of Z-Image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Correction = Literal["none", "rescale", "token norm", "norm cap"]


@dataclass(frozen=True)
class Combination:
    """``model output = correction(sum_r weights[r] prediction_r) + state_weight * state``.

    Attributes:
        weights: one per prediction row of the step, in call order.
        state_weight: weight of the state itself, 0 unless the pipeline preconditions by hand.
        correction, conditional, strength: the nonlinear factor, the row it compares with, and its parameter.
        axis, profile: when weights differ along one axis of the state (guidance per frame or on some channels), that axis of (B, ...)
            and each row's weights along it; ``weights`` are then their largest magnitudes.
        residual: relative residual of the fit.
    """

    weights: tuple[float, ...]
    state_weight: float = 0.0
    correction: Correction = "none"
    conditional: int = 0
    strength: float = 0.0
    axis: int | None = None
    profile: tuple[tuple[float, ...], ...] = ()
    residual: float = 0.0

    def __call__(self, predictions: Sequence[Tensor], state: Tensor) -> Tensor:
        """Combine rows of shape (B, ...) at state (B, ...); differentiable."""
        if self.axis is not None:
            shape = [-1 if axis == self.axis else 1 for axis in range(state.ndim)]
            shaped = [torch.tensor(weights).to(state).reshape(shape) for weights in self.profile]
            return torch.stack([weights * row for weights, row in zip(shaped, predictions, strict=True)]).sum(dim=0)
        used = [(weight, row) for weight, row in zip(self.weights, predictions, strict=True) if weight != 0]
        out = used[0][1] if used[0][0] == 1 else used[0][0] * used[0][1]
        for weight, row in used[1:]:
            out = out + weight * row
        if self.correction != "none":
            out = out * factor(self.correction, out, predictions[self.conditional], self.strength)
        return out if self.state_weight == 0 else out + self.state_weight * state

    def describe(self) -> str:
        if self.axis is not None:
            return " ".join(f"{row[0]:+.4g}..{row[-1]:+.4g}" for row in self.profile) + f" along axis {self.axis}"
        text = " ".join(f"{weight:+.4g}" for weight in self.weights)
        if self.correction != "none":
            text += f" with {self.correction}" + (f" {self.strength:.3g}" if self.strength else "")
        return text + (f", state {self.state_weight:+.4g}" if self.state_weight else "")


def factor(correction: Correction, combined: Tensor, conditional: Tensor, strength: float) -> Tensor:
    """The multiplier of a nonlinear correction, broadcastable to (B, ...)."""
    inner = tuple(range(1, combined.ndim))
    if correction == "rescale":
        ratio = conditional.std(dim=inner, keepdim=True) / combined.std(dim=inner, keepdim=True)
        return strength * ratio + (1 - strength)
    if correction == "token norm":
        return conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
    norms = [torch.linalg.vector_norm(value, dim=inner, keepdim=True) for value in (conditional, combined)]
    return (strength * norms[0] / norms[1]).clamp(max=1.0)
