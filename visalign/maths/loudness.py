"""How loud audio is, how much of it is silent and how much is clipped.

    rms_dbfs          20 log10 sqrt(mean x^2) over all samples and channels; a sine of amplitude 1 has -3.01, a square wave 0
    silent_fraction   share of windows of 0.05 s whose rms_dbfs is below a level
    clipped_fraction  share of samples with |x| >= 0.999
"""

from __future__ import annotations

import math

from torch import Tensor

_WINDOW_SECONDS = 0.05
_CLIPPED = 0.999


def rms_dbfs(audio: Tensor) -> float:
    """Root mean square of all samples in dB relative to 1, in float64; -inf for digital silence. Any shape but empty."""
    power = float(audio.double().square().mean())
    return 10 * math.log10(power) if power > 0 else (-math.inf if power == 0 else math.nan)


def silent_fraction(audio: Tensor, rate: float, silence: float = -60.0) -> float:
    """Share of windows of 0.05 s, the last one shorter, whose level over all channels (C, T) is below ``silence`` dBFS."""
    windows = audio.split(max(1, round(_WINDOW_SECONDS * rate)), dim=-1)
    return sum(rms_dbfs(window) < silence for window in windows) / len(windows)


def clipped_fraction(audio: Tensor) -> float:
    """Share of samples at full scale."""
    return float((audio.abs() >= _CLIPPED).double().mean())
