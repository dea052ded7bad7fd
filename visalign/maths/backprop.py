"""Gradients through the last operation of every decoder: clamping pixels to their range.

A clamp has no gradient outside its range, so a saturated pixel could never be corrected. The identity's gradient has no such holes, but
rewards the direction in which nothing changes any more: latents would drift. Here a saturated pixel has the gradient that brings it back

    dL/dx = dL/dy            inside [low, high]
    dL/dx = max(dL/dy, 0)    above: descent lowers x
    dL/dx = min(dL/dy, 0)    below: descent raises x

which presumes that ``L`` is minimised; values are those of the plain clamp, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PIXEL_RANGES = ((0.0, 1.0), (-1.0, 1.0))
_CLAMPS = (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip)


def returning_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """``x.clamp(low, high)`` whose gradient can bring values back into the range, see the module's table.

    Raises:
        ValueError: an empty range.
    """
    if not low < high:
        raise ValueError(f"returning_clamp needs low < high, got {low} and {high}")
    return _ReturningClamp.apply(x, low, high)  # type: ignore[no-any-return]


class _ReturningClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x > high, x < low)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        above, below = ctx.saved_tensors
        grad = grads[0]
        return grad.masked_fill((above & (grad < 0)) | (below & (grad > 0)), 0.0), None, None


class ReturningClamps(TorchFunctionMode):
    """A context in which every clamp of floats to [0, 1] or [-1, 1] is a `returning_clamp`: other people's decoders keep their gradient.

    Clamps to other ranges (of exponents, of norms) and in place are left alone.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        keywords = dict(kwargs or {})
        if func in _CLAMPS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            bounds = dict(zip(("min", "max"), args[1:], strict=False)) | keywords
            for low, high in PIXEL_RANGES:
                if bounds == {"min": low, "max": high}:
                    return returning_clamp(args[0], low, high)
        return func(*args, **keywords)
