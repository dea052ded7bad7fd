"""The quick start over several seeds, as rows: gold, proxy and diversity before and after, with 95 % bootstrap intervals.

    python benchmarks/quickstart.py --seeds 0 1 2 [--draw 1] [--runs runs/quickstart]

Each seed is one ``visalign quickstart`` (its own process, one torch thread). Rows go to ``benchmarks/results/quickstart.jsonl``: one per
seed and metric, with wall-clock and CPU seconds of the whole command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from visalign.config import load_config

RESULTS = Path(__file__).parent / "results" / "quickstart.jsonl"
METRICS = ("captions/mean", "captions/strict", "captions/colour", "captions/count", "captions/shape", "captions/size", "captions/relation",
           "clip", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs") / "quickstart-benchmark")
    parser.add_argument("--draw", type=int, default=1, help="which draw of held-out prompts and of their noise judges; settings saw draw 0")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        folder = arguments.runs / f"draw-{arguments.draw}-seed-{seed}"
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "visalign", "quickstart", "--seed", str(seed), "--out", str(folder),
                        f"data.eval_prompts=playground:heldout/{arguments.draw}", f"evaluation.seed={(1 + arguments.draw) * 1_000_000}"],
                       check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        record(folder, seed, arguments.draw, wall=time.perf_counter() - start, cpu=cpu)


def record(folder: Path, seed: int, draw: int, wall: float, cpu: float) -> None:
    """Append this run's rows."""
    compared = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    guided = json.loads((folder / "evaluations" / "base with guidance 3.json").read_text(encoding="utf-8"))["values"]
    algorithm = load_config(folder / "config.yaml").algorithm.name
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    with RESULTS.open("a", encoding="utf-8") as file:
        for metric in METRICS:
            if metric not in compared:
                continue
            found = compared[metric]
            beside = [value for value in guided.get(metric, []) if value is not None]
            row = {"op": "quickstart", "algorithm": algorithm, "seed": seed, "draw": draw, "metric": metric,
                   "before": round(found["before"]["mean"], 4),
                   "after": round(found["after"]["mean"], 4),
                   "gain": [round(found["gain"][key], 4) for key in ("low", "mean", "high")], "count": found["gain"]["count"],
                   "base_guidance_3": round(sum(beside) / len(beside), 4) if beside else None, "wall_s": round(wall), "cpu_s": round(cpu),
                   "hardware": f"cpu, {platform.machine()}, 1 thread", "torch": torch.__version__, "commit": commit,
                   "date": date.today().isoformat()}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
