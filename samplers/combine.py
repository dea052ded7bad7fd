"""How a pipeline combines the denoiser's predictions into one model output: guidance, found by least squares.

Linear guidance gives weights per prediction. The nonlinear corrections of `visalign.maths.combination` are recognised when the linear fit
fails: within one sample (or token) each of them only multiplies the linear combination by a factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visalign.maths.combination import Combination, factor
from visalign.samplers.observe import CaptureError

# Float32 arithmetic of the pipeline itself reaches 1e-5 where it divides by a small sigma; nonlinear guidance starts at 1e-2.
LINEAR_TOLERANCE = 5e-5


def fit_combination(runs: Sequence[Sequence[Tensor]], answers: Sequence[Tensor], states: Sequence[Tensor], step: int) -> Combination:
    """Find the combination that turns each run's predictions into its answer.

    Args:
        runs: per run, the predictions of one step, each (1, ...) or the state's shape.
        answers: per run, the tensor given to ``scheduler.step``.
        states: per run, the state of that step.
    Raises:
        CaptureError: neither linear nor one of the named corrections.
    """
    rows = [
        [row.reshape(1, *answer.shape[1:] if answer.shape[0] == 1 else answer.shape).double() for row in run]
        for run, answer in zip(runs, answers, strict=True)
    ]
    targets = [answer.reshape(one[0].shape).double() for answer, one in zip(answers, rows, strict=True)]
    inputs = [state.reshape(one[0].shape).double() for state, one in zip(states, rows, strict=True)]
    coarse = answers[0].dtype in (torch.bfloat16, torch.float16)
    tolerance = 2e-2 if coarse else LINEAR_TOLERANCE
    weights, residual = _solve([[*one, state] for one, state in zip(rows, inputs, strict=True)], targets)
    if residual < tolerance:
        return Combination(tuple(weights[:-1]), weights[-1], residual=residual)
    by_axis = _along_axis(rows, targets, tolerance)
    if by_axis is not None:
        return by_axis
    best = residual
    for candidate in _nonlinear(rows, targets):
        error = max(
            float((candidate(one, state) - target).norm() / target.norm()) for one, target, state in zip(rows, targets, inputs, strict=True)
        )
        best = min(best, error)
        if error < 10 * tolerance:
            return Combination(**{**candidate.__dict__, "residual": error})
    raise CaptureError(
        f"step {step}: the model output is not a linear combination of the denoiser's {len(rows[0])} predictions (relative residual "
        f"{residual:.2g}) nor one of guidance rescale, token norm or norm cap (best {best:.2g}). Switch off the guidance option "
        "that mixes predictions nonlinearly (APG, CFG-Zero*, perturbed or adaptive guidance), or set its strength to 0"
    )


def _along_axis(rows: Sequence[Sequence[Tensor]], targets: Sequence[Tensor], tolerance: float) -> Combination | None:
    """Linear weights that differ along one axis of the state: guidance per frame, or on the first channels only."""
    for axis in range(1, targets[0].ndim):
        size = targets[0].shape[axis]
        # A slice with few elements could be fitted by chance.
        if size < 2 or sum(target.numel() for target in targets) // size < 8 * (len(rows[0]) + 1):
            continue
        slices = [
            _solve([[row.select(axis, i) for row in one] for one in rows], [target.select(axis, i) for target in targets])
            for i in range(size)
        ]
        residual = max(slice_residual for _, slice_residual in slices)
        if residual < tolerance:
            profile = tuple(zip(*(weights for weights, _ in slices), strict=True))
            weights = tuple(max(row, key=abs) for row in profile)
            return Combination(weights, axis=axis, profile=profile, residual=residual)
    return None


def _solve(runs: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> tuple[list[float], float]:
    """Least-squares weights over all runs jointly and the relative residual; weights that mean a short decimal are rounded to it."""
    design = torch.cat([torch.stack([row.flatten() for row in run], dim=1) for run in runs])
    target = torch.cat([t.flatten() for t in targets])
    weights = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    rounded = torch.tensor([_round(float(w)) for w in weights], dtype=torch.float64)
    exact, residual = (float((design @ w - target).norm() / target.norm().clamp_min(1e-30)) for w in (weights, rounded))
    return (rounded.tolist(), residual) if residual < max(10 * exact, 1e-6) else (weights.tolist(), exact)


def _round(weight: float) -> float:
    short = round(weight, 4)
    return short if abs(short - weight) < 2e-5 else weight


def _nonlinear(rows: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> list[Combination]:
    """Candidate corrections. Within one sample (or token) a correction is only a factor, so directions are still linear."""
    found: list[Combination] = []
    per_run = [_solve([one], [target]) for one, target in zip(rows, targets, strict=True)]
    for conditional in range(len(rows[0])):
        if all(residual < 1e-4 for _, residual in per_run):
            weights = [w / sum(per_run[0][0]) for w in per_run[0][0]]
            scales = [sum(run_weights) for run_weights, _ in per_run]
            base = Combination(tuple(_round(w) for w in weights), conditional=conditional)
            combined = [base(one, one[0]) for one in rows]
            unit = [float(factor("rescale", c, one[conditional], 1.0).flatten()[0]) for c, one in zip(combined, rows, strict=True)]
            caps = [float(c.norm() / one[conditional].norm()) for c, one in zip(combined, rows, strict=True)]
            for sign in (1.0, -1.0):
                signed = tuple(sign * w for w in base.weights)
                phis = [(sign * s - 1) / (u - 1) for s, u in zip(scales, unit, strict=True) if abs(u - 1) > 1e-9]
                if phis:
                    found.append(Combination(signed, 0.0, "rescale", conditional, _round(phis[0])))
                found.append(Combination(signed, 0.0, "norm cap", conditional, _round(sign * scales[0] * caps[0])))
        tokens = [torch.stack([row.flatten(0, -2) for row in one], dim=-1) for one in rows]
        aims = [target.flatten(0, -2).unsqueeze(-1) for target in targets]
        per_token = torch.linalg.lstsq(tokens[0], aims[0]).solution[..., 0]
        share = (per_token / per_token.sum(-1, keepdim=True)).median(dim=0).values
        sign = float(per_token.sum(-1).median().sign())
        found.append(Combination(tuple(_round(sign * float(w)) for w in share), 0.0, "token norm", conditional))
    return found
