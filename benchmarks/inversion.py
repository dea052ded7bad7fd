"""Where an inversion ends and whether it leads back: ours against the grids that published code runs.

    python benchmarks/inversion.py [--model PATH] [--samples 16]

Samples of the model itself are inverted to timesteps t spread over the range, without guidance. ``benchmarks/results/inversion.jsonl``:

level_gap        mean of the reached timestep minus t, and its range; the network is told t all the same
reconstruction   ||x0 back - x0|| / ||x0|| after denoising the state from t in 30 Heun steps, mean over samples
target_error     mean (noise - predicted noise at t)^2, what SmPO-Diffusion's loss calls the error of the sample
noise_std        of that noise; 1 for the noise the model was trained on
calls            network calls per sample, mean

ours          ends at t
above, below  a grid {1, 1 + 1000 / K, ...} of leading spacing: the steps run that start below t (diffusers before 0.22), or those that
              end below t (since). Both ask about both ends of a step at one timestep, its start or its end; 0 where that is below 0.
random        Gaussian noise, no inversion
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from visalign.data import load_prompts
from visalign.playground import pipeline_path
from visalign.samplers.inversion import Inversion, inversion_grid
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import generate

RESULTS = Path(__file__).parent / "results" / "inversion.jsonl"
Found = tuple[Tensor, Tensor, float]  # state (n, ...), reached timesteps (n,), network calls per sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(pipeline_path()))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = PipelinePolicy.from_pretrained(arguments.model, device=arguments.device, num_inference_steps=30, guidance_scale=1.0)
    if policy.times.process != "flow":
        raise SystemExit(f"the comparison is written for flow models, {arguments.model} is {policy.times.process}")
    prompts = load_prompts("playground:heldout")[: arguments.samples]
    x0, conditioning = generate(policy, prompts, seeds=range(len(prompts))), policy.encode(prompts)
    fraction = (torch.arange(len(prompts), dtype=torch.float64) + 0.5) / len(prompts)
    timesteps = policy.times.timestep(fraction[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))])
    methods: dict[str, Callable[[], Found]] = {"random": lambda: random_noise(policy, x0, timesteps)}
    for inversion in (Inversion(5, 0), Inversion(9, 0), Inversion(5, 1), Inversion(9, 1), Inversion(10, 1)):
        methods[f"ours, {inversion.num_steps} steps" + ", ReNoise" * inversion.renoise] = partial(ours, inversion, policy, x0, timesteps,
                                                                                                    conditioning)
    for steps in (5, 10):
        for end in ("above", "below"):
            methods[f"{end}, {steps} steps, ReNoise"] = partial(published, end, steps, policy, x0, timesteps, conditioning)
    with torch.no_grad():
        for name, method in methods.items():
            record(name, arguments, measure(policy, x0, timesteps, conditioning, method()))


def ours(inversion: Inversion, policy: PipelinePolicy, x0: Tensor, timesteps: Tensor, conditioning: Any) -> Found:
    state = at_level(policy, x0, inversion(policy, x0, timesteps, conditioning), timesteps)
    return state, timesteps, inversion.num_steps * (1.0 + inversion.renoise)


def random_noise(policy: PipelinePolicy, x0: Tensor, timesteps: Tensor) -> Found:
    return at_level(policy, x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(x0), timesteps), timesteps, 0.0


def published(end: str, num_steps: int, policy: PipelinePolicy, x0: Tensor, timesteps: Tensor, conditioning: Any) -> Found:
    """The published grid with one correction; every row runs the steps that its own t lets run."""
    high = float(policy.times.timestep(torch.ones(1))[0])
    stride = round(high) // num_steps
    ends = [1.0 + stride * step for step in range(num_steps)]
    state, reached, calls = x0.clone(), torch.zeros_like(timesteps), torch.zeros(len(timesteps))
    for start, stop in pairwise([1.0 - stride, *ends]):
        chosen = (start if end == "above" else stop) < timesteps
        if not bool(chosen.any()):
            break
        rows = chosen.nonzero().squeeze(1)
        asked = torch.full((len(rows),), max(start, 0.0) if end == "above" else stop, dtype=torch.float64)
        part = conditioning.select(rows.tolist())
        source, target = (torch.full((len(rows),), max(t, 0.0), dtype=torch.float64) for t in (start, stop))

        def noise_at(x: Tensor, level: Tensor, asked: Tensor = asked, part: Any = part) -> Tensor:
            velocity = policy.predict_at(x, asked, part).velocity
            alpha, _ = expanded(policy, level, x)
            return x + alpha * velocity

        x_a = state[rows]
        first = noise_at(x_a, source)
        second = noise_at(moved(policy, x_a, first, source, target), target)
        state[rows] = moved(policy, x_a, (first + second) / 2, source, target)
        reached[rows] = stop
        calls[rows] += 2
    return state, reached, float(calls.mean())


def moved(policy: PipelinePolicy, x: Tensor, noise: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """``alpha_b (x - sigma_a noise) / alpha_a + sigma_b noise``."""
    (alpha_a, sigma_a), (alpha_b, sigma_b) = expanded(policy, source, x), expanded(policy, target, x)
    return alpha_b * (x - sigma_a * noise) / alpha_a + sigma_b * noise


def at_level(policy: PipelinePolicy, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    alpha, sigma = expanded(policy, timesteps, x0)
    return alpha * x0 + sigma * noise


def expanded(policy: PipelinePolicy, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = (level.to(like).reshape(-1, *[1] * (like.dim() - 1)) for level in policy.times.level(timesteps))
    return alpha, sigma


def measure(policy: PipelinePolicy, x0: Tensor, timesteps: Tensor, conditioning: Any, found: Found) -> dict[str, Any]:
    state, reached, calls = found
    alpha, sigma = expanded(policy, timesteps, x0)
    noise, gap = (state - alpha * x0) / sigma, reached - timesteps
    target_error = (noise - policy.predict_at(state, timesteps, conditioning).x1).square().mean()
    back = denoised(policy, state, timesteps, conditioning)
    lost = (back - x0).flatten(1).norm(dim=1) / x0.flatten(1).norm(dim=1)
    return {"level_gap": round(float(gap.mean()), 2), "level_gap_range": [round(float(gap.min()), 2), round(float(gap.max()), 2)],
            "reconstruction": round(float(lost.mean()), 4), "target_error": round(float(target_error), 4),
            "noise_std": round(float(noise.std()), 4), "calls": round(calls, 2)}


def denoised(policy: PipelinePolicy, state: Tensor, timesteps: Tensor, conditioning: Any, num_steps: int = 30) -> Tensor:
    """The flow's ODE from each row's own timestep down to data, by Heun steps."""
    for here, there in pairwise(inversion_grid(policy.times, timesteps, num_steps).flip(0)):
        step = expanded(policy, there, state)[1] - expanded(policy, here, state)[1]
        first = policy.predict_at(state, here, conditioning).velocity
        second = policy.predict_at(state + step * first, there, conditioning).velocity
        state = state + step * (first + second) / 2
    return state


def record(name: str, arguments: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Append one row and print it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    row = {"op": "inversion", "method": name, "samples": arguments.samples, **measured,
           "hardware": f"{arguments.device}, {platform.machine()}, 1 thread", "torch": torch.__version__,
           "diffusers": diffusers.__version__, "model": Path(arguments.model).name, "commit": commit, "date": date.today().isoformat()}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
