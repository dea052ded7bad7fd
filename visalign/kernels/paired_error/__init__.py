"""``paired_error``: squared errors of policy and reference on noised samples from the network's outputs, forward and backward, the target
made of (x0, noise, level) on the fly. See reference.py for the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.kernels.arguments import as_tuple, no_second_derivative
from visalign.kernels.backend import Backend, resolve
from visalign.kernels.formula import training_obstacle
from visalign.kernels.launch import engine_of
from visalign.kernels.paired_error.formula import SCHEMA, PairFormula
from visalign.kernels.paired_error.fused import Inputs, empty, run, run_backward
from visalign.kernels.paired_error.reference import PairedErrors, backward, check_mask, reference
from visalign.maths.outputs import Outputs
from visalign.types import PredictionKind

OPERATOR = "paired_error"


def paired_error(outputs: Outputs, x: Tensor, x0: Tensor, noise: Tensor, *, space: PredictionKind, sigma_data: float = 0.5,
                 reference_outputs: Outputs | None = None, mask: Tensor | None = None, gap: bool = False, norms: bool = False,
                 backend: Backend = "auto") -> PairedErrors:
    """Errors on noised samples, differentiable in ``outputs``.

    Args:
        outputs: of the network that trains, at ``x = alpha x0 + sigma noise`` (B, ...), with one level per sample.
        x0, noise: float32 (B, ...), what should have been said.
        space, sigma_data: the kind of prediction whose error counts.
        reference_outputs: of the reference at the same x, read in the same way.
        mask: bool, broadcastable to (B, ...): the elements that count in the errors and the gap.
        gap, norms: what to return besides.
        backend: see `visalign.kernels.backend`.
    Raises:
        ValueError: a mask without a true element in some sample, a gradient asked for in anything but ``outputs``, or a backend that is
            not possible.
    """
    held = () if reference_outputs is None else reference_outputs.tensors
    constants = [x, x0, noise, *held]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in constants):
        raise ValueError("paired_error is differentiated in the policy's outputs alone; detach x, x0, noise and the reference's outputs")
    if resolve(backend, OPERATOR, [*outputs.tensors, x0, noise, *held], _obstacle(outputs, reference_outputs)) == "torch":
        return reference(outputs, x, x0, noise, space, sigma_data, reference_outputs, mask, gap, norms)
    if mask is not None:
        check_mask(mask.expand(x0.shape).flatten(1).sum(dim=1))
    formula = PairFormula(_per_sample(outputs.alpha, x0), _per_sample(outputs.sigma, x0), outputs.readout, space, sigma_data)
    error, error_reference, distance, norm, norm_reference, _ = torch.ops.visalign.paired_error(
        x, x0, noise, list(outputs.tensors), list(held), mask, norms, *formula.flat())
    paired = reference_outputs is not None
    return PairedErrors(error, error_reference.detach() if paired else None, distance if paired and gap else None,
                        norm.detach() if norms else None, norm_reference.detach() if paired and norms else None)


def _per_sample(level: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(level).expand(like.shape[:1])


def _obstacle(outputs: Outputs, held: Outputs | None) -> str | None:
    if outputs.readout is not None and outputs.readout.combination.correction != "none":
        return f"the guidance correction '{outputs.readout.combination.correction}' is not fused"
    return training_obstacle(outputs, held)


_TENSORS = "Tensor x0, Tensor noise, Tensor[] outputs, Tensor[] reference, Tensor? mask"
torch.library.define("visalign::paired_error", f"(Tensor x, {_TENSORS}, bool norms, {SCHEMA}) -> (Tensor error, Tensor error_reference, "
                     "Tensor gap, Tensor norm, Tensor norm_reference, Tensor count)")
torch.library.define("visalign::paired_error_backward", f"(Tensor grad_error, Tensor grad_gap, Tensor count, {_TENSORS}, {SCHEMA}) "
                     "-> Tensor[]")


def _cuda(x: Tensor, x0: Tensor, noise: Tensor, outputs: list[Tensor], held: list[Tensor], mask: Tensor | None, norms: bool,
          *flat: Any) -> tuple[Tensor, ...]:
    return as_tuple(run(engine_of(x0.device), Inputs(x0, noise, outputs, held, mask), PairFormula.from_flat(*flat), norms))


def _cpu(x: Tensor, x0: Tensor, noise: Tensor, outputs: list[Tensor], held: list[Tensor], mask: Tensor | None, norms: bool,
         *flat: Any) -> tuple[Tensor, ...]:
    formula = PairFormula.from_flat(*flat)
    found = reference(formula.outputs(outputs), x, x0, noise, formula.space, formula.sigma_data,
                      formula.outputs(held) if held else None, mask, True, norms)
    count = torch.full(x0.shape[:1], x0[0].numel()) if mask is None else mask.expand(x0.shape).flatten(1).sum(dim=1)
    values = (found.policy, found.reference, found.gap, found.norm_policy, found.norm_reference, count)
    rooms = as_tuple(empty(Inputs(x0, noise, outputs, held, mask), norms))
    return tuple(room if value is None else room.copy_(value) for room, value in zip(rooms, values, strict=True))


@torch.library.register_fake("visalign::paired_error")
def _fake(x: Tensor, x0: Tensor, noise: Tensor, outputs: list[Tensor], held: list[Tensor], mask: Tensor | None, norms: bool,
          *flat: Any) -> tuple[Tensor, ...]:
    return as_tuple(empty(Inputs(x0, noise, outputs, held, mask), norms))


def _backward_cuda(grad_error: Tensor, grad_gap: Tensor, count: Tensor, x0: Tensor, noise: Tensor, outputs: list[Tensor],
                   held: list[Tensor], mask: Tensor | None, *flat: Any) -> list[Tensor]:
    return run_backward(engine_of(x0.device), Inputs(x0, noise, outputs, held, mask), PairFormula.from_flat(*flat), count,
                        (grad_error, grad_gap))


def _backward_cpu(grad_error: Tensor, grad_gap: Tensor, count: Tensor, x0: Tensor, noise: Tensor, outputs: list[Tensor],
                  held: list[Tensor], mask: Tensor | None, *flat: Any) -> list[Tensor]:
    return backward(PairFormula.from_flat(*flat), x0, noise, outputs, held, mask, grad_error, grad_gap, count)


@torch.library.register_fake("visalign::paired_error_backward")
def _backward_fake(grad_error: Tensor, grad_gap: Tensor, count: Tensor, x0: Tensor, noise: Tensor, outputs: list[Tensor],
                   *rest: Any) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in outputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x0, noise, outputs, held, mask, _, alpha, sigma, *ctx.flat = inputs
    ctx.counts, ctx.has_mask = (len(outputs), len(held)), mask is not None
    ctx.save_for_backward(output[-1], alpha, sigma, x0, noise, *outputs, *held, *([mask] if ctx.has_mask else []))


def _backward(ctx: Any, grad_error: Tensor, grad_error_reference: Tensor, grad_gap: Tensor, *others: Any) -> tuple[Any, ...]:
    count, alpha, sigma, x0, noise, *rest = ctx.saved_tensors
    num, num_held = ctx.counts
    held: Sequence[Tensor] = rest[num:num + num_held]
    grads = torch.ops.visalign.paired_error_backward(grad_error, grad_gap, count, x0, noise, rest[:num], held,
                                                     rest[-1] if ctx.has_mask else None, alpha, sigma, *ctx.flat)
    return None, None, None, grads, [None] * num_held, None, None, None, None, *[None] * len(ctx.flat)


torch.library.impl("visalign::paired_error", "cuda", _cuda)
torch.library.impl("visalign::paired_error", "cpu", _cpu)
torch.library.impl("visalign::paired_error_backward", "cuda", _backward_cuda)
torch.library.impl("visalign::paired_error_backward", "cpu", _backward_cpu)
torch.library.register_autograd("visalign::paired_error", _backward, setup_context=_setup)
torch.library.register_autograd("visalign::paired_error_backward", no_second_derivative)
