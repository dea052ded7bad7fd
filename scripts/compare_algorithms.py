"""Every method on the embedded world, on the same evaluation prompts, over several seeds: rows, and the table in docs/algorithms.md.

    python -m scripts.compare_algorithms --methods nft awm --seeds 0 1 2 [--runs runs/compare]
    python -m scripts.compare_algorithms --table                                  the table from the rows, no training

Gold is the exact verifier, which some methods train on (the table says so) and others never see. All are judged on the third draw of the
held-out prompts, which no setting was chosen on. A sample counts as scored when a reward was asked about it during training.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from visalign import loop
from visalign.build import build
from visalign.commands import quiet_libraries
from visalign.config import Config, load_config, resolve_path
from visalign.data import load_prompts
from visalign.distributed import Processes
from visalign.evaluation import evaluate
from visalign.maths.bootstrap import bootstrap_gain, bootstrap_mean
from visalign.parts import Parts
from visalign.plugins import load_reward
from visalign.protocols import DifferentiableReward, Policy
from visalign.samplers.guidance import GuidedPolicy, MediaReward, Tilt
from visalign.samplers.negative import ask_against, give_negative
from visalign.samplers.offsets import read_offset
from visalign.samplers.policy import PipelinePolicy

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "algorithms.jsonl"
GUIDANCE = 3.0
EVALUATION = ("data.eval_prompts=playground:heldout/2", "evaluation.seed=3000000", "evaluation.num_prompts=256", "evaluation.every=4",
              "evaluation.batch=64", "checkpoint.every=0")
METRICS = ("captions/mean", "captions/strict", "clip")


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        title: what the table calls it.
        config: recipe; ``None`` trains nothing.
        overrides: of the recipe, as on the command line.
        trained_on: whether the update reads gold itself, a proxy, or no reward.
        negative: judge guidance 3 with the trained weights as the negative model against plain guidance 3.
        guide: judge the untrained model under reward guidance of this weight.
        pairs: make the preference data first: group size of ``visalign pairs`` on the training prompts.
    """

    title: str
    config: str | None = "embedded_grpo"
    overrides: tuple[str, ...] = ()
    trained_on: str = "gold"
    negative: bool = False
    guide: float | None = None
    pairs: int | None = None


METHODS: dict[str, Method] = {
    "flow_grpo": Method("Flow-GRPO"),
    "pref_grpo": Method("Pref-GRPO", "embedded_pref_grpo"),
    "online_dpo": Method("online Flow-DPO", "embedded_online_dpo"),
    "flow_dpo": Method("offline Flow-DPO", "embedded_flow_dpo", pairs=8),
    "smpo": Method("SmPO", "embedded_smpo"),
    "nft": Method("DiffusionNFT", "embedded_nft"),
    "awm": Method("AWM", "embedded_awm"),
    "rwr": Method("RWR", "embedded_rwr"),
    "dro": Method("DRO (DSO)", "embedded_dro"),
    "dragon_instance": Method("DRAGON, instance", "embedded_dragon_instance"),
    "dragon_distribution": Method("DRAGON, distribution", "embedded_dragon_distribution", trained_on="exemplars"),
    "draft": Method("DRaFT", "embedded_draft", trained_on="proxy CLIP"),
    "self_npo": Method("Self-NPO guidance", "embedded_self_npo", trained_on="nothing", negative=True),
    "npo": Method("Diffusion-NPO guidance", "embedded_npo", negative=True),
    "flow_nrg": Method("Flow-NRG", None, trained_on="proxy CLIP", guide=150.0),
}


@dataclass
class Outcome:
    """What one run of one method gave: per metric the values of every evaluation prompt before and after, and what it took."""

    before: dict[str, Any]
    after: dict[str, Any]
    samples: int = 0
    rows: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs") / "compare")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE", help="change the recipes, to try something; "
                        "judged on the first draw of the prompts, and nothing is recorded")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        (ROOT / "docs" / "algorithms.md").write_text(table(), encoding="utf-8")
        return
    if len(arguments.methods) * len(arguments.seeds) > 1:  # one process each: no run sees another's generators or caches
        for seed in arguments.seeds:
            for name in arguments.methods:
                command = [sys.executable, "-m", "scripts.compare_algorithms", "--methods", name, "--seeds", str(seed), "--runs",
                           str(arguments.runs)]
                subprocess.run([*command, *(["--set", *arguments.overrides] if arguments.overrides else [])], check=False, cwd=ROOT)
        return
    torch.set_num_threads(1)
    quiet_libraries()
    (name,), (seed,) = arguments.methods, arguments.seeds
    folder = arguments.runs / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    trial = ["data.eval_prompts=playground:heldout", "evaluation.seed=1000000", *arguments.overrides] if arguments.overrides else []
    outcome = run(METHODS[name], seed, folder, trial)
    if trial:
        print(f"{time.perf_counter() - started:.0f} s, gold mean after so many samples: {outcome.curve}")
    else:
        record(name, seed, outcome, time.perf_counter() - started)


def run(method: Method, seed: int, folder: Path, overrides: Sequence[str]) -> Outcome:
    """Train, if the method does, and judge."""
    if method.guide is not None:
        return guided(method.guide, seed, folder)
    extra = [f"train.seed={seed}", *EVALUATION, *method.overrides, *overrides]
    scored = 0
    if method.pairs is not None:
        scored = make_pairs(method.pairs, seed, folder.with_name(folder.name + "-pairs"))
        extra.append(f"data.preferences.path={folder.with_name(folder.name + '-pairs')}")
    config = load_config(method.config or "embedded_grpo", extra)
    processes = Processes.start(config.model.device)
    parts = build(config, processes)
    loop.run(parts, config, folder, processes)
    outcome = read_run(config, folder, scored)
    outcome.rows = sum(policy.denoise.rows for policy in {id(p): p for p in (parts.policy, parts.train_policy)}.values()
                       if isinstance(policy, PipelinePolicy))
    if method.negative:
        outcome.before, outcome.after = against(config, parts, folder)
        outcome.curve = []
    if method.trained_on == "nothing":
        outcome.samples = 0
    return outcome


def read_run(config: Config, folder: Path, scored: int) -> Outcome:
    """Values before and after, and gold over the samples scored so far."""
    values = {label: json.loads((folder / "evaluations" / f"{label}.json").read_text(encoding="utf-8"))["values"]
              for label in ("before", "after")}
    per_iteration = 0 if config.data.preferences is not None else config.train.groups * config.train.group_size
    curve = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "eval/captions/mean" in row:
            curve.append((scored + (row["iteration"] + 1) * per_iteration, row["eval/captions/mean"]))
    return Outcome(values["before"], values["after"], samples=scored + config.train.iterations * per_iteration, curve=curve)


def make_pairs(group_size: int, seed: int, folder: Path) -> int:
    """A preference data set from the untrained model and the verifier; returns how many samples were scored."""
    shutil.rmtree(folder, ignore_errors=True)
    prompts, num = folder.with_name(folder.name + ".txt"), 256
    prompts.parent.mkdir(parents=True, exist_ok=True)
    texts = [prompt.text for prompt in load_prompts("playground:train")]
    chosen = [texts[k] for k in torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:num]]
    prompts.write_text("\n".join(chosen), encoding="utf-8")
    pipeline = str(resolve_path("playground:pipeline"))
    command = [sys.executable, "-m", "visalign", "pairs", pipeline, "--prompts", str(prompts), "-r", "captions", "--group-size",
               str(group_size), "--rule", "all", "--per-prompt", "4", "--seed", str(seed), "--out", str(folder), "num_inference_steps=6",
               "guidance_scale=1.0", "max_sequence_length=12"]
    subprocess.run(command, check=True)
    return num * group_size


def judge(policy: Policy, parts: Parts, config: Config) -> dict[str, Any]:
    """Metrics of a policy on the evaluation prompts."""
    settings = config.evaluation
    found = evaluate(policy, parts.sampler, parts.eval_rewards, parts.eval_prompts[:settings.num_prompts], seed=settings.seed,
                     batch=settings.batch, processes=Processes.start(config.model.device), folder=None)
    assert found is not None, "one process"
    return {name: values.tolist() for name, values in found.values.items()}


def against(config: Config, parts: Parts, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Guidance 3 of the untrained model, without and with the trained weights as its negative model."""
    call = {**config.model.call, **config.model.eval_call, "guidance_scale": GUIDANCE}
    base = PipelinePolicy.from_pretrained(str(resolve_path(config.model.path)), **call)
    plain = judge(base, parts, config)
    give_negative(base, read_offset(base, folder / "adapter"))
    return plain, judge(GuidedPolicy(base, ask=ask_against(base)), parts, config)


def guided(weight: float, seed: int, folder: Path) -> Outcome:
    """The untrained model, plain and tilted by the proxy's gradient."""
    # Nothing is trained: the seed changes the noise that is judged.
    config = load_config("embedded_grpo", [*EVALUATION, f"evaluation.seed={3_000_000 + 1000 * seed}"])
    parts = build(config, Processes.start(config.model.device))
    call = {**config.model.call, **config.model.eval_call}
    policy = PipelinePolicy.from_pretrained(str(resolve_path(config.model.path)), **call)
    reward = load_reward("clip", model=str(resolve_path("playground:clip")))
    assert isinstance(reward, DifferentiableReward), "the embedded CLIP has gradients"
    plain = judge(policy, parts, config)
    tilt = Tilt([(MediaReward(reward, policy.decode_tensor), weight)])
    before = policy.denoise.rows
    return Outcome(plain, judge(GuidedPolicy(policy, tilt), parts, config), rows=policy.denoise.rows - before)


def record(name: str, seed: int, outcome: Outcome, wall: float) -> None:
    """Append this run's rows, one per metric."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
    common = {"op": "compare_algorithms", "method": name, "seed": seed, "samples_scored": outcome.samples, "denoiser_rows": outcome.rows,
              "wall_s": round(wall), "cpu_s": round(sum(one.ru_utime + one.ru_stime for one in usage)),
              "curve": [[samples, round(value, 4)] for samples, value in outcome.curve], "commit": commit,
              "hardware": f"cpu, {platform.machine()}, 1 thread", "torch": torch.__version__, "date": date.today().isoformat()}
    with RESULTS.open("a", encoding="utf-8") as file:
        for metric in METRICS:
            before, after = (as_tensor(values[metric]) for values in (outcome.before, outcome.after))
            gain = bootstrap_gain(before, after)
            row = {**common, "metric": metric, "before": round(bootstrap_mean(before).mean, 4),
                   "after": round(bootstrap_mean(after).mean, 4),
                   "gain": [round(gain.low, 4), round(gain.mean, 4), round(gain.high, 4)], "count": gain.count}
            file.write(json.dumps(row) + "\n")
            print(name, seed, metric, row["before"], row["after"], row["gain"], flush=True)


def as_tensor(values: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)


def table() -> str:
    """docs/algorithms.md from the rows of the last run of every method and seed."""
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    last = {(row["method"], row["seed"], row["metric"]): row for row in found}
    grpo = [row["after"] for (method, _, metric), row in last.items() if method == "flow_grpo" and metric == "captions/mean"]
    goal = sum(grpo) / len(grpo) if grpo else float("nan")
    lines = [HEAD, "| method | trained on | samples scored | denoiser rows | CPU s | gold mean, gain per seed | gold strict | proxy CLIP | "
                   "samples to GRPO's gold |", "|---|---|---|---|---|---|---|---|---|"]
    for name, method in METHODS.items():
        rows = {metric: [row for (which, _, m), row in sorted(last.items()) if which == name and m == metric] for metric in METRICS}
        if not rows["captions/mean"]:
            continue
        first = rows["captions/mean"]
        lines.append(f"| {method.title} | {method.trained_on} | {first[0]['samples_scored']:,} | {first[0]['denoiser_rows']:,} | "
                     f"{min(r['cpu_s'] for r in first)}..{max(r['cpu_s'] for r in first)} | {_gains(rows['captions/mean'])} | "
                     f"{_gains(rows['captions/strict'])} | {_gains(rows['clip'])} | {_reached(first, goal)} |")
    return "\n".join([*lines, "", FOOT.format(goal=goal)]) + "\n"


def _gains(rows: Sequence[dict[str, Any]]) -> str:
    """Every seed's gain in points with its interval; in bold where all seeds improve outside their intervals."""
    text = "; ".join(f"{100 * row['gain'][1]:+.1f} [{100 * row['gain'][0]:+.1f}, {100 * row['gain'][2]:+.1f}]" for row in rows)
    return f"**{text}**" if all(row["gain"][0] > 0 for row in rows) else text


def _reached(rows: Sequence[dict[str, Any]], goal: float) -> str:
    found = [next((samples for samples, value in row["curve"] if value >= goal), None) for row in rows]
    return ", ".join("not" if samples is None else f"{samples:,}" for samples in found) if any(row["curve"] for row in rows) else "-"


HEAD = """# Algorithms on the embedded world

Generated by `python -m scripts.compare_algorithms --table` from `benchmarks/results/algorithms.jsonl`. Gains are percentage points on 256
held-out prompts that no setting was chosen on, one entry per seed with its 95 % bootstrap interval; bold where every seed's interval lies
above 0. Guidance rows compare with plain guidance 3 (NPO) or with the unguided model (Flow-NRG), all others with the untrained model.
"""
FOOT = """The last column: samples scored, per seed, until an evaluation (every 4 iterations) first reached {goal:.3f}, the mean final gold
of Flow-GRPO's seeds.
"""

if __name__ == "__main__":
    main()
