"""``paired_error`` by its kernels: what they are handed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.kernels.arguments import C_TYPES, Arguments, Engine, Macros, check_alike, launch_rows, num_chunks, partials
from visalign.kernels.paired_error.formula import PairCoefficients, PairFormula, coefficients

SOURCE = "paired_error"


@dataclass(frozen=True)
class Inputs:
    """The operator's tensors, each (B, ...); ``reference`` is empty and ``mask`` ``None`` where there are none."""

    x0: Tensor
    noise: Tensor
    outputs: Sequence[Tensor]
    reference: Sequence[Tensor]
    mask: Tensor | None


@dataclass(frozen=True)
class Found:
    """Each float32 (B,), empty where not wanted; ``count`` of the elements that entered the means."""

    error: Tensor
    error_reference: Tensor
    gap: Tensor
    norm: Tensor
    norm_reference: Tensor
    count: Tensor


def run(engine: Engine, given: Inputs, formula: PairFormula, norms: bool) -> Found:
    """The forward pass.

    Raises:
        ValueError: a mask that is not boolean, or a tensor of another shape or device than x0.
    """
    if given.mask is not None and given.mask.dtype != torch.bool:  # its bytes are read
        raise ValueError(f"a mask of valid elements must be bool, got {given.mask.dtype}; compare it with a threshold first")
    mask = None if given.mask is None else given.mask.expand(given.x0.shape)
    check_alike(given.x0, noise=given.noise, outputs=given.outputs, reference=given.reference, mask=mask)
    found = empty(given, norms)
    if given.x0.numel() == 0:
        return found
    scalars, held = coefficients(formula), bool(given.reference)
    sums = partials(given.x0, 1 + 2 * held + norms * (1 + held) + (given.mask is not None))
    arguments = _arguments(given, scalars, found, sums, None, [])
    launch_rows(engine, SOURCE, SOURCE, _macros(given, scalars, norms), arguments, *_size(given), finish=True)
    return found


def run_backward(engine: Engine, given: Inputs, formula: PairFormula, count: Tensor, slopes: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of the outputs, from those of ``error`` and ``gap``."""
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in given.outputs]
    scalars = coefficients(formula)
    for k, grad in enumerate(grads):
        if k not in scalars.used:
            grad.zero_()
    if given.x0.numel() == 0:
        return grads
    nothing = given.x0.new_empty(0, dtype=torch.float32)
    found = Found(nothing, nothing, nothing, nothing, nothing, count)
    arguments = _arguments(given, scalars, found, None, slopes, grads)
    launch_rows(engine, SOURCE, f"{SOURCE}_backward", _macros(given, scalars, False), arguments, *_size(given))
    return grads


def empty(given: Inputs, norms: bool) -> Found:
    """Room for the results."""

    def room(wanted: bool) -> Tensor:
        return given.x0.new_empty(given.x0.shape[:1] if wanted else (0,), dtype=torch.float32)

    held = bool(given.reference)
    return Found(room(True), room(held), room(held), room(norms), room(norms and held), room(True))


def _size(given: Inputs) -> tuple[int, int]:
    return given.x0.shape[0], math.prod(given.x0.shape[1:])


def _macros(given: Inputs, scalars: PairCoefficients, norms: bool) -> Macros:
    return {"NUM_OUTPUTS": len(scalars.used), "OUTPUT_TYPE": C_TYPES[given.outputs[0].dtype], "USES_X0": int(scalars.uses_x0),
            "USES_NOISE": int(scalars.uses_noise), "HAS_REFERENCE": int(bool(given.reference)), "HAS_MASK": int(given.mask is not None),
            "NORMS": int(norms)}


def _arguments(given: Inputs, scalars: PairCoefficients, found: Found, sums: Tensor | None, slopes: tuple[Tensor, Tensor] | None,
               grads: Sequence[Tensor]) -> Arguments:
    """The structure of paired_error.cu, which all its kernels share."""
    (rows, dims), used = _size(given), scalars.used
    table = scalars.table.float().contiguous().to(given.x0.device, non_blocking=True)  # else the host would wait for the whole stream
    mask = None if given.mask is None else given.mask.expand(given.x0.shape)
    g = (None, None) if slopes is None else tuple(slope.contiguous() for slope in slopes)
    return (Arguments().rows(given.x0.float()).rows(given.noise.float()).rows(mask).rows(*(given.outputs[k] for k in used))
            .rows(*([given.reference[k] for k in used] if given.reference else [None])).pointers(table, sums)
            .pointers(found.error, found.error_reference, found.gap, found.norm, found.norm_reference, found.count).pointers(*g)
            .pointers(*(grads[k] if grads else None for k in used)).integers(rows, dims, num_chunks(dims)))
