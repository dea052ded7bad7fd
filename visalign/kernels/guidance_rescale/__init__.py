"""First pass of steps whose guidance is rescaled: one factor per sample. See reference.py for the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.kernels.arguments import C_TYPES, Arguments, Engine, Macros, launch_rows, num_chunks, partials
from visalign.maths.combination import Combination


@dataclass(frozen=True)
class Rescale:
    """Per sample: the ``factor`` (B,), and ``moments`` (B, 4): mean and standard deviation of the combination, then of the conditional."""

    factor: Tensor
    moments: Tensor


def rescale(engine: Engine, tensors: Sequence[Tensor], used: Sequence[int], combination: Combination) -> Rescale:
    """By the kernel, for the ``used`` outputs (B, ...) of a combination with correction "rescale"."""
    first = tensors[used[0]]
    rows, dims = first.shape[0], first[0].numel()
    found = Rescale(*(torch.empty(rows, *shape, dtype=torch.float32, device=first.device) for shape in ((), (4,))))
    macros: Macros = {"NUM_OUTPUTS": len(used), "CONDITIONAL": list(used).index(combination.conditional),
                      "OUTPUT_TYPE": C_TYPES[first.dtype]}
    arguments = (Arguments().rows(*(tensors[k] for k in used)).pointers(partials(first, 4), found.moments, found.factor)
                 .integers(rows, dims, num_chunks(dims)).doubles(combination.strength).floats(*(combination.weights[k] for k in used)))
    launch_rows(engine, "guidance_rescale", "guidance_rescale", macros, arguments, rows, dims, finish=True)
    return found
