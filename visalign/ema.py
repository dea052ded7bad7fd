"""Exponential moving average of the trained weights.

    shadow <- shadow + (1 - d_i) (theta - shadow),    d_i = min((1 + i) / (10 + i), decay)

``i`` counts optimizer steps, not micro-batches. The warm-up lets a short run's average forget its start. Source of the warm-up:
the averaging used by flow_grpo and, before it, TensorFlow's ``ExponentialMovingAverage``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """Decay used at optimizer step ``step`` = 0, 1, ...: 0.1 at first, ``decay`` in the end."""
    return min((1 + step) / (10 + step), decay)


class EMA:
    """Shadow copies of named parameters.

    Attributes:
        shadow: the averages, float32, by parameter name, on the parameters' devices.
        num_steps: optimizer steps averaged so far.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must lie in [0, 1), got {decay}; 0.9 averages over about 10 optimizer steps, 0.99 over about 100")
        self.decay = decay
        self.num_steps = 0
        # float32: in bfloat16 an increment of (1 - 0.999) x the difference rounds to nothing.
        self.shadow = {name: parameter.detach().to(torch.float32, copy=True) for name, parameter in parameters.items()}

    @torch.no_grad()
    def step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move the average towards the weights; call once per optimizer step."""
        weight = 1.0 - decay_at(self.num_steps, self.decay)
        for name, average in self.shadow.items():
            average.lerp_(parameters[name].detach().float(), weight)
        self.num_steps += 1

    @contextlib.contextmanager
    def swapped(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Run a block with the averages as weights; afterwards the weights are bit for bit what they were."""
        # clone(): on the CPU, .cpu() of a CPU tensor is the tensor itself, and restoring from it would restore nothing.
        saved = {name: parameters[name].detach().clone() for name in self.shadow}
        self._copy_to(parameters, self.shadow)
        try:
            yield
        finally:
            self._copy_to(parameters, saved)

    def restore(self, shadow: Mapping[str, Tensor], num_steps: int) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: the names differ from the trained weights'.
        """
        if shadow.keys() != self.shadow.keys():
            raise ValueError(f"the saved average has {len(shadow)} tensors, the trained weights {len(self.shadow)}; names that "
                             f"differ: {sorted(shadow.keys() ^ self.shadow.keys())[:4]}; resume with the trainable settings the run "
                             "was started with")
        for name, average in self.shadow.items():
            average.copy_(shadow[name])
        self.num_steps = num_steps

    @staticmethod
    @torch.no_grad()
    def _copy_to(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)
