"""What noise treatments do for a reward trained on the embedded world, 25 % of its labels flipped; and the game that goes in circles.

    python benchmarks/reward_training.py [--pairs runs/reward-pairs] [--seeds 0 1 2] [--methods none voting ...]

Pairs are drawn once by ``visalign pairs`` from the embedded pipeline with the gold verifier as judge. A seed flips a quarter of all labels,
those of held-out judgements among them, splits the prompts and draws the heads. Every number is against the gold labels of held-out
prompts. Rows go to ``benchmarks/results/reward_training.jsonl``; ``PAIRS/flipped-SEED.jsonl`` says which labels were flipped.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from visalign.commands import pairs as pairs_command
from visalign.media import save_media
from visalign.playground import render, sample_scene, train_prompts
from visalign.playground.world import COLOURS, Caption, Thing
from visalign.reward_training.config import load_reward_config
from visalign.reward_training.train import train_reward
from visalign.rewards.feature_encoders import load_encoder
from visalign.types import Media

RESULTS = Path(__file__).parent / "results" / "reward_training.jsonl"
RECIPE = "reward_embedded_clip"
FLIPPED = 0.25
NUM_CIRCLES = 1500
CALL = ["num_inference_steps=6", "guidance_scale=1.0", "max_sequence_length=12"]
# Overrides of the recipe by method; "clean" is trained on labels as the verifier gave them. The small head is the recipe's without the
# strong regularisation, which is itself a treatment.
METHODS: Mapping[str, Sequence[str]] = {
    "clean": (),
    "none": (),
    "smoothing": (f"noise={{name: smoothing, amount: {FLIPPED}}}",),
    "flip_corrected, known rate": (f"noise={{name: flip_corrected, rate: {FLIPPED}}}",),
    "flip_corrected, estimated rate": ("noise={name: flip_corrected}",),
    "posterior": ("noise={name: posterior}",),
    "voting": ("noise={name: voting}",),
    "co_filter": ("noise={name: co_filter}",),
    "best epoch": ("optimization.keep=best",),
    "ensemble of 4": ("ensemble.members=4",),
}
WEAK = "head={name: mlp, width: 128, depth: 2, dropout: 0.1}", "optimization.weight_decay=0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path("runs") / "reward-pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*METHODS])
    parser.add_argument("--draw", type=int, default=1, help="seed of the samples; settings were chosen on draw 0")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not (arguments.pairs / "preferences.jsonl").is_file():
        draw_pairs(arguments.pairs, arguments.draw)
    encoder = load_encoder(load_reward_config(RECIPE).encoder)
    for seed in arguments.seeds:
        flipped = flip(arguments.pairs, seed)
        for head, extra in (("regularised", ()), ("free", WEAK)):
            for method in arguments.methods:
                data = arguments.pairs / "preferences.jsonl" if method == "clean" else flipped
                evaluation, seconds = run(encoder, data, seed, [*METHODS[method], *extra])
                record(arguments.results, {"method": method, "head": head, "seed": seed, "draw": arguments.draw,
                                           **measured(evaluation, "gold"), "cpu_s": round(seconds, 1)})
        for objective in ("bradley_terry", "general_preference"):
            evaluation, seconds = circle(encoder, seed, objective)
            record(arguments.results, {"method": objective, "head": "rock, paper, scissors", "seed": seed,
                                       **measured(evaluation, "heldout"), "cpu_s": round(seconds, 1)})


def draw_pairs(folder: Path, seed: int) -> None:
    wanted = pairs_command.Wanted(rule="all", margin=0.0, per_prompt=None, agreement="combined", temperature=1.0)
    pairs_command.run("playground:pipeline", CALL, adapter=None, texts=[], source="playground:train", rewards=["captions"], group_size=4,
                      wanted=wanted, seed=seed, batch=32, dtype=None, device="cpu", out=folder)


def flip(folder: Path, seed: int) -> Path:
    """The data set with a quarter of its labels turned round; what was turned says so, and the verifier's scores stay beside."""
    lines = (folder / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    chosen = set(random.Random(seed).sample(range(len(rows)), round(FLIPPED * len(rows))))
    for number, row in enumerate(rows):
        row["metadata"]["flipped"] = number in chosen
        row["scores"] = row["scores"][::-1] if number in chosen else row["scores"]
    path = folder / f"flipped-{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(encoder: Any, data: Path, seed: int, overrides: Sequence[str]) -> tuple[dict[str, Any], float]:
    """Evaluation and CPU seconds of one training; embeddings are kept beside the data."""
    config = load_reward_config(RECIPE, [f"data.path={data}", f"seed={seed}", f"features.cache={data.parent / 'embeddings'}", *overrides])
    started = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        evaluation = train_reward(config, encoder, Path(place) / "reward")
    return evaluation, time.process_time() - started


def circle(encoder: Any, seed: int, objective: str) -> tuple[dict[str, Any], float]:
    """Circles beat squares, squares beat triangles, triangles beat circles, whatever the prompt and the colours."""
    rng = random.Random(seed)
    shapes, prompts = ("circle", "square", "triangle"), train_prompts(100, seed)
    with tempfile.TemporaryDirectory() as place:
        rows = []
        for number in range(NUM_CIRCLES):
            better = rng.randrange(3)
            files = []
            for k, shape in enumerate((shapes[better], shapes[(better + 1) % 3])):
                scene = sample_scene(Caption((Thing(rng.choice(COLOURS), shape),)), rng)
                files.append(save_media(Media("image", render([scene])[0]), Path(place) / f"{number}-{k}").name)
            rows.append({"prompt": prompts[number % len(prompts)], "chosen": files[0], "rejected": files[1]})
        data = Path(place) / "preferences.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return run(encoder, data, seed, [f"objective={objective}", "data.gold=null", "features.blocks=[media]",
                                         "head={name: mlp, dropout: 0.0}",
                                         "optimization={epochs: 60, batch: 64, learning_rate: 2e-3, weight_decay: 0.1}"])


def measured(evaluation: Mapping[str, Any], side: str) -> dict[str, Any]:
    found = evaluation[side]
    ends = ("low", "value", "high")
    row: dict[str, Any] = {name: [round(found[name][end], 4) for end in ends] for name in ("accuracy", "ece", "log_loss")}
    row |= {"judgements": found["judgements"], "prompts": found["prompts"],
            "encoder_accuracy": round(evaluation["encoder"][side]["value"], 4)}
    if side == "gold":
        row["gain_over_encoder"] = [round(evaluation["encoder"]["gain"][end], 4) for end in ends]
    return row | {key.removeprefix("noise/"): round(value, 4) for key, value in evaluation["noise"].items()}


def record(path: Path, measured: dict[str, Any]) -> None:
    """Append one row and print it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    row = {"op": "reward_training", **measured, "hardware": f"cpu, {platform.machine()}, 1 thread", "torch": torch.__version__,
           "commit": commit, "date": date.today().isoformat()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
