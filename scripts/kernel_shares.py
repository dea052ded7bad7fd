"""Where the time of an update goes that is not the network's: operators, the loss of their results, and the rest.

    python -m scripts.kernel_shares [--samples 64] [--repeats 9]

For GRPO (guided, KL to the reference, ratio norm) and online DPO on the embedded pipeline each part is timed by itself on the tensors of
one micro-batch, forward and backward, all in turn: the whole loss, the bare denoiser, the operator, and the function of its per-sample
results (the surrogate, the preference loss). What decides whether that last part deserves an operator too is its share. Rows go to
``benchmarks/results/kernel_shares.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from visalign.algorithms.errors import errors
from visalign.algorithms.grpo import GRPO
from visalign.algorithms.preference import PreferenceOptimisation
from visalign.data import load_prompts
from visalign.kernels.ask import outputs_at
from visalign.maths import surrogate
from visalign.maths.outputs import Outputs
from visalign.maths.preference import bind_loss
from visalign.playground import pipeline_path
from visalign.samplers.dynamics import ODE, FlowSDE
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import NoSteps, SingleStep
from visalign.types import Batch, Experience

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "kernel_shares.jsonl"
Parts = dict[str, Callable[[], object]]


def leaves(outputs: Outputs) -> Outputs:
    """The same numbers, differentiable by themselves: what an operator's backward ends at."""
    return replace(outputs, tensors=tuple(tensor.detach().requires_grad_() for tensor in outputs.tensors))


def descend(value: Tensor) -> None:
    value.sum().backward()


def grpo(policy: PipelinePolicy, samples: int) -> Parts:
    """One micro-batch at one step."""
    prompts = load_prompts("playground:train")[: samples // 16]
    made = rollout(policy, prompts, 16, FlowSDE(0.7), SingleStep(1), seed=0, microbatch=samples)
    advantage, valid = torch.randn(samples, 1), torch.ones(samples, dtype=torch.bool)
    experience = Experience(made, advantage, valid, 0, advantage[:, 0])
    algorithm = GRPO(clip=1e-2, surrogate="guard", kl_weight=0.1)
    (part,) = algorithm.microbatches(policy, Batch(experience, torch.arange(samples), float(samples)), samples, 0)
    x, std = part.state(policy), made.transitions[0].std
    with torch.no_grad():
        own, held = (part.outputs(policy, x, role) for role in ("policy", "reference"))

    def network() -> None:
        outputs = part.outputs(policy, x)
        with torch.no_grad():
            part.outputs(policy, x, "reference")
        descend(torch.stack([tensor.mean() for tensor in outputs.tensors]))

    def operator() -> None:
        terms = part.terms(leaves(own), x, held, "torch")
        assert terms.kl_reference is not None
        assert terms.kl_old is not None
        descend(terms.log_prob + terms.kl_reference + terms.kl_old)

    def loss() -> None:
        log_prob, kl_old, kl = (torch.randn(samples).requires_grad_() for _ in range(3))
        terms = surrogate.guard(log_prob, log_prob.detach(), kl_old, std, advantage[:, 0], 1e-2, 1e-2)
        descend(torch.where(valid, terms.loss + 0.1 * kl, 0.0))

    return {"whole": lambda: descend(algorithm.loss(policy, part).loss), "network": network, "operator": operator, "loss": loss}


def online_dpo(policy: PipelinePolicy, samples: int) -> Parts:
    """One micro-batch of pairs at one draw."""
    plain = policy.with_call(guidance_scale=1.0)
    prompts = load_prompts("playground:train")[: samples // 2]
    made = rollout(policy, prompts, 2, ODE(), NoSteps(), seed=0, microbatch=samples)
    reward = torch.randn(samples)
    experience = Experience(made, torch.zeros(samples, 1), torch.ones(samples, dtype=torch.bool), 0, reward)
    method = PreferenceOptimisation(bind_loss("dpo"), kappa=50.0)
    (part,) = method.microbatches(plain, Batch(experience, torch.arange(samples), float(samples)), samples, 0)
    with torch.no_grad():
        whole = method._errors(plain, part)
    noised, inputs = whole.noised, whole.inputs
    conditioning = plain.encode([prompts[row // 2] for row in part.groups.rows.flatten().tolist()])
    with torch.no_grad():
        own, held = (outputs_at(plain, noised.x, noised.timesteps, conditioning, role) for role in ("policy", "reference"))

    def network() -> None:
        outputs = outputs_at(plain, noised.x, noised.timesteps, conditioning)
        with torch.no_grad():
            outputs_at(plain, noised.x, noised.timesteps, conditioning, "reference")
        descend(torch.stack([tensor.mean() for tensor in outputs.tensors]))

    def operator() -> None:
        descend(errors(plain, noised, leaves(own), held, norms=True, backend="torch").policy)

    def loss() -> None:
        descend(method.preference_loss(replace(inputs, policy=inputs.policy.clone().requires_grad_())))

    return {"whole": lambda: descend(method.loss(plain, part).loss), "network": network, "operator": operator, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = PipelinePolicy.from_pretrained(str(pipeline_path()), num_inference_steps=6, guidance_scale=3.0, max_sequence_length=12)
    policy.roles.add_lora(rank=16)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    with RESULTS.open("a", encoding="utf-8") as file:
        for name, make in {"grpo": grpo, "online_dpo": online_dpo}.items():
            parts = make(policy, arguments.samples)
            times: dict[str, list[float]] = {part: [] for part in parts}
            for repeat in range(arguments.repeats + 1):
                for part, run in parts.items():
                    begin = time.perf_counter()
                    run()
                    if repeat:
                        times[part].append(time.perf_counter() - begin)
            row = {"op": name, "backend": "torch", "metric": "share of the whole update", "unit": "1", "shape": [arguments.samples,
                   *policy.latent_shape], **{part: round(statistics.median(values) / statistics.median(times["whole"]), 4)
                                             for part, values in times.items() if part != "whole"},
                   "whole_ms": round(1e3 * statistics.median(times["whole"]), 2), "repeats": arguments.repeats,
                   "hardware": f"cpu, {platform.machine()}, 1 thread", "torch": torch.__version__, "commit": commit,
                   "date": date.today().isoformat()}
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
