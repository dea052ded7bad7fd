"""Run every recipe for two iterations on tiny random weights of its family, end to end, and write down what happened.

    python -m scripts.verify_recipes [recipe ...]

What a recipe says stays as it is (dynamics, steps, algorithm, precision, what is trained); what a laptop cannot hold is made small:
weights, picture size, prompts, groups, draws, iterations, and CLIP models, which become the embedded one. Preference data become a few
random pictures or videos of another size and a ``preferences.jsonl``: encoding and replaying them is run, a table's layout is not. The
sound encoder and the exemplars that a user brings become four numbers per sound and random sounds. Rows go to
``benchmarks/results/recipes.jsonl``. A recipe that passes may say ``verification: tiny random weights``; nothing else entitles it to.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Generator, Tensor

from scripts.tiny_families import by_name
from visalign import load_config, train
from visalign.config import read_data, recipe_names
from visalign.media import save_media
from visalign.types import Media, MediaKind

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "recipes.jsonl"
CLASSES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL", "sd35": "Stable Diffusion 3", "flux": "Flux", "wan": "Wan 2.1",
           "stable": "Stable Audio"}
RECIPES = tuple(name for name in recipe_names("run") if name != "quickstart" and not name.startswith("embedded_"))
PROMPTS = ("a red circle", "two blue squares", "a green triangle", "a small white square")
TELLING = ("policy/ratio_deviation_first", "policy/output_gap_first", "train/grad_norm", "grpo/loss", "preference/loss", "nft/loss",
           "awm/loss", "self_npo/loss", "reward_gradient/loss")
# Before the first update policy, old policy and reference are the same weights: gaps of 0, and log 2 for DPO.
AT_START = ("policy/error_gap_first", "policy/output_gap_first", "preference/loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="names (default: all)")
    torch.set_num_threads(1)
    for recipe in parser.parse_args().recipes:
        rows, seconds = verify(recipe)
        record(recipe, rows, seconds)


def family_of(recipe: str) -> str:
    """The tiny family that stands for a recipe's model; its name begins with the class."""
    return CLASSES[recipe.partition("_")[0]]


def verify(recipe: str, family_name: str | None = None, overrides: Sequence[str] = ()) -> tuple[list[dict[str, float]], float]:
    """Train the shrunken recipe; returns the metrics of every iteration, the first evaluation before them, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        family = by_name(family_name or family_of(recipe))
        family.build().save_pretrained(place / "model")
        (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
        settings = shrunken(read_data(recipe)[0], dict(family.call), place)
        (place / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        start = time.perf_counter()
        run = train(load_config(str(place / "recipe.yaml"), overrides), place / "run")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert (run / "adapter").exists()
        norm = rows[-1]["train/grad_norm"]
        assert 0 < norm < math.inf, f"{recipe}: the gradient's norm is {norm}"
        return rows, time.perf_counter() - start


def shrunken(settings: dict[str, Any], call: dict[str, Any], place: Path) -> dict[str, Any]:
    """The recipe with a tiny model, tiny media and tiny counts."""
    small = {key: value for key, value in call.items()
             if key in ("height", "width", "num_frames", "max_sequence_length", "audio_end_in_s")}
    settings["model"] |= {"path": str(place / "model"), "device": "cpu", "eval_call": {}}
    settings["model"]["call"] |= small
    data = settings["data"]
    settings["data"] = {"eval_prompts": str(place / "prompts.txt")}
    if "preferences" in data:
        write_preferences(place / "pairs", "video" if "num_frames" in small else "image", ties=data["preferences"].get("ties") == "keep")
        own = {"path": str(place / "pairs"), "format": "jsonl", "cache": str(place / "cache")}
        settings["data"]["preferences"] = {**data["preferences"], **own}
    else:
        settings["data"]["prompts"] = str(place / "prompts.txt")
    size, updates = min(4, settings["train"]["group_size"]), min(2, settings["train"]["updates"])
    settings["train"] |= {"iterations": 2, "groups": 2, "group_size": size, "updates": updates, "microbatch": 2, "warmup": 0}
    if "draws" in settings["algorithm"]:
        settings["algorithm"]["draws"] = min(2, settings["algorithm"]["draws"])
    settings["evaluation"] = {"every": 0, "num_prompts": 2, "batch": 2}
    settings["checkpoint"] = {"every": 0, "keep": 1}
    for key in ("rewards", "guards"):
        settings[key] = [with_own_exemplars(with_embedded_clip(entry), place) for entry in settings.get(key, [])]
    return settings


def write_preferences(folder: Path, kind: MediaKind, ties: bool) -> None:
    """A pair per prompt of random media, larger and of another shape than the pipeline's; scores are ties, or like PickScore's cosines."""
    (folder / "media").mkdir(parents=True)
    shape = (5, 3, 24, 20) if kind == "video" else (3, 24, 20)
    scores = [[0.0, 0.0]] * len(PROMPTS) if ties else [[0.22, 0.20], [0.19, 0.23]] * 2
    lines = []
    for number, (prompt, judged) in enumerate(zip(PROMPTS, scores, strict=True)):
        media = [random_media(kind, shape, seed=2 * number + k) for k in range(2)]
        files = [save_media(one, folder / "media" / f"{number}-{k}") for k, one in enumerate(media)]
        lines.append(json.dumps({"prompt": prompt, "media": [f"media/{file.name}" for file in files], "scores": judged}))
    (folder / "preferences.jsonl").write_text("\n".join(lines), encoding="utf-8")


def random_media(kind: MediaKind, shape: tuple[int, ...], seed: int) -> Media:
    """Noise as a picture, a video or a sound."""
    generator = Generator().manual_seed(seed)
    if kind == "audio":
        return Media(kind, 0.2 * torch.randn(shape, generator=generator).clamp(-4, 4), rate=44100.0)
    return Media(kind, torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), rate=8.0 if kind == "video" else None)


def waveform_features(media: Sequence[Media]) -> Tensor:
    """Four numbers per sound, (n, 4): an encoder as a user would bring one."""
    rows = [sample.data.double().mean(dim=0) for sample in media]
    return torch.stack([torch.stack([row.square().mean().sqrt(), row.abs().amax(), row.diff().abs().mean(), row.mean()]) for row in rows])


def with_own_exemplars(entry: dict[str, Any], place: Path) -> dict[str, Any]:
    """The same reward with an encoder and exemplars that exist."""
    if "reference" not in entry.get("params", {}):
        return entry
    (place / "exemplars").mkdir()
    for number in range(8):
        save_media(random_media("audio", (2, 2000), seed=100 + number), place / "exemplars" / f"{number}")
    own = {"encoder": "scripts.verify_recipes:waveform_features", "modality": ["audio"], "reference": str(place / "exemplars"), "memory": 8}
    return {**entry, "params": {**entry["params"], **own}}


def with_embedded_clip(value: Any) -> Any:
    """The same settings with every CLIP model replaced by the embedded one."""
    if isinstance(value, dict):
        if "pretrained" in value:
            value = {key: part for key, part in value.items() if key != "pretrained"} | {"model": "playground:clip"}
        return {key: with_embedded_clip(part) for key, part in value.items()}
    return [with_embedded_clip(part) for part in value] if isinstance(value, list) else value


def record(recipe: str, rows: Sequence[dict[str, float]], seconds: float) -> None:
    """Append one row, of the last iteration and of what must hold in the first, and print it."""
    first, last = rows[1], rows[-1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    row = {
        "recipe": recipe,
        "level": "tiny random weights",
        "family": family_of(recipe),
        "iterations": 2,
        "seconds": round(seconds, 1),
        **{key: last[key] for key in TELLING if key in last},
        **{f"start/{key}": first[key] for key in AT_START if key in first},
        "torch": torch.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
