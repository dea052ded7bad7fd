"""``transition_log_prob``: density and divergences of a stored step from the network's outputs, forward and backward, without materialising
a mean or a velocity. See reference.py for the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visalign.kernels.arguments import as_tuple, no_second_derivative
from visalign.kernels.backend import Backend, resolve
from visalign.kernels.formula import SCHEMA, StepFormula, training_obstacle
from visalign.kernels.guidance_rescale.reference import moments
from visalign.kernels.launch import engine_of
from visalign.kernels.transition_log_prob.fused import Found, Inputs, Slopes, empty, rescales, run, run_backward
from visalign.kernels.transition_log_prob.reference import StepTerms, backward, reference
from visalign.maths.outputs import Outputs
from visalign.types import Transition

OPERATOR = "transition_log_prob"


def transition_log_prob(outputs: Outputs, x: Tensor, x_next: Tensor, transition: Transition, *, reference_outputs: Outputs | None = None,
                        velocity_old: Tensor | None = None, backend: Backend = "auto") -> StepTerms:
    """Log-probability of a stored step, differentiable in ``outputs``, and in the same pass how far the step is from two others.

    Args:
        outputs: of the network that trains, at state x (B, ...).
        x_next: the state that followed, (B, ...).
        transition: the step's scalars, ``std > 0``.
        reference_outputs: of the reference at the same x, read in the same way; for ``kl_reference``.
        velocity_old: velocity predicted when the step was sampled, (B, ...); for ``kl_old`` and ``output_gap``.
        backend: see `visalign.kernels.backend`.
    Raises:
        ValueError: a deterministic step, a gradient asked for in anything but ``outputs``, or a backend that is not possible.
    """
    if not transition.std > 0:
        raise ValueError("std must be > 0, got 0: a deterministic step has no density; leave it out of the trained steps")
    held = () if reference_outputs is None else reference_outputs.tensors
    constants = [x, x_next, *held, *([] if velocity_old is None else [velocity_old])]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in constants):
        raise ValueError("transition_log_prob is differentiated in the policy's outputs alone; detach x, x_next, the reference's outputs "
                         "and the old velocity")
    if resolve(backend, OPERATOR, [*outputs.tensors, *constants], training_obstacle(outputs, reference_outputs)) == "torch":
        return reference(outputs, x, x_next, transition, reference_outputs, velocity_old)
    density, kl_reference, kl_old, gap, *_ = torch.ops.visalign.transition_log_prob(
        x, x_next, list(outputs.tensors), list(held), velocity_old, *StepFormula.of(outputs, transition).flat())
    return StepTerms(density, None if reference_outputs is None else kl_reference, None if velocity_old is None else kl_old,
                     None if velocity_old is None else gap.detach())


_TENSORS = "Tensor x, Tensor x_next, Tensor[] outputs, Tensor[] reference, Tensor? velocity_old"
torch.library.define("visalign::transition_log_prob", f"({_TENSORS}, {SCHEMA}) -> (Tensor log_prob, Tensor kl_reference, Tensor kl_old, "
                     "Tensor output_gap, Tensor moments, Tensor factor, Tensor reference_factor)")
torch.library.define("visalign::transition_log_prob_backward", "(Tensor grad_log_prob, Tensor grad_kl_reference, Tensor grad_kl_old, "
                     f"Tensor moments, Tensor factor, Tensor reference_factor, {_TENSORS}, {SCHEMA}) -> Tensor[]")

def _cuda(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return as_tuple(run(engine_of(x.device), Inputs(x, *rest[:4]), StepFormula.from_flat(*rest[4:])))


def _cpu(*arguments: Any) -> tuple[Tensor, ...]:
    given, formula = Inputs(*arguments[:5]), StepFormula.from_flat(*arguments[5:])
    outputs, held = formula.outputs(given.outputs), formula.outputs(given.reference) if given.reference else None
    terms = reference(outputs, given.x, given.x_next, formula.transition, held, given.velocity_old)
    rescaled: list[Tensor | None] = [None, None, None]
    if formula.readout is not None and rescales(formula):
        how = formula.readout.combination
        both = [moments(tensors, how) for tensors in (given.outputs, given.reference) if tensors]
        rescaled = [both[0], *(how.strength * one[:, 3] / one[:, 1] + 1 - how.strength for one in both), None][:3]
    values = (terms.log_prob, terms.kl_reference, terms.kl_old, terms.output_gap, *rescaled)
    return tuple(room if value is None else room.copy_(value) for room, value in zip(as_tuple(empty(given, formula)), values, strict=True))


@torch.library.register_fake("visalign::transition_log_prob")
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    return as_tuple(empty(Inputs(*arguments[:5]), StepFormula.from_flat(*arguments[5:])))


def _backward_cuda(*arguments: Any) -> list[Tensor]:
    slopes, rescaled, given = Slopes(*arguments[:3]), arguments[3:6], Inputs(*arguments[6:11])
    nothing = given.x.new_empty(0, dtype=torch.float32)
    found = Found(nothing, nothing, nothing, nothing, *rescaled)
    return run_backward(engine_of(given.x.device), given, StepFormula.from_flat(*arguments[11:]), found, slopes)


def _backward_cpu(grad_log_prob: Tensor, grad_kl_reference: Tensor, grad_kl_old: Tensor, saved: Tensor, factor: Tensor,
                  held_factor: Tensor, x: Tensor, x_next: Tensor, outputs: list[Tensor], held: list[Tensor], velocity_old: Tensor | None,
                  *flat: Any) -> list[Tensor]:
    return backward(StepFormula.from_flat(*flat), x, x_next, outputs, held, velocity_old, grad_log_prob, grad_kl_reference, grad_kl_old,
                    saved, (factor, held_factor))


@torch.library.register_fake("visalign::transition_log_prob_backward")
def _backward_fake(*arguments: Any) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in arguments[8]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, x_next, outputs, held, velocity_old, *ctx.flat = inputs
    ctx.counts, ctx.has_old = (len(outputs), len(held)), velocity_old is not None
    ctx.save_for_backward(*output[4:], x, x_next, *outputs, *held, *([velocity_old] if ctx.has_old else []))


def _backward(ctx: Any, grad_log_prob: Tensor, grad_kl_reference: Tensor, grad_kl_old: Tensor, *others: Any) -> tuple[Any, ...]:
    saved, (num, num_held) = ctx.saved_tensors, ctx.counts
    rescaled, (x, x_next), rest = saved[:3], saved[3:5], saved[5:]
    grads = torch.ops.visalign.transition_log_prob_backward(
        grad_log_prob, grad_kl_reference, grad_kl_old, *rescaled, x, x_next, list(rest[:num]), list(rest[num:num + num_held]),
        rest[-1] if ctx.has_old else None, *ctx.flat)
    # torch.library takes an empty list for a list of tensors, whose gradient is one.
    return None, None, grads, [None] * num_held, None, *([] if value == [] else None for value in ctx.flat)


torch.library.impl("visalign::transition_log_prob", "cuda", _cuda)
torch.library.impl("visalign::transition_log_prob", "cpu", _cpu)
torch.library.impl("visalign::transition_log_prob_backward", "cuda", _backward_cuda)
torch.library.impl("visalign::transition_log_prob_backward", "cpu", _backward_cpu)
torch.library.register_autograd("visalign::transition_log_prob", _backward, setup_context=_setup)
torch.library.register_autograd("visalign::transition_log_prob_backward", no_second_derivative)
