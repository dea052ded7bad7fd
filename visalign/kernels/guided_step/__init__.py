"""``guided_step``: one sampler step from the network's outputs to the stored state, in one pass. See reference.py for the formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.kernels.arguments import C_TYPES, Arguments, Engine, Macros, check_alike, launch_rows, num_chunks, partials
from visalign.kernels.backend import DTYPES, Backend, resolve
from visalign.kernels.formula import SCHEMA, StepFormula, mean_and_velocity, obstacle
from visalign.kernels.guidance_rescale import rescale
from visalign.kernels.guided_step.reference import Step, reference
from visalign.kernels.launch import engine_of
from visalign.maths.outputs import Outputs
from visalign.types import Transition

OPERATOR = "guided_step"


def guided_step(outputs: Outputs, x: Tensor, transition: Transition, *, noise: Tensor | None = None, seeds: Tensor | None = None,
                storage_dtype: torch.dtype | None = None, log_prob: bool = False, velocity: bool = False, mean: bool = False,
                backend: Backend = "auto") -> Step:
    """Take one step; for sampling, so nothing is differentiable on the CUDA backend.

    Args:
        outputs, x: what the network said about the state (B, ...).
        transition: the step's scalars.
        noise: N(0, I), (B, ...), for ``std > 0``.
        seeds: int64 (B,) in place of ``noise``: it is then made by `maths.philox`, in the kernel on the CUDA backend.
        storage_dtype: of ``x_next``; ``None`` does not round.
        log_prob, velocity, mean: what to return besides ``x_next``.
        backend: see `visalign.kernels.backend`.
    Raises:
        ValueError: noise is missing, given twice or not wanted; a density without noise; a backend that is not possible.
    """
    if (noise is not None) + (seeds is not None) != (transition.std > 0):
        given = [name for name, value in (("noise", noise), ("seeds", seeds)) if value is not None]
        raise ValueError(f"a step with std {transition.std:.3g} takes {'noise or seeds' if transition.std > 0 else 'no noise'}, got "
                         f"{' and '.join(given) or 'neither'}")
    if log_prob and not transition.std > 0:
        raise ValueError("a deterministic step (std 0) has no density; leave log_prob out")
    gradients = [term.gradient for term in outputs.terms]
    read = [x, *outputs.tensors, *gradients, *([] if noise is None else [noise])]
    hindrance = obstacle(outputs) or _dtypes(gradients, storage_dtype) or _gradient(read)
    if resolve(backend, OPERATOR, read, hindrance) == "torch":
        return reference(outputs, x, transition, noise, seeds, storage_dtype, log_prob, velocity, mean)
    formula = StepFormula.of(outputs, transition)
    x_next, found_log_prob, found_velocity, found_mean = torch.ops.visalign.guided_step(
        x, list(outputs.tensors), gradients, noise, seeds, storage_dtype, log_prob, velocity, mean, *formula.flat())
    return Step(x_next, found_log_prob if log_prob else None, found_velocity if velocity else None, found_mean if mean else None)


def run(engine: Engine, x: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor], noise: Tensor | None, seeds: Tensor | None,
        storage_dtype: torch.dtype | None, log_prob: bool, velocity: bool, mean: bool,
        formula: StepFormula) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the kernel: ``x_next``, ``log_prob``, ``velocity``, ``mean``; empty where not wanted."""
    check_alike(x, outputs=tensors, gradients=gradients, noise=noise)
    if seeds is not None and seeds.shape != x.shape[:1]:
        raise ValueError(f"guided_step takes one seed per sample, ({x.shape[0]},), got {tuple(seeds.shape)}")
    made = x_next, log_probs, velocities, means = _empty(x, storage_dtype or torch.float32, log_prob, velocity, mean)
    rows, dims = x.shape[0], math.prod(x.shape[1:])
    if x.numel() == 0:
        return x_next, log_probs.zero_(), velocities, means
    of_mean, of_velocity = mean_and_velocity(formula)
    used, std = formula.used, formula.transition.std
    rescaled = None
    if formula.readout is not None and formula.readout.combination.correction == "rescale":
        rescaled = rescale(engine, tensors, used, formula.readout.combination)
    macros: Macros = {
        "NUM_OUTPUTS": len(used), "NUM_GRADIENTS": len(gradients), "X_TYPE": C_TYPES[x.dtype], "OUTPUT_TYPE": C_TYPES[tensors[0].dtype],
        "GRADIENT_TYPE": C_TYPES[gradients[0].dtype] if gradients else "float", "NEXT_TYPE": C_TYPES[x_next.dtype],
        "NOISE": 0 if std == 0 else 1 if noise is not None else 2, "USES_X": int(of_mean.x != 0 or (velocity and of_velocity.x != 0)),
        "RESCALE": int(rescaled is not None), "WRITES_MEAN": int(mean), "WRITES_VELOCITY": int(velocity), "LOG_PROB": int(log_prob),
    }
    given = None if noise is None else noise.float()
    keys = None if seeds is None else seeds.to(x.device, torch.int64).contiguous()
    sums = partials(x, 1) if log_prob else None
    constant = -dims * (math.log(std) + 0.5 * math.log(2 * math.pi)) if log_prob else 0.0
    arguments = (Arguments().rows(x).rows(*(tensors[k] for k in used)).rows(*(gradients or (None,))).rows(given)
                 .pointers(keys, None if rescaled is None else rescaled.factor, x_next, means, velocities, sums, log_probs)
                 .integers(rows, dims, num_chunks(dims)).doubles(-0.5 / std**2 if log_prob else 0.0, constant)
                 .floats(of_mean.x, *of_mean.outputs, *(of_mean.terms or [0.0]))
                 .floats(of_velocity.x, *of_velocity.outputs, *(of_velocity.terms or [0.0])).floats(std))
    launch_rows(engine, OPERATOR, OPERATOR, macros, arguments, rows, dims, finish=log_prob)
    return made


def _empty(x: Tensor, dtype: torch.dtype, log_prob: bool, velocity: bool, mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def room(shape: torch.Size, wanted: bool) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=torch.float32)

    return x.new_empty(x.shape, dtype=dtype), room(x.shape[:1], log_prob), room(x.shape, velocity), room(x.shape, mean)


def _dtypes(gradients: Sequence[Tensor], storage_dtype: torch.dtype | None) -> str | None:
    if storage_dtype is not None and storage_dtype not in DTYPES:
        return f"kernels do not write {storage_dtype}"
    return "reward gradients have several dtypes" if len({gradient.dtype for gradient in gradients}) > 1 else None


def _gradient(tensors: Sequence[Tensor]) -> str | None:
    return "a gradient through the step is asked for" if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else None


torch.library.define("visalign::guided_step", "(Tensor x, Tensor[] outputs, Tensor[] gradients, Tensor? noise, Tensor? seeds, "
                     f"ScalarType? storage_dtype, bool log_prob, bool velocity, bool mean, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")


def _cuda(x: Tensor, outputs: list[Tensor], gradients: list[Tensor], noise: Tensor | None, seeds: Tensor | None,
          storage_dtype: torch.dtype | None, log_prob: bool, velocity: bool, mean: bool, *flat: Any) -> tuple[Tensor, ...]:
    return run(engine_of(x.device), x, outputs, gradients, noise, seeds, storage_dtype, log_prob, velocity, mean,
               StepFormula.from_flat(*flat))


def _cpu(x: Tensor, outputs: list[Tensor], gradients: list[Tensor], noise: Tensor | None, seeds: Tensor | None,
         storage_dtype: torch.dtype | None, log_prob: bool, velocity: bool, mean: bool, *flat: Any) -> tuple[Tensor, ...]:
    formula = StepFormula.from_flat(*flat)
    found = reference(formula.outputs(outputs, gradients), x, formula.transition, noise, seeds, storage_dtype or torch.float32, log_prob,
                      velocity, mean)
    made = _empty(x, storage_dtype or torch.float32, log_prob, velocity, mean)
    given = (found.x_next, found.log_prob, found.velocity, found.mean)
    return tuple(room if value is None else room.copy_(value) for room, value in zip(made, given, strict=True))


@torch.library.register_fake("visalign::guided_step")
def _fake(x: Tensor, outputs: list[Tensor], gradients: list[Tensor], noise: Tensor | None, seeds: Tensor | None,
          storage_dtype: torch.dtype | None, log_prob: bool, velocity: bool, mean: bool, *flat: Any) -> tuple[Tensor, ...]:
    return _empty(x, storage_dtype or torch.float32, log_prob, velocity, mean)


torch.library.impl("visalign::guided_step", "cuda", _cuda)
torch.library.impl("visalign::guided_step", "cpu", _cpu)
