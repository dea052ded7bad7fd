"""``transition_log_prob`` by its kernels: what they are handed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.kernels.arguments import C_TYPES, Arguments, Engine, Macros, check_alike, launch_rows, num_chunks, partials
from visalign.kernels.formula import StepFormula, mean_and_velocity
from visalign.kernels.guidance_rescale import rescale
from visalign.maths.gaussian import state_coefficients
from visalign.types import NoiseLevel

SOURCE = "transition_log_prob"


@dataclass(frozen=True)
class Inputs:
    """The operator's tensors; ``reference`` is empty and ``velocity_old`` ``None`` where there are none."""

    x: Tensor
    x_next: Tensor
    outputs: Sequence[Tensor]
    reference: Sequence[Tensor]
    velocity_old: Tensor | None


@dataclass(frozen=True)
class Found:
    """Each (B,), and ``moments`` (B, 4), of `guidance_rescale`; empty where there is none."""

    log_prob: Tensor
    kl_reference: Tensor
    kl_old: Tensor
    output_gap: Tensor
    moments: Tensor
    factor: Tensor
    reference_factor: Tensor


@dataclass(frozen=True)
class Slopes:
    """Gradients of the loss with respect to ``log_prob``, ``kl_reference`` and ``kl_old``, each (B,) or empty."""

    log_prob: Tensor
    kl_reference: Tensor
    kl_old: Tensor


def run(engine: Engine, given: Inputs, formula: StepFormula) -> Found:
    """The forward pass."""
    check_alike(given.x, x_next=given.x_next, outputs=given.outputs, reference=given.reference, velocity_old=given.velocity_old)
    found = empty(given, formula)
    if given.x.numel() == 0:
        return found
    if rescales(formula):
        assert formula.readout is not None
        combination = formula.readout.combination
        own = rescale(engine, given.outputs, formula.used, combination)
        held = rescale(engine, given.reference, formula.used, combination).factor if given.reference else found.reference_factor
        found = Found(found.log_prob, found.kl_reference, found.kl_old, found.output_gap, own.moments, own.factor, held)
    sums = partials(given.x, 1 + bool(given.reference) + 2 * (given.velocity_old is not None))
    arguments = _arguments(given, formula, found, sums, None, None, [])
    launch_rows(engine, SOURCE, SOURCE, _macros(given, formula), arguments, *_size(given), finish=True)
    return found


def run_backward(engine: Engine, given: Inputs, formula: StepFormula, found: Found, slopes: Slopes) -> list[Tensor]:
    """Gradients of the outputs; ``found`` needs only what a guidance correction left there."""
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in given.outputs]
    for k, grad in enumerate(grads):
        if k not in formula.used:
            grad.zero_()
    if given.x.numel() == 0:
        return grads
    of_factor = sums = None
    if rescales(formula):
        of_factor, sums = torch.empty_like(found.factor), partials(given.x, 1)
    macros, arguments = _macros(given, formula), _arguments(given, formula, found, sums, slopes, of_factor, grads)
    if rescales(formula):
        launch_rows(engine, SOURCE, f"{SOURCE}_factor", macros, arguments, *_size(given), finish=True)
    launch_rows(engine, SOURCE, f"{SOURCE}_backward", macros, arguments, *_size(given))
    return grads


def empty(given: Inputs, formula: StepFormula) -> Found:
    """Room for the results."""
    batch = given.x.shape[0]

    def room(wanted: bool, *shape: int) -> Tensor:
        return given.x.new_empty((batch, *shape) if wanted else (0,), dtype=torch.float32)

    old, reference, corrected = given.velocity_old is not None, bool(given.reference), rescales(formula)
    return Found(room(True), room(reference), room(old), room(old), room(corrected, 4), room(corrected), room(corrected and reference))


def rescales(formula: StepFormula) -> bool:
    """Whether guidance is rescaled."""
    return formula.readout is not None and formula.readout.combination.correction == "rescale"


def _size(given: Inputs) -> tuple[int, int]:
    return given.x.shape[0], math.prod(given.x.shape[1:])


def _macros(given: Inputs, formula: StepFormula) -> Macros:
    of_mean, of_velocity = mean_and_velocity(formula)
    conditional = formula.used.index(formula.readout.combination.conditional) if formula.readout is not None and rescales(formula) else 0
    return {"NUM_OUTPUTS": len(formula.used), "X_TYPE": C_TYPES[given.x.dtype], "NEXT_TYPE": C_TYPES[given.x_next.dtype],
            "OUTPUT_TYPE": C_TYPES[given.outputs[0].dtype], "USES_X": int(of_mean.x != 0 or of_velocity.x != 0),
            "HAS_REFERENCE": int(bool(given.reference)), "HAS_OLD": int(given.velocity_old is not None),
            "RESCALE": int(rescales(formula)), "CONDITIONAL": conditional}


def _arguments(given: Inputs, formula: StepFormula, found: Found, sums: Tensor | None, slopes: Slopes | None, of_factor: Tensor | None,
               grads: Sequence[Tensor]) -> Arguments:
    """The structure of transition_log_prob.cu, which all its kernels share."""
    of_mean, of_velocity = mean_and_velocity(formula)
    used, std, (rows, dims) = formula.used, formula.transition.std, _size(given)
    _, c_v = state_coefficients(NoiseLevel(formula.alpha, formula.sigma), formula.transition)
    old = None if given.velocity_old is None else given.velocity_old.float()
    combination = None if formula.readout is None else formula.readout.combination
    g = (None, None, None) if slopes is None else (slopes.log_prob, slopes.kl_reference, slopes.kl_old)
    return (Arguments().rows(given.x).rows(given.x_next).rows(old).rows(*(given.outputs[k] for k in used))
            .rows(*([given.reference[k] for k in used] if given.reference else [None]))
            .pointers(found.factor, found.reference_factor, found.moments, sums)
            .pointers(found.log_prob, found.kl_reference, found.kl_old, found.output_gap)
            .pointers(*(None if value is None else value.contiguous() for value in g)).pointers(of_factor)
            .pointers(*(grads[k] if grads else None for k in used)).integers(rows, dims, num_chunks(dims))
            .doubles(-0.5 / std**2, -dims * (math.log(std) + 0.5 * math.log(2 * math.pi)), 0.5 * (c_v / std) ** 2,
                     0.0 if combination is None else combination.strength)
            .floats(of_mean.x, *of_mean.outputs, of_velocity.x, *of_velocity.outputs, 1 / std**2, (c_v / std) ** 2)
            .floats(*(1.0 if combination is None else combination.weights[k] for k in used)))
