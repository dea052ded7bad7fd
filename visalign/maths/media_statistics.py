"""What can be said about media without a model: reward hacking shows here first, as blobs, grids, noise or standstill.

Images and frames are float (n, 3, H, W) in [0, 1]; every function gives one number per picture, (n,).

    edge_density      share of pixels where luminance changes by more than 0.1 from one side to the other
    sharpness         standard deviation of the luminance's Laplacian
    colour_entropy    Shannon entropy in bits of the colours in 8 x 8 x 8 cells, 0 (one colour) to 9 (all equally often)
    saturation        mean of max - min over the colour channels
    motion            mean absolute change from one frame to the next (frames (T, 3, H, W)): one number
    spectral_flatness geometric over arithmetic mean of the power spectrum, 0 for a tone to 1 for white noise: one number

Luminance is ITU-R BT.709's, of gamma-coded values. Edge density as a guard against text and grid hacking: seen in public runs whose OCR
reward rose while the edge density of held-out pictures fell by more than half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d

EDGE = 0.1
CELLS = 8
_LUMA = (0.2126, 0.7152, 0.0722)


def luminance(images: Tensor) -> Tensor:
    """Brightness as the eye weighs it, (n, 1, H, W)."""
    return (images * images.new_tensor(_LUMA).reshape(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def edge_density(images: Tensor) -> Tensor:
    """Share of inner pixels whose Sobel gradient is above 0.1, where a step of luminance from 0 to 1 has gradient 1, in [0, 1]."""
    across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    gradient = _filtered(images, torch.stack([across, across.T]))
    return (gradient.square().sum(dim=1).sqrt() > EDGE).to(images.dtype).mean(dim=(1, 2))


def sharpness(images: Tensor) -> Tensor:
    """Standard deviation of the four-neighbour Laplacian of luminance over inner pixels."""
    laplacian = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return _filtered(images, laplacian[None]).flatten(1).std(dim=1, correction=0)


def colour_entropy(images: Tensor) -> Tensor:
    """Entropy in bits of the histogram over 8 levels of red, green and blue together."""
    level = (images * CELLS).long().clamp(0, CELLS - 1)
    cell = ((level[:, 0] * CELLS + level[:, 1]) * CELLS + level[:, 2]).flatten(1)
    count = torch.zeros(len(images), CELLS**3, dtype=torch.float64).scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.float64))
    share = count / cell.shape[1]
    return -torch.special.xlogy(share, share).sum(dim=1).div(math.log(2)).to(images.dtype)


def saturation(images: Tensor) -> Tensor:
    """Mean distance between the largest and the smallest channel, 0 for grey."""
    return (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))


def motion(frames: Tensor) -> Tensor:
    """Mean absolute change between successive frames, (); 0 for a still and for a single frame."""
    return (frames[1:] - frames[:-1]).abs().mean() if len(frames) > 1 else frames.new_zeros(())


def power_spectrogram(audio: Tensor, window: int = 1024) -> Tensor:
    """Hann windows of up to ``window`` samples, a quarter apart, of audio (C, T), float64 (C, bins, windows)."""
    window = min(window, audio.shape[-1])
    shape = torch.hann_window(window, dtype=torch.float64)
    spectrum = torch.stft(audio.double(), window, max(1, window // 4), window=shape, center=False, return_complex=True)
    return spectrum.abs().square()


def spectral_flatness(audio: Tensor) -> Tensor:
    """Of the power spectrum averaged over windows and channels (C, T), without the constant, (); NaN for digital silence."""
    power = power_spectrogram(audio).mean(dim=(0, 2))[1:]
    floor = power.max() * 1e-12 if len(power) else power.new_zeros(())  # 120 dB down, below what 20-bit audio can hold
    return power.clamp(min=floor).log().mean().exp() / power.mean() if float(floor) > 0 else power.new_tensor(torch.nan)


def thumbnails(images: Tensor, side: int = 8) -> Tensor:
    """Area means on a grid, float64 (n, 3 side^2): what a picture shows when one screws up one's eyes."""
    return adaptive_avg_pool2d(images.double(), side).flatten(1)


def _filtered(images: Tensor, kernels: Tensor) -> Tensor:
    """Luminance seen through 3 x 3 kernels (K, 3, 3), (n, K, H - 2, W - 2)."""
    if min(images.shape[-2:]) < 3:
        raise ValueError(f"pictures of {tuple(images.shape[-2:])} pixels have no inner pixel; at least 3 x 3 are needed")
    return conv2d(luminance(images), kernels[:, None])
