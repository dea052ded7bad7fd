"""Run every recipe for two iterations on tiny random weights of its family, end to end, and write down what happened.

    python -m scripts.verify_recipes [recipe ...]

What a recipe says stays as it is (dynamics, steps, algorithm, precision, what is trained); what a laptop cannot hold is made small:
weights, picture size, prompts, groups, iterations, and CLIP models, which become the embedded one. Rows go to
``benchmarks/results/recipes.jsonl``. A recipe that passes may say ``verification: tiny random weights``; nothing else entitles it to.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

from scripts.tiny_families import by_name
from visalign import load_config, train
from visalign.config import read_source

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "recipes.jsonl"
FAMILIES = {
    "sd35_flow_grpo": "Stable Diffusion 3",
    "sd35_flow_grpo_fast": "Stable Diffusion 3",
    "flux_dance_grpo": "Flux",
    "flux_mix_grpo": "Flux",
    "flux_pref_grpo": "Flux",
    "sdxl_ddpo": "Stable Diffusion XL",
    "wan_flow_grpo": "Wan 2.1",
}
PROMPTS = ("a red circle", "two blue squares", "a green triangle", "a small white square")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(FAMILIES), help="names (default: all)")
    torch.set_num_threads(1)
    for recipe in parser.parse_args().recipes:
        record(recipe, *verify(recipe))


def verify(recipe: str) -> tuple[dict[str, float], float]:
    """Train the shrunken recipe; returns the last iteration's metrics and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        family = by_name(FAMILIES[recipe])
        family.build().save_pretrained(place / "model")
        (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
        settings = shrunken(yaml.safe_load(read_source(recipe)[0]), dict(family.call), place)
        (place / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        start = time.perf_counter()
        run = train(load_config(str(place / "recipe.yaml")), place / "run")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert (run / "adapter").exists()
        return rows[-1], time.perf_counter() - start


def shrunken(settings: dict[str, Any], call: dict[str, Any], place: Path) -> dict[str, Any]:
    """The recipe with a tiny model, tiny media and tiny counts."""
    small = {key: value for key, value in call.items() if key in ("height", "width", "num_frames", "max_sequence_length")}
    settings["model"] |= {"path": str(place / "model"), "device": "cpu", "eval_call": {}}
    settings["model"]["call"] |= small
    settings["data"] = {"prompts": str(place / "prompts.txt"), "eval_prompts": str(place / "prompts.txt")}
    settings["train"] |= {"iterations": 2, "groups": 2, "group_size": 4, "updates": min(2, settings["train"]["updates"]), "microbatch": 2}
    settings["evaluation"] = {"every": 0, "num_prompts": 2, "batch": 2}
    settings["checkpoint"] = {"every": 0, "keep": 1}
    for key in ("rewards", "guards"):
        settings[key] = [with_embedded_clip(entry) for entry in settings.get(key, [])]
    return settings


def with_embedded_clip(value: Any) -> Any:
    """The same settings with every CLIP model replaced by the embedded one."""
    if isinstance(value, dict):
        if "pretrained" in value:
            value = {key: part for key, part in value.items() if key != "pretrained"} | {"model": "playground:clip"}
        return {key: with_embedded_clip(part) for key, part in value.items()}
    return [with_embedded_clip(part) for part in value] if isinstance(value, list) else value


def record(recipe: str, metrics: dict[str, float], seconds: float) -> None:
    """Append one row and print it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    telling = ("policy/ratio_deviation_first", "policy/output_gap_first", "train/grad_norm", "grpo/loss")
    row = {
        "recipe": recipe,
        "level": "tiny random weights",
        "family": FAMILIES[recipe],
        "iterations": 2,
        "seconds": round(seconds, 1),
        **{key: metrics[key] for key in telling if key in metrics},
        "torch": torch.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
