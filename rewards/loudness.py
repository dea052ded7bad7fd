"""Loudness, silence and clipping of audio: a gate that is 1 for audio anybody would publish and falls to 0 outside.

    excess   max(low - rms_dbfs, rms_dbfs - high, 0), in dB
    gate     max(0, 1 - excess / margin), or 1[excess = 0] for margin 0;  0 where too much is silent or clipped

with the level and the shares of ``maths.loudness``.

For use beside a reward that can be won by noise or by nothing at all: as a constraint, a factor or a guard. Silence is a true
observation here, its gate is 0; it has no level, so ``details`` hold -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from visalign.maths.loudness import clipped_fraction, rms_dbfs, silent_fraction
from visalign.protocols import RewardSpec
from visalign.types import Media, Prompt, Scores


class LoudnessGate:
    """1 for audio of a normal level, 0 for silence, noise floors and clipping."""

    spec = RewardSpec(name="loudness_gate", modality=frozenset({"audio"}), raw_range=(0.0, 1.0))

    def __init__(self, low: float = -40.0, high: float = -6.0, *, margin: float = 0.0, silence: float = -60.0,
                 max_silent: float = 0.8, max_clipped: float = 0.01, name: str = "loudness_gate") -> None:
        """
        Args:
            low, high: level in dBFS that counts as normal.
            margin: dB beyond that range over which the gate falls to 0; 0 closes it at once.
            silence: dBFS below which a window of 0.05 s is silent.
            max_silent, max_clipped: shares above which the gate is 0.
        Raises:
            ValueError: an empty range, a negative margin or a share outside [0, 1].
        """
        problems = [] if low < high else [f"low {low} must be below high {high}"]
        problems += [] if 0 <= margin < math.inf else [f"margin {margin} must be 0 or a finite number of dB above"]
        problems += [f"{key} {value} must lie in [0, 1]"
                     for key, value in (("max_silent", max_silent), ("max_clipped", max_clipped)) if not 0 <= value <= 1]
        if problems:
            raise ValueError("; ".join(problems))
        self.low, self.high, self.margin, self.silence = low, high, margin, silence
        self.max_silent, self.max_clipped = max_silent, max_clipped
        self.spec = replace(self.spec, name=name,
                            version=f"{low:g}..{high:g}-{margin:g}-{silence:g}-{max_silent:g}-{max_clipped:g}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One gate per sample; audio that is not finite is invalid."""
        rows = [(rms_dbfs(sample.data), silent_fraction(sample.data, _rate(sample), self.silence), clipped_fraction(sample.data))
                for sample in media]
        columns = torch.tensor(rows, dtype=torch.float32).reshape(-1, 3).unbind(dim=1)
        return Scores.from_values([self._gate(*row) for row in rows],
                                  details=dict(zip(("rms_dbfs", "silent_fraction", "clipped_fraction"), columns, strict=True)))

    def _gate(self, level: float, silent: float, clipped: float) -> float:
        if math.isnan(level):
            return math.nan
        if silent > self.max_silent or clipped > self.max_clipped:
            return 0.0
        excess = max(self.low - level, level - self.high, 0.0)
        return max(0.0, 1 - excess / self.margin) if self.margin else float(excess == 0)


def _rate(sample: Media) -> float:
    if not sample.rate:
        raise ValueError("audio without a rate; set Media.rate to its samples per second")
    return sample.rate
