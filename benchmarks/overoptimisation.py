"""Over-optimisation on the embedded world: gold and proxy while GRPO pushes the playground's CLIP too hard, when a guard ends such a run,
and what ensembles, bounded rewards and win rates change.

    python benchmarks/overoptimisation.py [--seeds 0 1 2] [--arms clip guarded ...] [--pairs runs/pairs]
    python -m scripts.guard_figure

Every run is ``visalign train embedded_overoptimisation`` with an arm's overrides. "guarded" is the recipe as it is, the others go on when
the guard calls, so that the curve is seen. The ensemble's members, and the single head beside it, learn from pairs a quarter of whose
labels is flipped (``reward_training.py``), which leaves them about as accurate as CLIP's own score. Rows, one per evaluation, go to
``benchmarks/results/overoptimisation.jsonl``; the figure is made from them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from reward_training import draw_pairs, flip

from visalign import checkpoint
from visalign.build import build
from visalign.config import load_config
from visalign.data import load_prompts
from visalign.distributed import Processes
from visalign.evaluation import evaluate
from visalign.maths.bootstrap import bootstrap_gain
from visalign.media import load_media
from visalign.playground import clip_path
from visalign.plugins import load_reward
from visalign.protocols import Reward
from visalign.settings import dump_yaml
from visalign.tracking import read_metrics
from visalign.types import Prompt

RESULTS = Path(__file__).parent / "results" / "overoptimisation.jsonl"
RECIPE = "embedded_overoptimisation"
MEMBERS, STRENGTH, SHARPNESS = 4, 5.0, 100.0
ITERATIONS = 28  # of the arms beside CLIP's own
FRESH = (1, 2)  # draws of held-out prompts that no run sees; their noise is as fresh
NUM_STANDARD = 512  # samples of the untrained model that a reward's mean and standard deviation are taken from
ARMS = ("clip", "guarded", "clip, PAR", "clip, win rates", "ensemble, UWO", "one member")
CLIP = {"reward": "clip", "model": "playground:clip"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--pairs", type=Path, default=Path("runs") / "pairs")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "overoptimisation")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not (arguments.pairs / "preferences.jsonl").is_file():
        draw_pairs(arguments.pairs, 0)
    for arm in arguments.arms:
        for seed in arguments.seeds:
            folder = arguments.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            train(folder, arm, seed, arguments.pairs, arguments.runs)
            record(arguments.results, folder, arm, seed)
            if arm == "guarded" and (folder / "stopping.json").is_file():
                elsewhere(arguments.results, folder, seed)


def train(folder: Path, arm: str, seed: int, pairs: Path, runs: Path) -> None:
    """One run in its own process; a folder that is there is gone on with."""
    overrides = [f"train.seed={seed}", *([] if arm == "guarded" else ["stopping.stop=false", "checkpoint.every=40"])]
    if arm not in ("clip", "guarded"):
        text = dump_yaml(arm_config(arm, seed, pairs, runs))
        recipe = runs / f"{folder.name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(text, encoding="utf-8")
    else:
        recipe = Path(RECIPE)
    words = ["--resume", str(folder)] if (folder / "config.yaml").is_file() else [str(recipe), *overrides, "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "visalign", "train", *words], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})


def arm_config(arm: str, seed: int, pairs: Path, runs: Path) -> dict[str, Any]:
    """What an arm trains on instead; CLIP is watched everywhere."""
    params = {"model": CLIP["model"]}
    watched = [{"name": "captions"}, {"name": "clip", "params": params, "stops": False}]
    config: dict[str, Any] = {"extends": RECIPE, "guards": watched, "train": {"iterations": ITERATIONS}}
    if arm == "clip, PAR":
        shift, scale = standardisation("clip", {"model": str(clip_path())}, pairs)
        return {**config, "guards": watched[:1], "rewards": [
            {"name": "clip", "params": params, "shift": shift, "scale": scale, "shape": {"name": "par", "reference": 0.0}}]}
    if arm == "clip, win rates":
        return {**config, "rewards": [
            {"name": "win_rate", "params": {"judge": {"reward": "bradley_terry", "scale": SHARPNESS, "pointwise": CLIP}}}]}
    rewards = runs / f"ensemble-{seed}"
    if not rewards.is_dir():
        subprocess.run([sys.executable, "-m", "visalign", "reward-train", "reward_embedded_ensemble", f"data.path={flip(pairs, seed)}",
                        f"seed={seed}", f"ensemble.members={MEMBERS}", "--out", str(rewards)], check=True)
    members: list[Mapping[str, Any]] = []
    for member in range(MEMBERS if arm == "ensemble, UWO" else 1):
        given = {"path": str(rewards.resolve()), "member": member}
        shift, scale = standardisation("trained", given, pairs)
        members.append({"name": "trained", "params": {**given, "name": f"member_{member}"}, "shift": shift, "scale": scale})
    combine = {"combine": {"name": "uncertainty", "strength": STRENGTH}} if len(members) > 1 else {}
    return {**config, "rewards": members, **combine}


def elsewhere(results: Path, folder: Path, seed: int) -> None:
    """Append what the guard's peak and the end of its run are on prompts and noise that neither was chosen by."""
    at = [int(path.name) for path in sorted((folder / "checkpoints").iterdir())]
    config = load_config(folder / "config.yaml")
    parts, processes = build(config, Processes.start("cpu")), Processes.start("cpu")
    prompts = [prompt for draw in FRESH for prompt in load_prompts(f"playground:heldout/{draw}")]
    gold = {}
    for iteration in (at[0], at[-1]):
        saved = checkpoint.load(folder / "checkpoints" / f"{iteration:06d}").tensors["weights"]
        with torch.no_grad():
            for name, parameter in parts.policy.named_trainable().items():
                parameter.copy_(saved[name])
        found = evaluate(parts.eval_policy, parts.sampler, {"captions": parts.guards["captions"]}, prompts, seed=FRESH[0] * 1_000_000,
                         batch=config.evaluation.batch, processes=processes)
        assert found is not None
        gold[iteration] = found.values["captions"]
    fall = bootstrap_gain(gold[at[-1]], gold[at[0]])
    append(results, {"op": "overoptimisation_elsewhere", "arm": "guarded", "seed": seed, "peak": at[0], "end": at[-1],
                     "gold": [round(float(gold[one].mean()), 4) for one in (at[0], at[-1])], "count": len(prompts),
                     "lost": [round(getattr(fall, end), 4) for end in ("low", "mean", "high")]})


def standardisation(name: str, params: Mapping[str, Any], pairs: Path) -> tuple[float, float]:
    """Mean and standard deviation of a reward over samples of the untrained model, rounded."""
    with (pairs / "preferences.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, NUM_STANDARD)]
    reward = load_reward(name, **params)
    assert isinstance(reward, Reward)
    scores = reward.score([load_media(pairs / row["media"][k % 2]) for k, row in enumerate(rows)], [Prompt(row["prompt"]) for row in rows],
                        range(len(rows)))
    return round(float(scores.raw.mean()), 4), round(float(scores.raw.std()), 4)


def record(results: Path, folder: Path, arm: str, seed: int) -> None:
    """Append a row per evaluation."""
    stopping = folder / "stopping.json"
    why = json.loads(stopping.read_text(encoding="utf-8"))["kind"] if stopping.is_file() else None
    for row in read_metrics(folder):
        if "eval/captions" in row:
            append(results, {
                "op": "overoptimisation", "arm": arm, "seed": seed, "iteration": int(row["iteration"]) + 1,
                "gold": [round(row[f"eval/captions{end}"], 4) for end in ("_low", "", "_high")],
                "strict": round(row["eval/captions/strict"], 4), "proxy": round(row["eval/clip"], 4),
                "kl_per_dim": round(row.get("eval/kl_per_dim", 0.0), 4), "alarm": bool(row.get("guard/alarms", 0)), "why": why})


def append(results: Path, row: Mapping[str, Any]) -> None:
    """One row, with what made it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "hardware": f"cpu, {platform.machine()}, 1 thread", "torch": torch.__version__, "commit": commit,
                               "date": date.today().isoformat()}) + "\n")


if __name__ == "__main__":
    main()
