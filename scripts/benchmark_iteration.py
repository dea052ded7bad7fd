"""One GRPO iteration with and without the kernels, on a random model of the size of Stable Diffusion 3.5 medium.

    python -m scripts.benchmark_iteration [--layers 24] [--groups 4] [--group-size 8] [--repeats 7]

An iteration is a rollout (guided, ten steps, two of them stochastic) and the losses and backward passes over its stored steps, with a
reference and GRPO-Guard's ratio norm; text encoders, decoder and rewards are left out. Both backends in turn, A B A B, and the ratio taken
pair by pair. Rows go to ``benchmarks/results/kernels.jsonl``. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import diffusers
import torch

from scripts.benchmark_kernels import RESULTS, machine, quantiles
from scripts.tiny_parts import HIDDEN, shifted_kl_vae
from scripts.tiny_transformers import sd3
from visalign.algorithms.grpo import GRPO
from visalign.kernels.backend import Backend
from visalign.samplers.dynamics import FlowSDE
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import RandomWindow
from visalign.types import Batch, Experience, Prompt

SIDE = 64  # of the latents, 16 channels: a picture of 512 pixels


def medium_sized(layers: int = 24, device: str = "cuda") -> PipelinePolicy:
    """A captured pipeline with the transformer of Stable Diffusion 3.5 medium (24 blocks of width 1536, 13 of them with a second attention)
    in bfloat16, tiny text encoders and an adapter."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=2 * HIDDEN, caption_projection_dim=1536, pooled_projection_dim=2 * HIDDEN, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(min(13, layers))), qk_norm="rms_norm")
    pipe = sd3(transformer=transformer, vae=shifted_kl_vae(channels=16)).to(device, torch.bfloat16)
    call = {"num_inference_steps": 10, "guidance_scale": 4.5, "height": 2 * SIDE, "width": 2 * SIDE, "max_sequence_length": 24}
    policy = PipelinePolicy.from_pipeline(pipe, **call)
    policy.roles.add_lora(rank=32)
    return policy


def iteration(policy: PipelinePolicy, backend: Backend, groups: int, group_size: int, microbatch: int) -> None:
    """Rollout, losses, gradients."""
    prompts = [Prompt(f"prompt {group}") for group in range(groups)]
    made = rollout(policy, prompts, group_size, FlowSDE(0.7), RandomWindow(size=2), seed=0, microbatch=microbatch,
                   storage_dtype=torch.bfloat16, noise="philox", backend=backend)
    advantage = torch.randn(made.num_samples, 1, generator=torch.Generator().manual_seed(0)).expand(-1, len(made.transitions))
    experience = Experience(made, advantage, torch.ones(made.num_samples, dtype=torch.bool), 0, advantage[:, 0])
    batch = Batch(experience, torch.arange(made.num_samples), float(made.num_samples))
    algorithm = GRPO(clip=1e-2, surrogate="guard", kl_weight=0.01, backend=backend)
    policy.train(True)
    for part in algorithm.microbatches(policy, batch, microbatch, 0):
        algorithm.loss(policy, part).loss.backward()
    for parameter in policy.named_trainable().values():
        parameter.grad = None


def seconds(policy: PipelinePolicy, backend: Backend, arguments: argparse.Namespace) -> float:
    begin = time.perf_counter()
    iteration(policy, backend, arguments.groups, arguments.group_size, arguments.microbatch)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 24, "groups": 4, "group-size": 8, "microbatch": 8, "repeats": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: there is nothing to measure, and nothing is estimated")
    policy = medium_sized(arguments.layers)
    times: dict[str, list[float]] = {"cuda": [], "torch": []}
    for repeat in range(arguments.repeats + 1):
        for backend in ("cuda", "torch"):
            took = seconds(policy, backend, arguments)  # type: ignore[arg-type]
            if repeat:  # the first round compiles and warms up
                times[backend].append(took)
    samples = arguments.groups * arguments.group_size
    common: dict[str, Any] = {"op": "grpo_iteration", "part": "rollout, losses and gradients", "shape": [samples, 16, SIDE, SIDE],
                              "dtype": "bfloat16", "layers": arguments.layers, **machine(torch.device("cuda", torch.cuda.current_device()))}
    ratios = [slow / fast for fast, slow in zip(times["cuda"], times["torch"], strict=True)]
    rows = [{"backend": backend, "metric": "time", "unit": "s", **quantiles(values), **common} for backend, values in times.items()]
    rows.append({"backend": "cuda", "metric": "torch over cuda", "unit": "ratio", **quantiles(ratios), **common})
    with RESULTS.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row))


if __name__ == "__main__":
    main()
