"""What must hold in every run, checked while it runs; each violation is an error that says what is wrong and where to look.

Before the first optimizer step of an iteration the weights are the ones that sampled, so the recomputed probability ratio is 1, the
model's raw outputs are those of the rollout, and (in iteration 0) policy and reference agree. None of this is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from visalign.types import Scores, Trajectory

# Relative error of a denoiser's output between two evaluations of the same weights in one dtype: a few units in the last place,
# accumulated over some hundred layers. Measured tolerances belong to the dtype, not to the model.
OUTPUT_TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


class InvariantError(RuntimeError):
    """The run would compute something else than it claims."""


def ratio_tolerance(dtype: str, num_dims: int) -> float:
    """Largest ``|ratio - 1|`` that rounding explains, for the ratio per dimension.

    A relative output error e gives a per-dimension KL ``K ~ e^2 / 2`` and a log-ratio of std ``sqrt(2 K / D) = e / sqrt(D)``; the last
    term is the rounding of a float32 sum over D dimensions.
    """
    return OUTPUT_TOLERANCE[dtype] / math.sqrt(num_dims) + 2e-6


def coarser(*dtypes: str) -> str:
    """The dtype with the largest tolerance."""
    return max(dtypes, key=lambda dtype: OUTPUT_TOLERANCE[dtype])


def check_first_update(maxima: Mapping[str, float], *, iteration: int, dtype: str, num_dims: int) -> None:
    """Check the maxima of an iteration's first update.

    Args:
        maxima: ``policy/ratio_deviation``, ``policy/output_gap`` and ``policy/kl_reference`` as the algorithm reports them; absent ones
            are not checked. NaN fails no check here: a non-finite loss is refused later, with its own error.
    Raises:
        InvariantError: one is larger than rounding explains.
    """
    gap, ratio = maxima.get("policy/output_gap", 0.0), maxima.get("policy/ratio_deviation", 0.0)
    if iteration == 0 and (error := maxima.get("policy/error_gap", 0.0)) > 1e-6:
        raise InvariantError(f"the errors of policy and reference differ by {error:.2e} (relative) before the first update; they "
                             "must be equal, or every margin starts wrong. The reference is not the model that the run starts from, or the "
                             "two run in different precision or with dropout")
    allowed = ratio_tolerance(dtype, num_dims)
    if gap > OUTPUT_TOLERANCE[dtype]:
        raise InvariantError(f"iteration {iteration}: before any update the model's outputs differ by {gap:.2e} (relative) between "
                             f"sampling and training, rounding in {dtype} explains {OUTPUT_TOLERANCE[dtype]:.0e}. Something "
                             "differs between the two passes: dropout (a layer in training mode), other prompt embeddings, an "
                             "adapter that is off, a stateful module")
    if ratio > allowed:
        raise InvariantError(f"iteration {iteration}: before any update the probability ratio differs from 1 by {ratio:.2e}, rounding in "
                             f"{dtype} explains {allowed:.2e}. The old log-probabilities belong to other numbers than the update sees; "
                             "set algorithm.old_log_prob=recomputed, or make train.microbatch and train.precision those of sampling")
    if iteration == 0 and maxima.get("policy/kl_reference", 0.0) > 1e-8:
        raise InvariantError(f"the KL between policy and reference is {maxima['policy/kl_reference']:.2e} nats per dimension before the "
                             "first update; it must be 0. The adapter does not start at zero, or the reference is not the model that "
                             "the run starts from")


def check_reference(maxima: Mapping[str, float], *, moved: bool, iteration: int) -> None:
    """Once the weights have moved, policy and reference differ: a KL of exactly 0 would mean that the reference is the policy.

    Raises:
        InvariantError: the largest KL of a whole update is exactly 0 although the weights moved.
    """
    if moved and maxima.get("policy/kl_reference") == 0.0:
        raise InvariantError(f"iteration {iteration}: the weights have moved, yet the KL between policy and reference is exactly 0. The "
                             "reference follows the policy (an adapter switch without effect, a copy that is an alias), or the trained "
                             "weights do not reach the output")


def check_groups(trajectory: Trajectory, group_size: int) -> None:
    """Every group complete.

    Raises:
        InvariantError: a group has another number of samples.
    """
    counts = torch.bincount(trajectory.group_id, minlength=len(trajectory.prompts))
    if not bool((counts == group_size).all()):
        raise InvariantError(f"groups have {counts.tolist()} samples, each must have {group_size}: a torn group compares nothing")


def check_advantages(advantage: Tensor, scores: Mapping[str, Scores], group_id: Tensor) -> None:
    """A group whose samples all got the same scores says nothing: its advantages are exactly 0.

    Raises:
        InvariantError: such a group has an advantage, or an advantage is not finite.
    """
    if not bool(torch.isfinite(advantage).all()):
        raise InvariantError("an advantage is not finite; a reward gave a number that its statistics cannot hold")
    group = group_id.unique(return_inverse=True)[1]
    constant = torch.ones(int(group.max()) + 1, dtype=torch.bool)
    for one in scores.values():
        value = one.value.double().nan_to_num(0.0)  # NaN marks invalid samples; only equality within the group is asked
        low, high = (torch.zeros(len(constant), dtype=torch.float64).scatter_reduce(0, group, value, how, include_self=False)
                     for how in ("amin", "amax"))
        constant &= low == high
    wrong = constant[group] & (advantage != 0)
    if bool(wrong.any()):
        raise InvariantError(f"{int(wrong.sum())} samples of groups without any spread have an advantage, up to "
                             f"{float(advantage[wrong].abs().max()):.2e}: rounding noise would be amplified to a full signal")
