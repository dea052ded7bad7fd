"""What rollout and update cost beyond the network itself, as ratios within one run.

    python benchmarks/overhead.py [--model PATH] [--samples 128] [--repeats 7]

rollout   time of ``rollout`` plus ``decode`` for P x G samples, over the same number of bare denoiser and VAE calls on the same inputs
update    time of GRPO's loss and backward over all stored steps, over bare denoiser forwards and backwards of the same batch shapes

Both are measured in turn, A B A B, and the ratio is taken pair by pair; p20, p50 and p80 of the ratios are appended as rows to
``benchmarks/results/overhead.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from visalign.algorithms.grpo import GRPO
from visalign.data import load_prompts
from visalign.playground import pipeline_path
from visalign.samplers.dynamics import FlowSDE
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import RandomWindow
from visalign.types import Batch, Experience

RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(pipeline_path()))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--microbatch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = PipelinePolicy.from_pretrained(
        arguments.model, device=arguments.device, num_inference_steps=arguments.steps, guidance_scale=arguments.guidance
    )
    policy.roles.add_lora(rank=16)
    prompts = load_prompts("playground:train")[: arguments.samples // arguments.group_size]
    shape = f"{len(prompts)}x{arguments.group_size}, {arguments.steps} steps, microbatch {arguments.microbatch}"
    for name, (whole, bare) in {"rollout": rollouts(policy, prompts, arguments), "update": updates(policy, prompts, arguments)}.items():
        record(name, shape, arguments, compare(whole, bare, arguments.repeats))


def rollouts(policy: PipelinePolicy, prompts: Any, arguments: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], None]]:
    """(rollout and decode, the same calls bare)."""

    def whole() -> None:
        policy._encoded.clear()  # prompts are new in every iteration of a run
        made = rollout(policy, prompts, arguments.group_size, FlowSDE(0.7), RandomWindow(size=2), seed=0, microbatch=arguments.microbatch)
        for part in made.x_final.split(arguments.microbatch):
            policy.decode(part)

    calls, latents = bare_inputs(policy, prompts, arguments)
    vae = policy.pipe.vae

    @torch.no_grad()
    def bare() -> None:
        for _ in range(len(latents)):
            for module, inputs in calls:
                module(**inputs)
        for z in latents:
            vae.decode(z)

    return whole, bare


def updates(policy: PipelinePolicy, prompts: Any, arguments: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], None]]:
    """(GRPO losses and backwards over the stored steps, the same denoiser calls with a mean as loss)."""
    made = rollout(policy, prompts, arguments.group_size, FlowSDE(0.7), RandomWindow(size=2), seed=0, microbatch=arguments.microbatch)
    advantage = torch.randn(made.num_samples, 1).expand(-1, len(made.transitions))
    experience = Experience(made, advantage, torch.ones(made.num_samples, dtype=torch.bool), 0, advantage[:, 0])
    batch, algorithm = Batch(experience, torch.arange(made.num_samples), float(made.num_samples)), GRPO(clip=1e-2)

    def whole() -> None:
        for microbatch in algorithm.microbatches(policy, batch, arguments.microbatch, seed=0):
            algorithm.loss(policy, microbatch).loss.backward()

    calls, latents = bare_inputs(policy, prompts, arguments)

    def bare() -> None:
        for _ in range(len(latents)):
            for module, inputs in calls[: len(made.transitions)]:
                module(**inputs)[0].mean().backward()

    return whole, bare


def bare_inputs(
    policy: PipelinePolicy, prompts: Any, arguments: argparse.Namespace
) -> tuple[list[tuple[Any, dict[str, Any]]], list[torch.Tensor]]:
    """The denoiser's arguments for one micro-batch at every step, and the VAE's inputs for all samples."""
    made = rollout(policy, prompts, arguments.group_size, FlowSDE(0.7), RandomWindow(size=2), seed=0, microbatch=arguments.microbatch)
    rows = list(range(min(arguments.microbatch, made.num_samples)))
    chunk = policy.encode(prompts).select([int(made.group_id[row]) for row in rows])
    recorded: list[tuple[Any, dict[str, Any]]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args, inputs: recorded.append((module, inputs)), with_kwargs=True)
        for module in policy.denoisers.values()
    ]
    with torch.no_grad():
        for step in range(policy.schedule.num_steps):
            policy.predict(made.x_final[rows], step, chunk)
    for hook in hooks:
        hook.remove()
    return recorded, [policy.codec.to_vae(part).float() for part in made.x_final.split(arguments.microbatch)]


def compare(whole: Callable[[], None], bare: Callable[[], None], repeats: int) -> list[float]:
    """Ratios of the two, measured in turn after one warm-up of each."""
    whole()
    bare()
    ratios = []
    for _ in range(repeats):
        times = []
        for run in (whole, bare):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return sorted(ratios)


def record(name: str, shape: str, arguments: argparse.Namespace, ratios: list[float]) -> None:
    """Append one row and print it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    deciles = statistics.quantiles(ratios, n=10)
    row = {
        "op": name,
        "backend": "torch",
        "shape": shape,
        "metric": "time over bare network calls",
        "unit": "ratio",
        "p20": round(deciles[1], 4),
        "p50": round(statistics.median(ratios), 4),
        "p80": round(deciles[7], 4),
        "repeats": len(ratios),
        "hardware": f"{arguments.device}, {platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "model": Path(arguments.model).name,
        "commit": commit,
        "date": date.today().isoformat(),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
