"""Which frames of a video are looked at."""

from __future__ import annotations

from torch import Tensor

from visalign.media import evenly_spaced


def at_rate(length: int, fps: float, rate: float, least: int = 4) -> Tensor:
    """Indices of evenly spaced frames, ``rate`` of them per second: an even number and at least ``least``, as far as there are so many.

    Qwen2-VL's video part looks at pairs of frames, and the reward models on it were trained so.
    """
    wanted = max(least, int(length / fps * rate))
    return evenly_spaced(length, max(min(wanted, length) // 2 * 2, 1))
