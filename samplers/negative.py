"""Classifier-free guidance away from a worse model: two sets of weights, one denoiser.

    output = (w + 1) m_positive(x, c) - w m_negative(x, c')          theta_negative = theta + a eta + b delta

where the positive weights are theta + eta, and delta is what negative preference optimisation added to theta. Merging eta in keeps the
two predictions correlated. Published code calls m = 1 - a its merge weight and keeps b = 1.
Sources: Diffusion-NPO, arXiv:2505.11245; Self-NPO, arXiv:2505.11777.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visalign.maths.outputs import Outputs
from visalign.samplers.guidance import Ask
from visalign.samplers.offsets import Offset, merge_offsets, own_offset, weights_with
from visalign.samplers.policy import PipelinePolicy
from visalign.types import Role


def give_negative(policy: PipelinePolicy, delta: Offset, eta: Offset | None = None, a: float = 1.0, b: float = 1.0) -> None:
    """Give the policy the positive weights theta + eta and the role "negative" the weights theta + a eta + b delta.

    A policy with trained weights keeps them, and they are eta; one without gets ``eta`` (nothing by default): as LoRA where both offsets
    are low-rank, otherwise as full weights, of which it then holds three copies.

    Raises:
        ValueError: ``eta`` for a policy that has trained weights; a delta that its trained layers cannot carry.
    """
    roles = policy.roles
    if roles.mode is not None and eta is not None:
        raise ValueError("the policy's own trained weights are the positive ones; leave eta out, or use a policy without trained weights")
    if roles.mode is None:
        eta = eta or Offset()
        if eta.tensors or delta.tensors:
            roles.train_full()
        else:
            names = {name.partition(".")[2] for name in (*eta.layers, *delta.layers)}
            roles.add_lora(rank=1, alpha=1, target_modules=sorted(names))
        values = weights_with(policy, eta)
        for name, parameter in policy.named_trainable().items():
            parameter.data = values[name]
    eta = eta or own_offset(policy)
    policy.snapshot("negative", weights_with(policy, merge_offsets(eta, delta, a, b)))


def ask_against(policy: PipelinePolicy, negative: Role = "negative") -> Ask:
    """``policy.outputs`` with the predictions that guidance subtracts made by another role's weights, for `GuidedPolicy`.

    Steps at which the pipeline itself guides nothing (a guidance interval) stay as they are.

    Raises:
        ValueError: guidance subtracts nothing at any step, or the role has no weights.
    """
    steps = [step for step in range(policy.schedule.num_steps) if policy.subtracts(step)]
    if not steps:
        raise ValueError(f"{policy.call.name} combines its predictions as {policy.capture.plans[0].combination.describe()}: guidance "
                         "subtracts nothing, so that a negative model has no place; call it with classifier-free guidance (guidance_scale "
                         "or true_cfg_scale above 1); models distilled to need none cannot use one")
    if not policy.has_role(negative):
        raise ValueError(f"role {negative!r} has no weights; give_negative() sets them")

    def ask(x: Tensor, step: int, conditioning: Any, role: Role = "policy") -> Outputs:
        return policy.outputs(x, step, conditioning, role, negative if policy.subtracts(step) else None)

    return ask
