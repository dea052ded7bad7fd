"""What the fused operators cost on a GPU: time, and the share of the bandwidth that a copy reaches, against eager and compiled PyTorch.

    python -m scripts.benchmark_kernels [--quick] [--out benchmarks/results/kernels.jsonl]

For every operator, latent shape and batch three versions of one computation: ``cuda`` (the kernels), ``torch`` (the reference, eager) and
``compile`` (the reference under ``torch.compile``). Two times each: on the device alone (events, launches queued ahead, the cache swept
before) and per call in a loop, launches included, with what is then in the cache. A version that waits for the device in its middle cannot
be queued ahead; its rows say so (``queued``). Ceilings are measured in the same process: a large copy and
a float32 matrix product. Rows are appended; ``python -m scripts.kernel_results`` makes tables and the roofline of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.kernels import paired_error as pair
from visalign.kernels import transition_log_prob as terms
from visalign.kernels.compile import compiler
from visalign.kernels.guided_step import guided_step
from visalign.kernels.guided_step.reference import reference as step_reference
from visalign.maths.combination import Combination
from visalign.maths.outputs import Outputs, Readout
from visalign.types import Transition

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "kernels.jsonl"
LATENTS = {"SD3.5": (16, 64, 64), "Flux": (4096, 64), "Wan": (16, 21, 60, 104)}
BATCHES, LARGE = (1, 4, 16, 64), {"SD3.5": 1024, "Flux": 256, "Wan": 64}  # the large ones hold at least 64 MB per bfloat16 tensor
STEP = Transition(A=0.75, B=0.5, std=0.3)
GUIDED, PLAIN = Combination((-3.5, 4.5)), Combination((1.0,))
Run = Callable[[dict[str, Tensor]], Any]


@dataclass(frozen=True)
class Case:
    """One computation.

    Attributes:
        op, part: operator, and "forward" or "forward and backward".
        dtype: of the network's outputs and the stored states.
        tensors: its inputs by name, (B, *latent) or (B,).
        versions: by backend; each returns the same values.
        num_bytes: the least that must move: inputs read and outputs written once per pass.
        flops: of the formula, all elements, a multiplication and an addition being two; noise is not counted.
    """

    op: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensors: Callable[[], dict[str, Tensor]]
    versions: dict[str, Run]
    num_bytes: int
    flops: int


def cases(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """The operators as sampling and training of a guided flow model call them."""
    elements, wide, narrow = torch.Size(shape).numel(), 4, torch.empty((), dtype=dtype).element_size()

    def normal(*names: str, of: torch.dtype = dtype) -> dict[str, Tensor]:
        return {name: torch.randn(shape, device=device).to(of) for name in names}

    def read(combination: Combination, values: dict[str, Tensor], *names: str) -> Outputs:
        return Outputs(tuple(values[name] for name in names), 0.4, 0.6, Readout(combination, "flow"))

    def rollout(backend: str) -> Run:
        def run(v: dict[str, Tensor]) -> Any:
            if backend == "compile":
                return compiled_step(read(GUIDED, v, "first", "second"), v["x"], STEP, v["noise"], None, dtype, True, True, False)
            return guided_step(read(GUIDED, v, "first", "second"), v["x"], STEP, noise=v["noise"], storage_dtype=dtype, log_prob=True,
                               velocity=True, backend=backend)  # type: ignore[arg-type]
        return run

    compiled_step = torch.compile(step_reference, dynamic=False, fullgraph=True)
    backends = ("cuda", "torch", "compile")
    yield Case("guided_step", "forward", dtype, shape, lambda: {**normal("first", "second"), **normal("x", "noise", of=torch.float32)},
               {name: rollout(name) for name in backends}, elements * (2 * narrow + 2 * wide + narrow + wide), elements * 14)

    def drawn(backend: str) -> Run:
        def run(v: dict[str, Tensor]) -> Any:
            return guided_step(read(GUIDED, v, "first", "second"), v["x"], STEP, seeds=v["seeds"], storage_dtype=dtype, log_prob=True,
                               velocity=True, backend=backend)  # type: ignore[arg-type]
        return run

    seeds = torch.arange(shape[0], device=device)
    yield Case("guided_step, philox", "forward", dtype, shape,
               lambda: {**normal("first", "second"), **normal("x", of=torch.float32), "seeds": seeds},
               {name: drawn(name) for name in ("cuda", "torch")}, elements * (2 * narrow + wide + narrow + wide), elements * 14)

    def update(backend: str) -> Run:
        function = torch.compile(terms.reference, dynamic=False, fullgraph=True) if backend == "compile" else None

        def run(v: dict[str, Tensor]) -> Any:
            leaves = {name: v[name].detach().requires_grad_() for name in ("first", "second")}
            own, held = read(GUIDED, leaves, "first", "second"), read(GUIDED, v, "held_first", "held_second")
            if function is not None:
                found = function(own, v["x"], v["x_next"], STEP, held, v["velocity"])
            else:
                found = terms.transition_log_prob(own, v["x"], v["x_next"], STEP, reference_outputs=held, velocity_old=v["velocity"],
                                                  backend=backend)  # type: ignore[arg-type]
            loss = (found.log_prob + 0.1 * found.kl_reference + 0.1 * found.kl_old).sum()
            return (found, *torch.autograd.grad(loss, list(leaves.values())))
        return run

    forward = elements * (4 * narrow + wide + narrow + wide)
    yield Case("transition_log_prob", "forward and backward", dtype, shape,
               lambda: {**normal("first", "second", "held_first", "held_second", "x_next"), **normal("x", "velocity", of=torch.float32)},
               {name: update(name) for name in backends}, 2 * forward + elements * 2 * narrow, elements * 53)

    def errors(backend: str) -> Run:
        function = torch.compile(velocity_errors, dynamic=False, fullgraph=True) if backend == "compile" else None

        def run(v: dict[str, Tensor]) -> Any:
            leaf = v["first"].detach().requires_grad_()
            levels = {"alpha": v["alpha"], "sigma": v["sigma"]}
            own, held = (replace(read(PLAIN, {"one": tensor}, "one"), **levels) for tensor in (leaf, v["held_first"]))
            if function is not None:
                found = function(leaf, v["held_first"], v["x0"], v["noise"])
            else:
                found = pair.paired_error(own, v["x"], v["x0"], v["noise"], space="flow", reference_outputs=held,
                                          backend=backend)  # type: ignore[arg-type]
            return (found, *torch.autograd.grad((found.policy - found.reference).sum(), leaf))
        return run

    def noised() -> dict[str, Tensor]:
        made, sigma = normal("x0", "noise", of=torch.float32), torch.linspace(0.1, 0.9, shape[0])
        s = sigma.to(device).reshape(-1, *[1] * (len(shape) - 1))
        return {**made, **normal("first", "held_first"), "x": (1 - s) * made["x0"] + s * made["noise"], "alpha": 1 - sigma, "sigma": sigma}

    yield Case("paired_error", "forward and backward", dtype, shape, noised, {name: errors(name) for name in backends},
               2 * elements * (2 * narrow + 2 * wide) + elements * narrow, elements * 28)


def velocity_errors(output: Tensor, held: Tensor, x0: Tensor, noise: Tensor) -> pair.PairedErrors:
    """What a compiler is given of ``paired_error``: the shortest form for a flow model judged in its own space. The reference itself checks
    its levels, which breaks the graph."""
    target = noise - x0
    errors = [(answer.float() - target).square().flatten(1).mean(dim=1) for answer in (output, held)]
    return pair.PairedErrors(errors[0], errors[1])


@dataclass(frozen=True)
class DeviceTimes:
    """Microseconds on the device, and whether the last launch had always been queued before the first could begin: without latency then."""

    micros: list[float]
    queued: bool


def device_times(run: Run, inputs: list[dict[str, Tensor]], repeats: int, cache_bytes: int) -> DeviceTimes:
    """Launches queue up behind a spinning kernel and one that reads four times the cache: what it leaves there is of no use to ``run``, and
    need not be written back."""
    found, queued = [], True
    sweep = torch.zeros(cache_bytes, device="cuda")  # of four bytes each
    for repeat in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)
        sweep.amax()
        start.record()
        run(inputs[repeat % len(inputs)])
        queued &= not start.query()
        end.record()
        end.synchronize()
        found.append(1000 * start.elapsed_time(end))
    return DeviceTimes(found, queued)


def loop_times(run: Run, inputs: list[dict[str, Tensor]], repeats: int, calls: int = 20) -> list[float]:
    """Microseconds per call of calls one after another, by the host's clock, launches included."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in range(calls):
            run(inputs[call % len(inputs)])
        torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - begin) / calls)
    return found


def copy_bandwidth(device: torch.device, repeats: int, cache_bytes: int) -> list[float]:
    """GB/s of a copy of 1 GiB, bytes read plus bytes written."""
    source = torch.empty(2**28, device=device).normal_()
    target = torch.empty_like(source)
    micros = device_times(lambda _: target.copy_(source), [{}], repeats, cache_bytes).micros
    return [2 * source.numel() * 4 / (us * 1e3) for us in micros]


def product_rate(device: torch.device, repeats: int, cache_bytes: int) -> list[float]:
    """GFLOP/s of a float32 matrix product of side 8192 without TF32: the ceiling of ordinary float32 arithmetic."""
    a, b = (torch.randn(8192, 8192, device=device) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = False
    micros = device_times(lambda _: a @ b, [{}], repeats, cache_bytes).micros
    return [2 * 8192**3 / (us * 1e3) for us in micros]


def agrees(case: Case) -> None:
    """All versions say the same before any of them is timed: relative distance below 2 %, the rounding of bfloat16 gradients."""
    values = case.tensors()
    answers = {name: flat(run(values)) for name, run in case.versions.items()}
    for name, answer in answers.items():
        for one, other in zip(answer, answers["torch"], strict=True):
            gap = float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12))
            if not gap < 0.02:
                raise SystemExit(f"{case.op} on {name} differs from PyTorch by {gap:.2e} at {case.shape}; nothing was timed")


def flat(answer: Any) -> list[Tensor]:
    """The tensors in a result."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    found = [tensor for part in parts for tensor in ([part] if isinstance(part, Tensor) else vars(part).values())]
    return [tensor.detach() for tensor in found if tensor is not None]


def measure(case: Case, repeats: int, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of one case."""
    agrees(case)
    size = sum(tensor.numel() * tensor.element_size() for tensor in case.tensors().values())
    rotated = [case.tensors() for _ in range(max(1, min(8, -(-4 * common["cache_bytes"] // size))))]
    for backend, run in case.versions.items():
        for values in rotated:
            run(values)
        alone = device_times(run, rotated, repeats, common["cache_bytes"])
        for metric, times, more in (("device time", alone.micros, {"queued": alone.queued}),
                                    ("time per call", loop_times(run, rotated, repeats), {})):
            yield {"op": case.op, "part": case.part, "backend": backend, "shape": list(case.shape), "dtype": str(case.dtype).split(".")[-1],
                   "metric": metric, "unit": "us", **quantiles(times), **more, "bytes": case.num_bytes, "flops": case.flops, **common}
    torch.compiler.reset()


def quantiles(values: list[float]) -> dict[str, float | int]:
    cuts = statistics.quantiles(values, n=10)
    return {"p20": round(cuts[1], 3), "p50": round(statistics.median(values), 3), "p80": round(cuts[7], 3), "repeats": len(values)}


def machine(device: torch.device) -> dict[str, Any]:
    """What every row says about where it was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    properties = torch.cuda.get_device_properties(device)
    return {"hardware": properties.name, "cache_bytes": properties.L2_cache_size, "torch": torch.__version__, "cuda": torch.version.cuda,
            "compiler": compiler(), "commit": commit, "date": date.today().isoformat()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch per latent and few repeats")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: there is nothing to measure, and nothing is estimated")
    device, repeats = torch.device("cuda", torch.cuda.current_device()), 15 if arguments.quick else 50
    common = machine(device)
    how = (device, repeats, common["cache_bytes"])
    ceilings = [{"op": name, "backend": "torch", "metric": metric, "unit": unit, **quantiles(values), **common}
                for name, metric, unit, values in (("copy", "bandwidth", "GB/s", copy_bandwidth(*how)),
                                                   ("float32 product", "rate", "GFLOP/s", product_rate(*how)))]
    with arguments.out.open("a", encoding="utf-8") as file:
        def record(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{row['op']:<22} {row['backend']:<8} {row.get('shape', '')!s:<26} {row['metric']:<14} {row['p50']:>12} {row['unit']}")

        for row in ceilings:
            record(row)
        for name, latent in LATENTS.items():
            for batch in ((16,) if arguments.quick else BATCHES) + (LARGE[name],):
                for case in cases((batch, *latent), device):
                    for row in measure(case, repeats, common):
                        record(row)
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
