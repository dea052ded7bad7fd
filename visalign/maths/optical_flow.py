"""Optical flow without weights (pyramidal Lucas-Kanade), and what it says about motion: smoothness and amount."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, grid_sample, interpolate, pad


def lucas_kanade(first: Tensor, second: Tensor, iterations: int = 4, window: int = 9, damping: float = 1e-5) -> Tensor:
    """Dense flow F with ``second(p + F(p)) = first(p)``, coarse to fine, in pixels.

        F <- F - (sum_w g g^T + damping I)^{-1} sum_w g (second(p + F) - first),     g = gradient of first, sum_w over a window

    Where the picture is flat nothing can be seen to move and the damping keeps the flow at 0. Motion of up to a tenth of the shorter
    side is found; differentiable in both pictures.

    Args:
        first, second: grey pictures in [0, 1], float (B, H, W).
        iterations: per pyramid level.
        window: width of the averaging window in pixels, odd.
        damping: in squared grey levels; the square of noise that should not look like motion.
    Returns:
        Float (B, 2, H, W): x to the right, y down.
    Raises:
        ValueError: shapes differ or are not of pictures.
    Source: Lucas and Kanade, 1981; the pyramid is Bouguet's, 2001.
    """
    if first.shape != second.shape or first.dim() != 3 or min(first.shape[1:]) < 2:
        raise ValueError(f"pictures are {tuple(first.shape)} and {tuple(second.shape)}; expected two of one shape (B, H, W)")
    num_levels = max(1, int(math.log2(min(first.shape[1:]) / 16)) + 1) if min(first.shape[1:]) > 16 else 1
    pyramid = [(first[:, None], second[:, None])]
    for _ in range(num_levels - 1):
        a, b = pyramid[-1]
        pyramid.append((avg_pool2d(_blur(a, 5), 2), avg_pool2d(_blur(b, 5), 2)))
    flow = torch.zeros_like(pyramid[-1][0]).expand(-1, 2, -1, -1)
    for a, b in reversed(pyramid):
        if flow.shape[-2:] != a.shape[-2:]:
            ratio = torch.tensor([a.shape[-1] / flow.shape[-1], a.shape[-2] / flow.shape[-2]], dtype=a.dtype, device=a.device)
            flow = interpolate(flow, size=a.shape[-2:], mode="bilinear", align_corners=False) * ratio[:, None, None]
        gradient_x, gradient_y = _gradient(a)
        for _ in range(iterations):
            moved, inside = _warp(b, flow)
            change = (moved - a) * inside
            terms = torch.cat([gradient_x**2 * inside, gradient_x * gradient_y * inside, gradient_y**2 * inside,
                               gradient_x * change, gradient_y * change], dim=1)
            xx, xy, yy, x, y = _blur(terms, window).unbind(dim=1)
            xx, yy = xx + damping, yy + damping
            determinant = xx * yy - xy**2
            step = torch.stack([yy * x - xy * y, xx * y - xy * x], dim=1) / determinant[:, None]
            # Linearisation holds for about a pixel; a longer step is noise.
            flow = flow - step.clamp(-1, 1)
    return flow


def motion_smoothness(flows: Tensor) -> Tensor:
    """``1 - mean |F_{t+1} - F_t| / (mean |F_{t+1}| + mean |F_t|)`` in [0, 1], (); 1 where nothing moves.

    Args:
        flows: (T, 2, H, W) with T >= 2.
    """
    jerk = (flows[1:] - flows[:-1]).norm(dim=1).mean()
    speed = flows.norm(dim=1).flatten(1).mean(dim=1)
    return 1 - jerk / (speed[1:] + speed[:-1]).mean().clamp(min=1e-12)


def fastest_motion(flows: Tensor, share: float = 0.05) -> Tensor:
    """Mean over time of the mean length of the largest ``share`` of flow vectors, in pixels per frame, (); flows (T, 2, H, W)."""
    lengths = flows.norm(dim=1).flatten(1)
    return lengths.topk(max(1, math.ceil(share * lengths.shape[1])), dim=1).values.mean()


def _blur(pictures: Tensor, width: int) -> Tensor:
    """Separable Gaussian of ``width`` pixels, edges repeated; (B, C, H, W)."""
    offsets = torch.arange(width, dtype=pictures.dtype, device=pictures.device) - width // 2
    kernel = torch.exp(-0.5 * (offsets / (width / 4)) ** 2)
    kernel = kernel / kernel.sum()
    planes = pictures.flatten(0, 1)[:, None]
    planes = conv2d(pad(planes, (width // 2, width // 2, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    planes = conv2d(pad(planes, (0, 0, width // 2, width // 2), mode="replicate"), kernel.view(1, 1, -1, 1))
    return planes[:, 0].unflatten(0, pictures.shape[:2])


def _gradient(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y, edges repeated; (B, 1, H, W) each."""
    wide = pad(pictures, (1, 1, 1, 1), mode="replicate")
    return (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2, (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2


def _warp(pictures: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """``pictures`` read at p + flow(p), bilinear, and where that is inside, both (B, 1, H, W)."""
    height, width = pictures.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height, dtype=flow.dtype, device=flow.device),
                          torch.arange(width, dtype=flow.dtype, device=flow.device), indexing="ij")
    x, y = x + flow[:, 0], y + flow[:, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    inside = ((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))[:, None]
    return grid_sample(pictures, grid, padding_mode="border", align_corners=True), inside.to(pictures.dtype)
